"""A session that went back to an older version: what a worker is told, and how it goes on.

Here the refusals are a stand-in's, in front of a real server: `tests/robustness` kills servers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farstep
from farstep.errors import (
    FarstepError,
    Fenced,
    InvalidOption,
    SequenceGap,
    SessionLost,
    StateRolledBack,
    UnknownSession,
)
from farstep.optim import LBFGS, SGD
from farstep.settings import RemoteOptions, resolve
from tests.support.client.hostile import Liar, hostile
from tests.support.client.refusing import Refusing
from tests.support.service.servers import RunningServer


def back() -> StateRolledBack:
    """Return what a server answers to a life of the session that was before its rollback."""
    return StateRolledBack("Session 'digits' went back to version 1.", field="incarnation", version=1)


@pytest.fixture
def standin() -> Refusing:
    return Refusing()


@pytest.fixture
def liar(server: RunningServer) -> Iterator[Liar]:
    with hostile(server.port) as between:
        yield between


def stepped(server: str, steps: int = 2, **options: Any) -> SGD:
    """Return an optimizer whose parameter begins at 8, after steps of 1."""
    parameter = torch.nn.Parameter(torch.full((4,), 8.0))
    optimizer = SGD([parameter], lr=1.0, server=server, **options)
    for _ in range(steps):
        step(optimizer)
    return optimizer


def step(optimizer: SGD) -> None:
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones(4)
    optimizer.step()


def values(optimizer: SGD) -> list[float]:
    found: list[float] = optimizer.param_groups[0]["params"][0].tolist()
    return found


CALLS: dict[str, tuple[str, str, Callable[[SGD], object]]] = {
    "step": ("POST", "/push", step),
    "pull": ("GET", "/contents", SGD.pull),
    "heartbeat": ("PUT", "/lease", SGD.heartbeat),
}


# -- what a server says


@pytest.mark.promise("A rollback is announced: the next call raises `StateRolledBack`.", area="client errors")
@pytest.mark.parametrize("name", ["step", "heartbeat"])
def test_a_rollback_is_raised_in_the_workers_words(name: str, server: RunningServer, standin: Refusing) -> None:
    """The error has the version seen, that of the session now, and the remedy; the parameters are as they were."""
    method, path, call = CALLS[name]
    optimizer = stepped(server.url, session=f"back-{name}", worker="w0", transport=standin)
    standin.refuse(method, path, back())
    with pytest.raises(
        StateRolledBack, match=rf"'back-{name}'.*went back to version 1.*'w0' had seen version 2"
    ) as told:
        call(optimizer)
    assert (told.value.side, told.value.extra) == ("client", {"version": 1, "seen": 2})
    assert "rejoin()" in told.value.remedy
    assert values(optimizer) == [6.0] * 4
    assert optimizer.rejoin() is False
    step(optimizer)
    assert (optimizer.version, values(optimizer)) == (3, [5.0] * 4)
    optimizer.close()


def test_every_write_tells_of_a_rollback(server: RunningServer, standin: Refusing) -> None:
    """Edited parameters, a loaded state and a new param group are refused in the same words."""
    optimizer = stepped(server.url, session="back-writes", momentum=0.5, transport=standin)
    state = optimizer.state_dict()
    standin.refuse("POST", "/groups", back())
    with pytest.raises(StateRolledBack, match="had seen version 2"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    standin.refuse("PUT", "/contents", back(), back())
    state["state"][0]["momentum_buffer"].add_(1)
    with pytest.raises(StateRolledBack, match="had seen version 2"):
        optimizer.load_state_dict(state)
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].add_(1)
    with pytest.raises(StateRolledBack, match="had seen version 2"):
        step(optimizer)
    assert len(standin.refused) == 3
    optimizer.close()


def test_a_read_of_another_life_asks_which_it_is(server: RunningServer, liar: Liar, standin: Refusing) -> None:
    """A pull that is answered by another life of the session finds out whether that was rolled back or created anew."""

    def reborn(header: dict[str, Any]) -> None:
        header["incarnation"] = "f" * 32

    optimizer = stepped(liar.url, session="reborn", transport=standin)
    liar.change("GET", "/contents", reborn)
    standin.refuse("PUT", "/lease", back())
    with pytest.raises(StateRolledBack, match=r"went back to version 1, and worker .* had seen version 2"):
        optimizer.pull()
    errors: list[FarstepError] = [SessionLost("It is another one."), UnknownSession("There is none.")]
    for error in errors:
        standin.refuse("PUT", "/lease", error)
        with pytest.raises(SessionLost, match="was created anew"):
            optimizer.pull()
    assert values(optimizer) == [6.0] * 4
    liar.honest()
    assert optimizer.pull() == 2
    optimizer.close()


# -- accepted


@pytest.mark.promise('With `on_rollback="accept"` a worker goes on from what the session has.', area="client errors")
def test_an_accepted_rollback_goes_on_from_the_session(server: RunningServer, standin: Refusing) -> None:
    """The step drops its gradient, takes the session's parameters, and says so; the next one counts."""
    session = "accepted"
    optimizer = stepped(server.url, session=session, worker="w0", transport=standin, on_rollback="accept")
    other = stepped(server.url, session=session, worker="w1")
    assert (other.version, values(other)) == (4, [4.0] * 4)
    standin.refuse("POST", "/push", back())
    step(optimizer)
    report = optimizer.last_step
    assert report is not None
    assert (report.applied, report.reason, report.version, report.durability) == (False, "rolled_back", 4, "none")
    assert "had seen version 2" in report.detail
    assert (optimizer.version, values(optimizer)) == (4, [4.0] * 4)
    step(optimizer)
    assert optimizer.last_step is not None
    assert (optimizer.last_step.applied, optimizer.version, values(optimizer)) == (True, 5, [3.0] * 4)
    optimizer.close()
    other.close()


@pytest.mark.parametrize("name", ["pull", "heartbeat"])
def test_an_accepted_rollback_is_found_by_every_call(name: str, server: RunningServer, standin: Refusing) -> None:
    """A pull and a heartbeat join again, too, and bring the session's parameters."""
    session = f"accepted-{name}"
    optimizer = stepped(server.url, session=session, worker="w0", transport=standin, on_rollback="accept")
    other = stepped(server.url, session=session, worker="w1")
    if name == "pull":
        standin.refuse("GET", "/contents", back())
        assert optimizer.pull() == 4
    else:
        standin.refuse("PUT", "/lease", back())
        assert optimizer.heartbeat().version == 4
    assert optimizer.last_step is not None
    assert (optimizer.last_step.reason, optimizer.version, values(optimizer)) == ("rolled_back", 4, [4.0] * 4)
    optimizer.close()
    other.close()


def test_changed_options_are_sent_again_after_an_accepted_rollback(server: RunningServer, standin: Refusing) -> None:
    """What a scheduler has set is what the next step is taken with, although the session may have forgotten it."""
    optimizer = stepped(server.url, session="scheduled", transport=standin, on_rollback="accept")
    optimizer.param_groups[0]["lr"] = 2.0
    standin.refuse("POST", "/push", back())
    step(optimizer)
    assert values(optimizer) == [6.0] * 4
    step(optimizer)
    assert values(optimizer) == [4.0] * 4
    optimizer.close()


def test_an_lbfgs_step_ends_with_an_accepted_rollback(server: RunningServer, standin: Refusing) -> None:
    """The step that was under way ends, with the parameters of the session."""
    parameter = torch.nn.Parameter(torch.full((4,), 8.0))
    optimizer = LBFGS([parameter], max_iter=3, server=server.url, transport=standin, on_rollback="accept")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    standin.refuse("POST", "/push", back())
    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert (optimizer.last_step.reason, parameter.tolist()) == ("rolled_back", [8.0] * 4)
    optimizer.step(closure)
    assert optimizer.last_step.applied
    optimizer.close()


def test_a_view_is_not_taken_for_the_parameters(server: RunningServer, standin: Refusing) -> None:
    """Inside `swap_to` a rollback is raised, accepted or not: the parameters are not the model's own there."""
    optimizer = stepped(server.url, session="viewed", transport=standin, on_rollback="accept", ema=0.5)
    with optimizer.swap_to("ema"):
        standin.refuse("PUT", "/lease", back())
        with pytest.raises(StateRolledBack):
            optimizer.heartbeat()
    step(optimizer)
    optimizer.close()


def test_rounds_go_on_after_an_accepted_rollback(server: RunningServer, standin: Refusing) -> None:
    """A round whose result is dropped leaves the model at the session's parameters, and the next round counts."""
    model = torch.nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    place: RemoteOptions = {"server": server.url, "session": "rounds-back", "transport": standin}
    place["on_rollback"] = "accept"
    with farstep.LocalSGD(model, inner, every=2, **place) as rounds:
        begun = [p.detach().clone() for p in model.parameters()]

        def train() -> None:
            for _ in range(2):
                inner.zero_grad()
                model(torch.ones(3, 2)).sum().backward()
                inner.step()

        standin.refuse("POST", "/push", back())
        train()
        assert rounds.last_sync is not None
        assert rounds.last_sync.reason == "rolled_back"
        assert all(map(torch.equal, model.parameters(), begun))
        train()
        assert rounds.last_sync.applied
        assert not any(map(torch.equal, model.parameters(), begun))
        rounds.close()


@pytest.mark.parametrize("given", ["ignore", None, True])
def test_another_word_is_refused(given: Any) -> None:
    """There are two ways to take a rollback, and a third is no option."""
    with pytest.raises(InvalidOption) as refused:
        resolve({"server": "http://box", "on_rollback": given}, {})
    assert (refused.value.field, refused.value.side) == ("on_rollback", "client")


# -- without a word


@pytest.mark.promise(
    "A server that went back without saying so is found out by its first answer that shows it.", area="client errors"
)
@pytest.mark.parametrize(
    ("name", "method", "path", "call"),
    [
        ("step", "POST", "/push", step),
        ("pull", "GET", "/contents", SGD.pull),
        ("heartbeat", "PUT", "/lease", SGD.heartbeat),
    ],
)
def test_a_version_that_was_passed_is_a_rollback(
    name: str, method: str, path: str, call: Callable[[SGD], object], liar: Liar
) -> None:
    """A version below one that the same life of the session has shown reaches no parameter."""
    optimizer = stepped(liar.url, session=f"lower-{name}", steps=3)

    def older(said: dict[str, Any]) -> None:
        said["version"] = 1
        with contextlib.suppress(KeyError):
            said["receipt"]["version"] = 1

    liar.change(method, path, older)
    with pytest.raises(StateRolledBack, match=r"went back to version 1, and worker .* had seen version 3"):
        call(optimizer)
    assert values(optimizer) == [5.0] * 4
    liar.honest()
    optimizer.rejoin()
    optimizer.close()


def test_a_receipt_of_long_ago_is_no_rollback(server: RunningServer, liar: Liar) -> None:
    """A repeated write gets its first receipt, whose version others have passed: that is as it should be."""
    optimizer = stepped(liar.url, session="long-ago", worker="w0", timeout_s=0.3)
    liar.answer("PUT", "/contents", b"")
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].add_(1)
    with pytest.raises(FarstepError):
        step(optimizer)
    liar.honest()
    other = stepped(server.url, session="long-ago", worker="w1", steps=5)
    step(optimizer)
    assert optimizer.version == 9
    optimizer.close()
    other.close()


def test_a_gap_behind_an_acknowledged_write_is_a_rollback(server: RunningServer, standin: Refusing) -> None:
    """A server that expects a write which it has acknowledged has forgotten it; one further on is a gap as before."""
    optimizer = stepped(server.url, session="gap", transport=standin)
    last = 3  # the first contents and two steps
    standin.refuse("POST", "/push", SequenceGap("Expected 3.", expected=last))
    with pytest.raises(StateRolledBack, match=r"went back to an older version, .* had seen version 2"):
        step(optimizer)
    standin.refuse("POST", "/push", SequenceGap("Expected 4.", expected=last + 1))
    with pytest.raises(SequenceGap):
        step(optimizer)
    optimizer.close()


def test_an_epoch_that_the_server_does_not_know_is_a_rollback(server: RunningServer, liar: Liar) -> None:
    """A worker that is fenced by an older epoch than its own was forgotten, not replaced."""
    optimizer = stepped(liar.url, session="epoch", worker="w0")
    optimizer.rejoin()
    older = stepped(server.url, session="epoch", worker="w0", steps=0)
    with pytest.raises(Fenced):
        step(optimizer)

    def forget(page: dict[str, Any]) -> None:
        page["epoch"] = 1

    liar.change("GET", "/w0", forget)
    with pytest.raises(StateRolledBack):
        step(optimizer)
    liar.honest()
    older.close()
    optimizer.close()
