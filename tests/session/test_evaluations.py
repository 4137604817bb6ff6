"""Sessions of an optimizer that asks for the objective again and again: a step is several pushes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import (
    FarstepError,
    InvalidRequest,
    LimitExceeded,
    NonFinite,
    NotInitialised,
    StepDiscarded,
    TensorMismatch,
)
from farstep.protocol.fields import PRESENT
from farstep.protocol.messages import Evaluation, PushHead
from farstep.protocol.receipt import Receipt
from farstep_service.optimizers.lbfgs import FIELDS
from farstep_service.session import Outcomes, Session
from tests.session.writers import Writer, begun, equal, new_session, parameters, receipt, sync, values

WOLFE = {"line_search_fn": "strong_wolfe"}


def lbfgs(**settings: Any) -> Session:
    return new_session(optimizer="LBFGS", names=("w", "b"), **{"groups": (WOLFE,), **settings})


def objective(ps: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the sum of fourth powers around 1, with its gradients."""
    with torch.enable_grad():
        own = [p.detach().clone().requires_grad_() for p in ps]
        loss = torch.stack([((p - 1) ** 4).sum() for p in own]).sum()
        return float(loss.detach()), list(torch.autograd.grad(loss, own))


def evaluate(writer: Writer, *, continues: bool, **how: Any) -> Outcomes:
    """Push the objective at the session's parameters."""
    loss, gradients = objective(parameters(writer.session))
    return writer.push(gradients, evaluation=Evaluation(loss, continues), **how)


def step(writer: Writer) -> int:
    """Take a whole step and return its evaluations."""
    count, again = 0, True
    while again:
        name = writer.named()
        again = receipt(evaluate(writer, continues=count > 0), name).again
        count += 1
    return count


def twin_of(session: Session, **options: Any) -> tuple[list[Tensor], Callable[[], None]]:
    """Return parameters under torch's own optimizer, and a function that takes a step."""
    ps = [p.clone().requires_grad_() for p in parameters(session)]
    optimizer: Any = torch.optim.LBFGS(ps, **options)

    def closure() -> float:
        loss, gradients = objective(ps)
        for p, g in zip(ps, gradients, strict=True):
            p.grad = g
        return loss

    return ps, lambda: optimizer.step(closure)


def state(session: Session) -> dict[str, Any]:
    """Return the state as it travels."""
    contents, _ = session.copy((*FIELDS, PRESENT))
    return {name: contents.free[name].clone() for name in contents.free} | {"shapes": dict(contents.shapes)}


def same(here: dict[str, Any], there: dict[str, Any]) -> bool:
    """Return whether two states are equal bit for bit; NaN stands for what there never was."""
    return here["shapes"] == there["shapes"] and all(
        torch.equal(value.nan_to_num(12345.0), there[name].nan_to_num(12345.0))
        for name, value in here.items()
        if name != "shapes"
    )


def test_evaluations_lead_through_torchs_step() -> None:
    """Each push is a version; the last receipt of a step does not ask for another, and the bits are torch's."""
    session = lbfgs()
    (writer,) = begun(session)
    ps, their_step = twin_of(session, **WOLFE)
    evaluations = 0
    for _ in range(4):
        evaluations += step(writer)
        their_step()
        assert equal(parameters(session), [p.detach() for p in ps])
        assert session.version == evaluations


def test_a_push_without_a_loss_is_refused_and_elsewhere_one_with_a_loss() -> None:
    """What an optimizer does not ask for is not ignored; both are found before the body is read."""
    session, other = lbfgs(), new_session()
    (writer,), (elsewhere,) = begun(session), begun(other)
    with pytest.raises(InvalidRequest, match="needs the loss"):
        session.contribution(PushHead(writer.named(), "here", 0))
    with pytest.raises(InvalidRequest, match="does not ask for a loss"):
        other.contribution(PushHead(elsewhere.named(), "here", 0, evaluation=Evaluation(1.0)))
    with pytest.raises(InvalidRequest, match="'continues' goes with a 'loss'"):
        PushHead.from_header({**PushHead(writer.named(), "here", 0).to_header(), "continues": True})
    with pytest.raises(InvalidRequest, match="must be a number"):
        PushHead.from_header({**PushHead(writer.named(), "here", 0).to_header(), "loss": True})
    assert (session.version, other.version) == (0, 0)


def test_a_push_before_the_first_parameters_is_refused() -> None:
    """There is nothing to move yet."""
    session = lbfgs()
    writer = Writer.join(session)
    with pytest.raises(NotInitialised):
        writer.push(values(session, 1), evaluation=Evaluation(1.0))


def test_a_repeated_evaluation_gets_the_first_receipt() -> None:
    """A retry in the middle of a step changes nothing, and is told again that the step goes on."""
    session = lbfgs()
    (writer,) = begun(session)
    loss, gradients = objective(parameters(session))
    first = receipt(writer.push(gradients, evaluation=Evaluation(loss)), writer.named(2))
    assert first.again
    moved = parameters(session)
    outcomes = writer.push(gradients, evaluation=Evaluation(loss), sequence=2, base=0)
    assert outcomes[writer.named(2)].duplicate
    assert receipt(outcomes, writer.named(2)) == first
    assert equal(parameters(session), moved)
    assert Receipt.from_header(first.to_header()) == first


def test_an_evaluation_that_nobody_asked_for_is_refused() -> None:
    """Before any step, after a complete one, and at parameters that are not the present ones."""
    session = lbfgs()
    (writer,) = begun(session)
    with pytest.raises(StepDiscarded):
        evaluate(writer, continues=True)
    step(writer)
    with pytest.raises(StepDiscarded):
        evaluate(writer, continues=True)
    evaluate(writer, continues=False)
    with pytest.raises(StepDiscarded):
        evaluate(writer, continues=True, base=session.version - 1)
    assert receipt(evaluate(writer, continues=True), writer.named(writer.last)).version == session.version


def test_beginning_anew_gives_the_unfinished_step_up() -> None:
    """The state is that of the step before; the parameters are where they are."""
    session = lbfgs()
    (writer,) = begun(session)
    step(writer)
    before = state(session)
    evaluate(writer, continues=False)
    evaluate(writer, continues=True)
    assert same(state(session), before)
    at = parameters(session)
    fresh = lbfgs()
    (other,) = begun(fresh)
    shapes = before["shapes"]
    other.put(
        {"param": at, **{name: [before[name]] for name in shapes}, PRESENT: [mask_of_all(shapes), 0.0]}, shapes=shapes
    )
    step(writer)
    step(other)
    assert equal(parameters(session), parameters(fresh))
    assert same(state(session), state(fresh))


def mask_of_all(shapes: dict[str, Any]) -> float:
    return float(sum(1 << bit for bit, name in enumerate(FIELDS) if name in shapes))


def test_parameters_written_in_the_middle_of_a_step_leave_it_and_a_state_ends_it() -> None:
    """A closure may keep parameters in bounds; another state has nothing to do with the step that waits."""
    session = lbfgs(groups=({"lr": 0.1},))
    (writer,) = begun(session)
    evaluate(writer, continues=False)
    writer.put({"param": [each.clamp(-0.5, 0.5) for each in parameters(session)]})
    assert receipt(evaluate(writer, continues=True), writer.named(writer.last)).again
    writer.put({PRESENT: [0.0, 0.0]})
    with pytest.raises(StepDiscarded):
        evaluate(writer, continues=True)
    assert state(session)["shapes"] == {}


def test_what_is_said_of_other_parameters_does_not_touch_the_state() -> None:
    """The state is the first parameter's; contents without it leave it alone."""
    session = lbfgs()
    (writer,) = begun(session)
    step(writer)
    before = state(session)
    writer.put({"param": parameters(session)[1:], PRESENT: [0.0]}, segments=[1, 2])
    assert same(state(session), before)
    with pytest.raises(TensorMismatch, match="first parameter"):
        writer.put({"func_evals": [1.0], PRESENT: [1.0]}, segments=[1, 2], shapes={"func_evals": None})


def test_a_refused_evaluation_leaves_the_step_waiting_for_it() -> None:
    """NaN in the loss or in a gradient is refused as ever; the step goes on with a better one."""
    session = lbfgs()
    (writer,) = begun(session)
    ps, their_step = twin_of(session, **WOLFE)
    evaluate(writer, continues=False)
    loss, gradients = objective(parameters(session))
    with pytest.raises(NonFinite, match="loss"):
        writer.push(gradients, evaluation=Evaluation(float("nan"), True))
    with pytest.raises(NonFinite, match="gradient"):
        writer.push([each * float("inf") for each in gradients], evaluation=Evaluation(loss, True))
    name = writer.named()
    while receipt(evaluate(writer, continues=True), name).again:
        name = writer.named()
    their_step()
    assert equal(parameters(session), [p.detach() for p in ps])


def test_a_missing_gradient_is_zeros_and_a_sparse_one_is_made_dense() -> None:
    """Both count in the one vector, as in torch."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.ones(3, 4), (3, 4), check_invariants=True)
    results = []
    for gradients in ([sparse, None], [sparse.to_dense(), torch.zeros(5)]):
        session = lbfgs(groups=({"lr": 0.1},))
        (writer,) = begun(session)
        receipt(writer.push(gradients, evaluation=Evaluation(1.0)), writer.named(2))
        results.append(parameters(session))
    assert equal(*results)
    assert not equal(results[0], values(session, 0))


# -- several workers --------------------------------------------------------------------------------------------------


def test_workers_average_losses_in_the_order_of_their_names() -> None:
    """The step is torch's on the mean, whoever comes first, and everybody is told whether it goes on."""
    session = lbfgs(consistency=sync(2))
    one, two = begun(session, "a", "b")
    at = parameters(session)
    (loss, gradients), more = objective(at), [0.1, 0.7]
    alone = lbfgs()
    (single,) = begun(alone)
    single.push(gradients, evaluation=Evaluation(((loss + 0.1) + (loss + 0.7)) / 2))
    names = [one.named(), two.named()]
    assert two.push(gradients, evaluation=Evaluation(loss + more[1])) == {}
    outcomes = one.push(gradients, evaluation=Evaluation(loss + more[0]))
    assert [receipt(outcomes, name).again for name in names] == [True, True]
    assert equal(parameters(session), parameters(alone))


def test_where_one_worker_begins_all_begin() -> None:
    """A worker that lost its step and one that is in the middle of it meet at the barrier: a step begins for both."""
    session = lbfgs(consistency=sync(2))
    one, two = begun(session, "a", "b")
    for writer in (one, two):
        evaluate(writer, continues=False)
    one.last = session.position("a")[1]
    alone = lbfgs()
    (single,) = begun(alone)
    single.put({"param": parameters(session)})
    evaluate(single, continues=False)
    name = one.named()
    evaluate(one, continues=True)
    outcomes = evaluate(two, continues=False)
    assert receipt(outcomes, name).again
    assert equal(parameters(session), parameters(alone))


def test_a_state_that_is_written_while_a_worker_waits_lets_the_next_one_begin_for_both() -> None:
    """The step that the first one continues is gone; who comes next is told so, begins, and takes the first along."""
    session = lbfgs(consistency=sync(2))
    one, two = begun(session, "a", "b")
    for writer in (one, two):
        evaluate(writer, continues=False)
    one.last, two.last = session.position("a")[1], session.position("b")[1]
    name = one.named()
    evaluate(one, continues=True)
    two.put({PRESENT: [0.0, 0.0]})
    with pytest.raises(StepDiscarded):
        evaluate(two, continues=True)
    before = parameters(session)
    outcomes = evaluate(two, continues=False)
    assert receipt(outcomes, name).again
    assert not equal(parameters(session), before)


# -- bad state --------------------------------------------------------------------------------------------------------

N = 17


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"d": (N - 1,)}, TensorMismatch),
        ({"d": (N, 1)}, TensorMismatch),
        ({"d": None}, TensorMismatch),
        ({"old_dirs": (2, N), "old_stps": (3, N), "ro": (2,)}, TensorMismatch),
        ({"old_dirs": (2, N), "old_stps": (2, N), "ro": ()}, TensorMismatch),
        ({"old_dirs": (101, N), "old_stps": (101, N), "ro": (101,)}, LimitExceeded),
        ({"old_dirs": (2**40, N), "old_stps": (2**40, N), "ro": (2**40,)}, LimitExceeded),
        ({"al": (5, 5)}, TensorMismatch),
        ({"t": (1,)}, TensorMismatch),
        ({"n_iter": ()}, TensorMismatch),
        ({"prev_loss": (3,)}, TensorMismatch),
    ],
    ids=str,
)
def test_shapes_that_no_state_has_are_refused_before_memory_is_taken(
    shapes: dict[str, Any], kind: type[FarstepError]
) -> None:
    """SegmentCounters and lengths are checked against the session and each other by the header alone."""
    session = lbfgs()
    (writer,) = begun(session)
    contents: dict[str, Any] = {name: [] for name in shapes}
    with pytest.raises(kind):
        writer.put(contents, shapes=shapes)
    assert session.version == 0


@pytest.mark.parametrize(
    ("contents", "shapes", "said"),
    [
        ({PRESENT: [1.0, 0.0]}, {}, "not the one that came"),
        ({"func_evals": [3.0], PRESENT: [0.0, 0.0]}, {"func_evals": None}, "not the one that came"),
        ({"func_evals": [3.0]}, {"func_evals": None}, "not the one that came"),
        ({PRESENT: [0.0, 3.0]}, {}, "first parameter only"),
        ({"func_evals": [3.0], PRESENT: [1.0, 0.0]}, {"func_evals": None}, "no 'n_iter'"),
        ({"func_evals": [3.5], "n_iter": [0.0], PRESENT: [3.0, 0.0]}, {"func_evals": None, "n_iter": None}, "no count"),
        ({"func_evals": [3.0], "n_iter": [1.0], PRESENT: [3.0, 0.0]}, {"func_evals": None, "n_iter": None}, "no 'd'"),
        ({"func_evals": [3.0]}, {}, "shapes"),
        ({PRESENT: [0.0, 0.0]}, {"func_evals": None}, "shapes"),
    ],
    ids=str,
)
def test_a_state_that_is_incomplete_is_refused(contents: dict[str, Any], shapes: dict[str, Any], said: str) -> None:
    """Parts that belong together come together, and what is said to be present is what came; else nothing changes."""
    session = lbfgs()
    (writer,) = begun(session)
    step(writer)
    before, version = state(session), session.version
    with pytest.raises(TensorMismatch, match=said):
        writer.put(contents, shapes=shapes)
    assert same(state(session), before)
    assert session.version == version


def test_a_state_goes_out_and_in_unchanged() -> None:
    """What was copied from one session continues in another, bit for bit."""
    session, other = lbfgs(), lbfgs()
    (writer,), (elsewhere,) = begun(session), begun(other)
    for _ in range(3):
        step(writer)
    own = state(session)
    shapes = own.pop("shapes")
    assert shapes["old_dirs"] == (len(own["ro"]), N)
    contents = {**{name: [each] for name, each in own.items()}, PRESENT: [mask_of_all(shapes), 0.0]}
    elsewhere.put({"param": parameters(session)})
    elsewhere.put(contents, shapes=shapes)
    assert same(state(other), state(session))
    for _ in range(2):
        step(writer)
        step(elsewhere)
    assert equal(parameters(session), parameters(other))
    assert session.nbytes()["state"] > len(own["ro"]) * N * 8
