"""farstep.optim.LBFGS beside torch.optim.LBFGS: steps of many evaluations, embedded and through a real server."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  # what others do with an optimizer
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, SessionLost, StepDiscarded, TensorMismatch, Unavailable
from farstep.settings import RemoteOptions
from tests.client.twins import check_equal
from tests.faults import Network, faulty
from tests.optimizers.objectives import (
    Objective,
    cliff,
    network,
    quadratic,
    ripples,
    rosenbrock,
    spiral,
)
from tests.service.servers import RunningServer

STEPS = 20
WOLFE: dict[str, Any] = {"line_search_fn": "strong_wolfe"}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "history_size": 3, "max_iter": 6},
    WOLFE,
    {**WOLFE, "lr": 0.3, "history_size": 2, "max_iter": 9, "max_eval": 7},
    {**WOLFE, "tolerance_grad": 1e-2, "tolerance_change": 1e-4},
    {"max_iter": 1, "max_eval": 1},
]

Make = Callable[[torch.dtype], Objective]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, as the server does: how a product is cut decides how it is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(objective: Objective, **options: Any) -> farstep.optim.LBFGS:
    return farstep.optim.LBFGS(objective.parameters, **options)


def theirs(objective: Objective, **options: Any) -> Any:
    return torch.optim.LBFGS(objective.parameters, **options)


def check(here: Objective, there: Objective, mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare parameters, evaluations and state_dicts."""
    assert here.evaluations == there.evaluations
    check_equal([p.detach() for p in here.parameters], [p.detach() for p in there.parameters])
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for index, own in other["state"].items():
        assert mine["state"][index].keys() == own.keys()
        for key, value in own.items():
            check_entry(mine["state"][index][key], value)


def check_entry(here: Any, there: Any) -> None:
    """Compare an entry of a state: its kind and its bits."""
    if isinstance(there, list):
        assert type(here) is list
        assert len(here) == len(there)
        for mine, other in zip(here, there, strict=True):
            check_entry(mine, other)
    elif isinstance(there, Tensor):
        check_equal([here], [there])
    else:
        assert type(here) is type(there) or {type(here), type(there)} == {int, float}
        assert here == there or (here != here and there != there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda each: "-".join(each) or "defaults")
@pytest.mark.parametrize("make", [quadratic, network, ripples, spiral], ids=lambda each: each.__name__)
def test_twenty_steps_equal_torch_bit_for_bit(
    make: Make, options: dict[str, Any], dtype: torch.dtype, place: RemoteOptions
) -> None:
    """Losses, parameters, evaluations and state_dict are torch's, with each option, in float32 and float64."""
    here, there = make(dtype), make(dtype)
    mine, other = ours(here, **options, nonfinite="allow", **place), theirs(there, **options)
    for _ in range(STEPS):
        torch.testing.assert_close(mine.step(here.closure), other.step(there.closure), rtol=0, atol=0, equal_nan=True)
    check(here, there, mine.state_dict(), other.state_dict())
    assert mine.version == here.evaluations
    mine.close()


def test_the_state_is_torchs_after_each_step(place: RemoteOptions) -> None:
    """Before the first direction, with an empty history and with a full one the state has torch's keys and kinds."""
    here, there = rosenbrock(torch.float64), rosenbrock(torch.float64)
    options = {**WOLFE, "max_iter": 1, "history_size": 3}
    mine, other = ours(here, **options, **place), theirs(there, **options)
    for _ in range(8):
        mine.step(here.closure)
        other.step(there.closure)
        check(here, there, mine.state_dict(), other.state_dict())


def test_a_step_without_a_gradient_only_counts(place: RemoteOptions) -> None:
    """Missing gradients are zeros, which are optimal: the closure is called once and nothing moves, as in torch."""
    here, there = cliff(torch.float32), cliff(torch.float32)
    mine, other = ours(here, **place), theirs(there)
    before = here.parameters[0].detach().clone()
    for optimizer in (mine, other):
        assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert torch.equal(here.parameters[0], before)
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_closure_that_keeps_parameters_in_bounds_works_as_in_torch(place: RemoteOptions) -> None:
    """Edits inside the closure, as style transfer makes them, are part of the step; the step goes on."""
    sides = []
    for make in (lambda p: ours(p, lr=0.5, **place), lambda p: theirs(p, lr=0.5)):
        objective = quadratic(torch.float64)

        def closure(objective: Objective = objective) -> Tensor:
            with torch.no_grad():
                for p in objective.parameters:
                    p.clamp_(-0.8, 0.8)
            return objective.closure()

        optimizer = make(objective)
        for _ in range(3):
            optimizer.step(closure)
        sides.append((objective, optimizer.state_dict()))
    check(sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def test_sparse_gradients_are_made_dense(place: RemoteOptions) -> None:
    """An embedding with sparse gradients trains as in torch."""
    sides = []
    kinds: list[Any] = [partial(farstep.optim.LBFGS, **WOLFE, **place), partial(torch.optim.LBFGS, **WOLFE)]
    for kind in kinds:
        table = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()

        def closure(table: Tensor = table) -> Tensor:
            table.grad = None
            loss = (torch.nn.functional.embedding(torch.tensor([0, 2, 2]), table, sparse=True) - 0.3).pow(2).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer = kind([table])
        for _ in range(3):
            optimizer.step(closure)
        sides.append(table.detach())
    check_equal([sides[0]], [sides[1]])


def test_options_edited_between_steps_hold_from_the_next_one(place: RemoteOptions) -> None:
    """A schedule of the rate and of the number of iterations is followed as by torch."""
    here, there = network(torch.float32), network(torch.float32)
    mine, other = ours(here, lr=0.5, **place), theirs(there, lr=0.5)
    for step in range(6):
        for optimizer in (mine, other):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            optimizer.param_groups[0]["max_iter"] = 3 + step
        mine.step(here.closure)
        other.step(there.closure)
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_rate_in_a_tensor_counts_as_its_value(place: RemoteOptions) -> None:
    """A tensor `lr` is followed as in torch, if it is another one for each step, and stays a tensor in the groups."""
    here, there = network(torch.float64), network(torch.float64)
    mine, other = ours(here, lr=torch.tensor([0.5]), **place), theirs(there, lr=torch.tensor([0.5]))
    for optimizer, objective in ((mine, here), (other, there)):
        for rate in (0.5, 0.25, 0.1):
            optimizer.param_groups[0]["lr"] = torch.tensor([rate])
            optimizer.step(objective.closure)
    check_equal([p.detach() for p in here.parameters], [p.detach() for p in there.parameters])
    assert torch.equal(mine.param_groups[0]["lr"], other.param_groups[0]["lr"])


# -- errors -----------------------------------------------------------------------------------------------------------


def test_torchs_errors_are_raised(place: RemoteOptions) -> None:
    """Type and words of torch's own: in the constructor, for a missing closure, and for several groups."""
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    wrong: list[dict[str, Any]] = [{"lr": -1.0}, {"lr": torch.ones(2)}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"earning rate|1-element") as expected:
            torch.optim.LBFGS([p], **options)
        with pytest.raises(ValueError, match=r"earning rate|1-element") as found:
            farstep.optim.LBFGS([p], **options, **place)
        assert str(found.value) == str(expected.value)
    groups = [{"params": [p]}, {"params": [q]}]
    with pytest.raises(ValueError, match="doesn't support per-parameter options"):
        farstep.optim.LBFGS(groups, **place)
    optimizer = farstep.optim.LBFGS([p], **place)
    with pytest.raises(TypeError, match=r"step\(\) missing 1 required positional argument: 'closure'"):
        optimizer.step()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="doesn't support per-parameter options"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_several_dtypes_and_a_fused_kernel_are_refused(place: RemoteOptions) -> None:
    """One vector has one dtype, and no kernel of one pass computes a direction; both are said at construction."""
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TensorMismatch, match="float32 and float64"):
        farstep.optim.LBFGS([p, q], **place)
    with pytest.raises(InvalidOption, match="no fused kernel"):
        farstep.optim.LBFGS([p], **cast(RemoteOptions, {**place, "kernel": "fused"}))


def test_an_unknown_line_search_is_refused_in_the_step(place: RemoteOptions) -> None:
    """As in torch the constructor takes it and the step raises a RuntimeError with torch's words."""
    objective = cliff(torch.float32)
    optimizer = ours(objective, line_search_fn="weak", **place)
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optimizer.step(objective.closure)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closure_that_raises_leaves_an_optimizer_that_works(search: str | None, place: RemoteOptions) -> None:
    """The error comes through; the next step begins where the parameters are, with the state of the step before."""
    objective = network(torch.float64)
    optimizer = ours(objective, line_search_fn=search, **place)
    optimizer.step(objective.closure)
    left = copy.deepcopy(optimizer.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("in the middle")
        return objective.closure()

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    check_state(optimizer.state_dict(), left)
    there = Objective([p.detach().clone().requires_grad_() for p in objective.parameters], lambda: torch.zeros(()))
    twin_loss = network(torch.float64)
    with torch.no_grad():
        for p, q in zip(twin_loss.parameters, there.parameters, strict=True):
            p.copy_(q)
    twin = theirs(twin_loss, line_search_fn=search)
    twin.load_state_dict(left)
    optimizer.step(objective.closure)
    twin.step(twin_loss.closure)
    check_equal([p.detach() for p in objective.parameters], [p.detach() for p in twin_loss.parameters])


def check_state(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Compare the state of two state_dicts."""
    assert here["state"].keys() == there["state"].keys()
    for index, own in there["state"].items():
        for key, value in own.items():
            check_entry(here["state"][index][key], value)


# -- state ------------------------------------------------------------------------------------------------------------


def copied(objective: Objective, make: Make) -> Objective:
    """Return the same objective at the same parameters."""
    other = make(objective.parameters[0].dtype)
    with torch.no_grad():
        for p, q in zip(other.parameters, objective.parameters, strict=True):
            p.copy_(q)
    return other


@pytest.mark.parametrize("options", [{"lr": 0.3}, WOLFE], ids=["fixed", "wolfe"])
def test_going_remote_and_coming_home_changes_no_bit(options: dict[str, Any], place: RemoteOptions) -> None:
    """torch, then remote(), then to_local(): each continues as torch alone would have."""
    alone, moved = network(torch.float32), network(torch.float32)
    reference, optimizer = theirs(alone, **options), theirs(moved, **options)
    for stage in range(3):
        for _ in range(3):
            reference.step(alone.closure)
            optimizer.step(moved.closure)
        if stage == 0:
            optimizer = farstep.remote(optimizer, **place)
        elif stage == 1:
            optimizer = optimizer.to_local()
    check(moved, alone, optimizer.state_dict(), reference.state_dict())
    assert type(optimizer) is torch.optim.LBFGS


@pytest.mark.parametrize("options", [{"lr": 0.3}, WOLFE], ids=["fixed", "wolfe"])
def test_state_dicts_go_both_ways(options: dict[str, Any], place: RemoteOptions) -> None:
    """A state_dict of either side continues on the other as if nothing had happened; a cold start does not."""
    here = network(torch.float64)
    mine = ours(here, **options, **place)
    for _ in range(3):
        mine.step(here.closure)
    there, cold = copied(here, network), copied(here, network)
    other, fresh = theirs(there, **options), theirs(cold, **options)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    again_at = copied(here, network)
    again = ours(again_at, **options, **place)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    for _ in range(3):
        for optimizer, objective in ((mine, here), (other, there), (again, again_at), (fresh, cold)):
            optimizer.step(objective.closure)
    for objective in (there, again_at):
        check_equal([p.detach() for p in objective.parameters], [p.detach() for p in here.parameters])
    check_state(again.state_dict(), other.state_dict())
    assert not all(torch.equal(p, q) for p, q in zip(cold.parameters, here.parameters, strict=True))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_by_itself(how: Callable[[Any], Any], place: RemoteOptions) -> None:
    """A copy has the state of the original at that moment, and its own session."""
    objective = rosenbrock(torch.float64)
    optimizer = ours(objective, **WOLFE, max_iter=4, **place)
    optimizer.step(objective.closure)
    copied_optimizer, (p,) = how((optimizer, objective.parameters))
    other = rosenbrock(torch.float64)
    twin = Objective([p], lambda: (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum())
    assert copied_optimizer.session != optimizer.session
    for _ in range(3):
        optimizer.step(objective.closure)
        copied_optimizer.step(twin.closure)
    check_equal([p.detach()], [objective.parameters[0].detach()])
    check_state(copied_optimizer.state_dict(), optimizer.state_dict())
    assert other.evaluations == 0


def test_edits_of_the_state_act_on_the_next_step(place: RemoteOptions) -> None:
    """A vector edited in place, an entry of a list replaced, and a cleared state are what torch makes of them."""

    def edit_vector(state: Any) -> None:
        state["d"].mul_(0.5)

    def edit_list(state: Any) -> None:
        state["old_dirs"][-1] = state["old_dirs"][-1] * 1.5

    def clear(state: Any) -> None:
        state.clear()

    for edit in (edit_vector, edit_list, clear):
        here, there = network(torch.float64), network(torch.float64)
        mine, other = ours(here, lr=0.3, max_iter=5, **place), theirs(there, lr=0.3, max_iter=5)
        for step in range(4):
            if step == 2:
                edit(mine.state[here.parameters[0]])
                edit(other.state[there.parameters[0]])
            mine.step(here.closure)
            other.step(there.closure)
        check(here, there, mine.state_dict(), other.state_dict())


def test_reading_the_state_between_steps_changes_nothing(place: RemoteOptions) -> None:
    """Only the first parameter has state, and looking at it sends nothing."""
    here = network(torch.float32)
    optimizer = ours(here, **place)
    optimizer.step(here.closure)
    version = optimizer.version
    assert list(optimizer.state) == [here.parameters[0]]
    assert optimizer.state[here.parameters[0]]["n_iter"] > 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.version == version


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda own: own.update(d=own["d"][:-1]), "d"),
        (lambda own: own.update(old_dirs=own["old_dirs"][:-1]), "old_dirs"),
        (lambda own: own.pop("prev_loss"), "prev_loss"),
        (lambda own: own.pop("n_iter"), "n_iter"),
        (lambda own: own.update(n_iter=-3), "n_iter"),
        (lambda own: own.update(ro=[torch.zeros(()), torch.zeros(2)]), "ro"),
        (lambda own: own.update(t=torch.zeros(2)), "t"),
    ],
    ids=["short vector", "short history", "no loss", "no counter", "negative counter", "ragged list", "long step"],
)
def test_a_state_that_no_session_can_have_is_refused(
    edit: Callable[[dict[str, Any]], Any], said: str, place: RemoteOptions
) -> None:
    """Wrong counts, lengths and numbers are refused by name, and the next step is as if nothing had been tried."""
    here, there = network(torch.float32), network(torch.float32)
    mine, other = ours(here, **place), theirs(there)
    for optimizer, objective in ((mine, here), (other, there)):
        optimizer.step(objective.closure)
    bad = copy.deepcopy(mine.state_dict())
    edit(bad["state"][0])
    with pytest.raises((ValueError, TensorMismatch), match=said):
        mine.load_state_dict(bad)
    for optimizer, objective in ((mine, here), (other, there)):
        optimizer.step(objective.closure)
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_state_on_another_parameter_is_refused(place: RemoteOptions) -> None:
    """The state is the first parameter's; on another one it would be lost."""
    here = network(torch.float32)
    mine = ours(here, **place)
    mine.step(here.closure)
    moved = copy.deepcopy(mine.state_dict())
    moved["state"] = {1: moved["state"][0]}
    with pytest.raises(ValueError, match="the first one's holds it"):
        mine.load_state_dict(moved)
    assert list(mine.state_dict()["state"]) == [0]


# -- exactly once, and several workers --------------------------------------------------------------------------------


@pytest.fixture
def network_to(server: RunningServer) -> Iterator[Network]:
    """Put a network that fails between the client and the server."""
    with faulty(server.port) as between:
        yield between


@pytest.mark.parametrize("options", [{"lr": 0.3}, WOLFE], ids=["fixed", "wolfe"])
@pytest.mark.parametrize("fault", ["request", "response"])
def test_every_evaluation_counts_once_however_often_it_is_sent(
    fault: str, options: dict[str, Any], network_to: Network
) -> None:
    """Requests and answers that are cut in the middle of steps are repeated, and the bits are torch's."""
    here, there = cliff(torch.float64), cliff(torch.float64)
    mine, other = ours(here, **options, max_iter=6, server=network_to.url), theirs(there, **options, max_iter=6)

    def closure() -> Tensor:
        if here.evaluations % 3 == 1:
            if fault == "request":
                network_to.cut_request(after=200)
            else:
                network_to.cut_response(after=60)
        return here.closure()

    for _ in range(4):
        mine.step(closure)
        other.step(there.closure)
    assert network_to.faults_left == 0
    assert mine.version == here.evaluations
    check(here, there, mine.state_dict(), other.state_dict())


def test_a_step_that_was_given_up_for_want_of_an_answer_can_be_followed_by_another(network_to: Network) -> None:
    """When the server is away in the middle of a step, the step fails; the next one begins anew and works."""
    objective = rosenbrock(torch.float64)
    optimizer = ours(objective, **WOLFE, server=network_to.url, timeout_s=0.3)
    optimizer.step(objective.closure)
    counted = objective.evaluations

    def closure() -> Tensor:
        if objective.evaluations == counted + 2:
            network_to.cut_response(after=10, then_down=True)
        return objective.closure()

    with pytest.raises(Unavailable):
        optimizer.step(closure)
    network_to.down = False
    before = float(objective.loss().detach())
    optimizer.step(objective.closure)
    assert optimizer.last_step is not None
    assert not optimizer.last_step.again
    assert float(objective.loss().detach()) <= before


def test_a_session_that_was_removed_is_created_anew_from_a_state_dict(
    server: RunningServer, talk: Conversation
) -> None:
    """`rejoin` continues bit for bit from what was saved, at the version that was held."""
    here, there = network(torch.float64), network(torch.float64)
    mine, other = ours(here, **WOLFE, server=server.url), theirs(there, **WOLFE)
    for _ in range(3):
        mine.step(here.closure)
        other.step(there.closure)
    saved, version = copy.deepcopy(mine.state_dict()), mine.version
    talk.control("DELETE", f"/v1/sessions/{mine.session}")
    with pytest.raises(SessionLost):
        mine.step(here.closure)
    assert mine.rejoin(saved)
    assert mine.version == version
    for _ in range(2):
        mine.step(here.closure)
        other.step(there.closure)
    check_equal([p.detach() for p in here.parameters], [p.detach() for p in there.parameters])
    check_state(mine.state_dict(), other.state_dict())


def halves(dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    """Return two objectives of one parameter; their mean is the whole."""
    first, second = torch.tensor([1.0, -2.0, 0.5], dtype=dtype), torch.tensor([0.3, 4.0, -1.0], dtype=dtype)
    return [lambda p: ((p - first) ** 4).sum() + (p * second).sum(), lambda p: (torch.exp(p) * second**2).sum()]


def test_two_workers_step_along_the_mean_of_their_objectives(server: RunningServer) -> None:
    """Sync: gradients and losses are averaged at each evaluation; both workers have what torch has for the mean."""
    name = "lbfgs-two-workers"
    objectives = halves(torch.float64)

    def train(worker: int) -> tuple[Tensor, int]:
        p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        one = Objective([p], lambda: objectives[worker](p))
        options: RemoteOptions = {
            "server": server.url,
            "session": name,
            "worker": f"w{worker}",
            "consistency": farstep.Sync(workers=2, deadline_s=60.0),
        }
        optimizer = farstep.optim.LBFGS([p], **WOLFE, max_iter=5, **options)
        for _ in range(3):
            optimizer.step(one.closure)
        return p.detach(), one.evaluations

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train, (0, 1)))

    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    calls = 0

    def mean() -> float:
        nonlocal calls
        calls += 1
        losses: list[float] = []
        gradients: list[Any] = []
        for each in objectives:
            p.grad = None
            loss = each(p)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            gradients.append(p.grad)
        p.grad = (gradients[0] + gradients[1]) / 2
        return (losses[0] + losses[1]) / 2

    alone: Any = torch.optim.LBFGS([p], **WOLFE, max_iter=5)
    for _ in range(3):
        with torch.enable_grad():
            alone.step(mean)
    for parameter, evaluations in results:
        assert torch.equal(parameter, p.detach())
        assert evaluations == calls


def test_another_worker_who_begins_a_step_ends_the_unfinished_one(server: RunningServer) -> None:
    """In an async session a step belongs to whoever began last; the other one is told, and may begin again."""
    first, second = rosenbrock(torch.float64), rosenbrock(torch.float64)
    place: RemoteOptions = {"server": server.url, "session": "lbfgs-async"}
    one = ours(first, **WOLFE, worker="one", **place)
    two = ours(second, **WOLFE, worker="two", **place)
    calls = 0

    def interrupted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            two.step(second.closure)
        return first.closure()

    with pytest.raises(StepDiscarded, match="given up"):
        one.step(interrupted)
    one.pull()
    assert torch.equal(first.parameters[0], second.parameters[0])
    before = float(first.loss().detach())
    one.step(first.closure)
    assert float(first.loss().detach()) < before
