"""`add_param_group` after the session was opened, with torch's numbers."""

from __future__ import annotations

import pickle  # noqa: TID251  # what others do with an optimizer
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import FarstepError, InvalidOption
from farstep.link import Parameter
from farstep.optim import Adagrad
from farstep.settings import RemoteOptions
from tests.support.client.growing import LATE, add, named
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, check_equal, check_parameters, drawn, parameters, start_of
from tests.support.service.servers import RunningServer


@pytest.fixture(params=["embedded", "private", "named"])
def anywhere(request: pytest.FixtureRequest) -> RemoteOptions:
    """Name a place: in this process, in a private session on a server, or in one that others may join."""
    if request.param == "embedded":
        return {"kernel": "reference"}
    running: RunningServer = request.getfixturevalue("server")
    private: RemoteOptions = {"kernel": "reference", "server": running.url}
    return private if request.param == "private" else named(running)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_added_at_any_time(name: str, steps: int, anywhere: RemoteOptions) -> None:
    """Before or after steps, with options of its own; state, edits of it, hooks and the session stay."""
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
    edited = "momentum_buffer" if name in ("SGD", "Muon") else "step"
    twins = Twins(name, options, anywhere, start=start_of(name)[:4])
    calls: list[int] = []
    twins.ours.register_step_post_hook(lambda *_: calls.append(1))
    twins.train(steps)
    session = twins.ours.session
    for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
        each.param_groups[0]["lr"] = 0.2
        for p in ps if steps else ():
            each.state[p][edited] += 1
    add(twins, start_of(name)[4:], **LATE, note="late")
    assert (twins.ours.version, twins.ours.session) == (steps + 1, session)
    if name != "Adagrad":  # whose late parameters have state at once; torch's get it with their first step
        twins.check()
    twins.train(2, first=3)
    twins.check()
    assert len(calls) == steps + 2


@pytest.mark.parametrize("name", ["Adagrad", "SGD", "Adam"])
def test_several_groups_with_names_and_options(name: str, anywhere: RemoteOptions) -> None:
    """Group after group, each with options and parameter names of its own, steps in between."""
    start = drawn(0)[:2]
    twins = Twins(
        name, {"lr": 0.1}, anywhere, start=start, grouping=lambda ps: [{"params": [*zip("ab", ps, strict=True)]}]
    )
    options: list[dict[str, Any]] = [{"lr": 0.2}, {"weight_decay": 0.3, "maximize": True}, {}]
    for number, own in enumerate(options):
        twins.train(2, first=10 * number)
        for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
            late = parameters(drawn(number, [(3, number + 2), ()]))
            each.add_param_group({"params": [(f"late{number}.{i}", p) for i, p in enumerate(late)], **own})
            ps += late
    twins.train(2, first=40)
    twins.ours.param_groups[1]["lr"] = twins.theirs.param_groups[1]["lr"] = 0.05
    twins.train(2, first=50)
    twins.check()


def test_dtypes_and_missing_gradients(anywhere: RemoteOptions) -> None:
    """Late parameters of other dtypes, complex among them, some without a gradient at first; a group without any."""
    start = drawn(0, [(3,), (2, 2)])
    twins = Twins("Adadelta", {"lr": 0.1}, anywhere, start=start)
    twins.train(1)
    late = [drawn(3, [(5,)], dtype)[0] for dtype in (torch.complex64, torch.float64, torch.complex128)]
    add(twins, late, lr=0.5)
    add(twins, [])
    add(twins, drawn(4, [(3,)]))
    for seed in range(2, 6):
        gradients: list[Tensor | None] = [drawn(seed, [p.shape], p.dtype)[0] for p in twins.here]
        if seed < 4:
            gradients[seed] = gradients[5] = None
        twins.step(gradients)
    twins.check()


def test_what_was_read_and_edited_stays(anywhere: RemoteOptions) -> None:
    """State that was read is not read again; edits of state and parameters made before are sent with the next step."""
    twins = Twins("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}, anywhere)
    twins.train(1)
    read = twins.ours.state[twins.here[0]]["sum"]
    with torch.no_grad():
        for each, ps in ((twins.ours, twins.here), (twins.theirs, twins.there)):
            each.state[ps[1]]["sum"].mul_(2)
            each.state[ps[1]]["mine"] = "kept"
            ps[2].add_(1)
    add(twins, drawn(6)[:2], **LATE, initial_accumulator_value=9.0)
    assert twins.ours.state[twins.here[0]]["sum"] is read
    assert twins.ours.state[twins.here[1]]["mine"] == "kept"
    late = twins.here[-1]
    check_equal([twins.ours.state[late]["sum"]], [torch.full_like(late, 0.5)])  # the constructor's, as in torch
    twins.train(2, first=2)
    check_parameters(twins.here, twins.there)


def test_copies_of_an_optimizer_that_grew(anywhere: RemoteOptions) -> None:
    """Deep copies, pickles, a move back to torch, and saved state have the late group like any other."""
    twins = Twins("Adam", {"lr": 0.1}, anywhere, start=drawn(0)[:2])
    twins.train(1)
    add(twins, drawn(5)[2:], **LATE)
    twins.train(1, first=2)
    state = deepcopy(twins.ours.state_dict())
    copies = [deepcopy(twins.ours), pickle.loads(pickle.dumps(twins.ours)), twins.ours.to_local()]
    twins.train(1, first=3)
    for copied in copies[:2]:
        for p, q in zip((p for group in copied.param_groups for p in group["params"]), twins.here, strict=True):
            p.grad = q.grad
        copied.step()
        check_parameters([p for group in copied.param_groups for p in group["params"]], twins.there)
    twins.ours.load_state_dict(state)
    twins.theirs.load_state_dict(state)
    twins.train(1, first=4)
    twins.check()


def test_a_group_that_is_refused_changes_nothing(anywhere: RemoteOptions) -> None:
    """A parameter that is in a group already, options and dtypes that cannot be: an error, and training goes on."""
    twins = Twins("Adagrad", {"lr": 0.1}, anywhere)
    twins.train(1)
    (fresh,) = parameters(drawn(1, [(3,)]))
    strange = torch.ones(3).to(torch.float8_e5m2).requires_grad_()
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        twins.ours.add_param_group({"params": [twins.here[0]]})
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        twins.ours.add_param_group({"params": [fresh], "lr": -1})
    with pytest.raises(FarstepError, match="float8"):
        twins.ours.add_param_group({"params": [strange]})
    with pytest.raises(FarstepError, match="finite"):
        twins.ours.add_param_group({"params": [fresh], "eps": float("inf")})
    assert len(twins.ours.param_groups) == 1
    assert twins.ours.version == 1
    twins.train(2, first=2)
    add(twins, drawn(1, [(3,)]), **LATE)
    twins.train(1, first=4)
    twins.check()


def test_names_are_unique(anywhere: RemoteOptions) -> None:
    """Parameters of two models may have the same names, as in torch; the session tells them apart by a number."""
    ends = []
    for kind, place in ((Adagrad, dict(anywhere)), (torch.optim.Adagrad, {"foreach": False})):
        first, late = parameters(drawn(0))[:3], parameters(drawn(1))[:1]
        optimizer: Any = kind([("a", first[0]), ("b", first[1]), ("b", first[2])], **place)
        for p in first:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.add_param_group({"params": [("b", late[0])]})
        for p in [*first, *late]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        ends.append([*first, *late])
        assert [group["param_names"] for group in optimizer.param_groups] == [["a", "b", "b"], ["b"]]
    check_parameters(*ends)


def test_an_embedded_session_stays_on_one_device() -> None:
    """A late parameter on another device is refused, as in the constructor."""
    optimizer = Adagrad(parameters(drawn(0)))
    late = torch.ones(3, device="meta", requires_grad=True)  # stands for any device
    with pytest.raises(InvalidOption, match="cpu and meta"):
        optimizer._membership.link.append({}, [Parameter("late", (3,), "float32", 1)], [late])
    optimizer.step()
    assert len(optimizer.param_groups) == 1
