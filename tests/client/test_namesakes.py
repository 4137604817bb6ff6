"""Several optimizers in one process: numbered where the environment names the session, told of each other where not."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch

import farstep
from farstep.errors import Fenced, InvalidOption, OptionsDiffer, Unavailable
from farstep.optim import SGD, Adam
from farstep.settings import resolve
from tests.support.client.twins import drawn, parameters
from tests.support.service.servers import RunningServer

FRESH = itertools.count()


@pytest.fixture
def name(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the session that the environment names, on the server, for worker w0."""
    name = f"namesakes-{next(FRESH)}"
    for variable, value in (("SERVER", server.url), ("SESSION", name), ("WORKER", "w0")):
        monkeypatch.setenv(f"FARSTEP_{variable}", value)
    return name


def stepped(optimizer: torch.optim.Optimizer, ps: list[torch.Tensor], seed: int = 0) -> None:
    """Take one step along gradients that are drawn."""
    for p, gradient in zip(ps, drawn(seed, [p.shape for p in ps]), strict=True):
        p.grad = gradient
    optimizer.step()


def test_optimizers_of_one_script_are_numbered(name: str) -> None:
    """The second and third optimizer have sessions of their own, though their parameters have equal shapes."""
    models = [parameters(drawn(seed)) for seed in range(3)]
    optimizers = [SGD(ps, lr=0.1, kernel="reference") for ps in models]
    assert [each.session for each in optimizers] == [name, f"{name}.2", f"{name}.3"]
    for seed, (optimizer, ps) in enumerate(zip(optimizers, models, strict=True)):
        other = parameters(drawn(seed))
        stepped(optimizer, ps, seed)
        stepped(torch.optim.SGD(other, lr=0.1, foreach=False), other, seed)
        assert all(torch.equal(p, q) for p, q in zip(ps, other, strict=True))
        assert optimizer.version == 1


@pytest.mark.parametrize("gone", ["closed", "deleted"])
def test_the_number_is_that_of_those_made_before(name: str, gone: str) -> None:
    """Whether an earlier optimizer is still there does not matter: it may not be on every worker."""
    first = SGD(parameters(drawn(0)), lr=0.1)
    if gone == "closed":
        first.close()
    else:
        del first
    assert SGD(parameters(drawn(0)), lr=0.2).session == f"{name}.2"


def test_one_that_could_not_be_made_is_not_counted(name: str, server: RunningServer) -> None:
    """A second try gets the name of the first, as it does on a worker where the first succeeded."""
    with SGDs(name, "w1") as taken:
        assert taken.session == name
        for _ in range(2):
            with pytest.raises(OptionsDiffer):
                SGD(parameters(drawn(0)), lr=0.2)
        assert SGD(parameters(drawn(0)), lr=0.1).session == name
    with pytest.raises(Unavailable):
        SGD(parameters(drawn(0)), server="http://127.0.0.1:9", timeout_s=0.01)
    assert SGD(parameters(drawn(0)), lr=0.5).session == f"{name}.2"


class SGDs:
    """Another worker's optimizer in the session, closed in the end."""

    def __init__(self, name: str, worker: str) -> None:
        self._optimizer = SGD(parameters(drawn(0)), lr=0.1, session=name, worker=worker)

    def __enter__(self) -> SGD:
        return self._optimizer

    def __exit__(self, *_: object) -> None:
        self._optimizer.close()


def test_workers_of_one_process_are_counted_each(name: str) -> None:
    """Two workers in one process, as in threads, are each other's partners and not their own second optimizers."""
    found = [SGD(parameters(drawn(0)), lr=0.1, worker=worker).session for worker in ("w0", "w1", "w0", "w1")]
    assert found == [name, name, f"{name}.2", f"{name}.2"]


def test_rounds_are_counted_when_they_join(name: str) -> None:
    """LocalSGD and DiLoCo have sessions by number, too, from the moment that they are entered."""
    model = torch.nn.Linear(2, 1)
    rounds = farstep.LocalSGD(model, torch.optim.SGD(model.parameters()), every=2)
    first = SGD(parameters(drawn(0)))
    with rounds:
        assert (first.session, rounds.outer.session) == (name, f"{name}.2")


def test_copies_are_not_counted(name: str) -> None:
    """A deep copy is in a private session, and the next optimizer is the second."""
    first = SGD(parameters(drawn(0)))
    copy = deepcopy(first)
    assert copy.session.startswith("private-")
    assert SGD(parameters(drawn(0))).session == f"{name}.2"


def test_a_name_in_a_run_is_of_the_run() -> None:
    """Under `farstep launch` a session that the script names is the run's; what names the run already stays."""
    run = {"FARSTEP_SESSION": "run-1", "FARSTEP_RUN": "run-1"}
    found = [resolve({"session": each}, run).session for each in ("actor", "run-1.actor", "run-1", None)]
    assert found == ["run-1.actor", "run-1.actor", "run-1", "run-1"]
    assert resolve({"session": "actor"}, {"FARSTEP_SESSION": "run-1"}).session == "actor"
    with pytest.raises(InvalidOption, match="Invalid session"):
        resolve({"session": "no spaces"}, run)
    with pytest.raises(InvalidOption, match="Invalid session"):
        resolve({"session": "a" * 60}, run)


def test_a_number_that_does_not_fit_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of 63 characters has no room for a number: the second optimizer is refused, the first is not."""
    long = f"{name}-{'x' * 63}"[:63]
    monkeypatch.setenv("FARSTEP_SESSION", long)
    first = SGD(parameters(drawn(0)))
    assert first.session == long
    with pytest.raises(InvalidOption, match="Invalid session"):
        SGD(parameters(drawn(0)))


def test_the_same_name_twice_is_refused_with_the_cause(name: str) -> None:
    """Where two optimizers were given one name, the one that is shut out is told by which optimizer, and what to do."""
    here, there = parameters(drawn(0)), parameters(drawn(1))
    first = SGD(here, lr=0.1, session=f"{name}-own")
    second = SGD(there, lr=0.1, session=f"{name}-own")
    words = r"Another optimizer of this process is in session '.*-own' as worker 'w0', too.*session='critic'"
    with pytest.raises(Fenced, match=words):
        stepped(first, here)
    stepped(second, there)
    with pytest.raises(OptionsDiffer, match=words):
        Adam(parameters(drawn(2)), session=f"{name}-own")
    assert not first.rejoin()
    stepped(first, here)
    with pytest.raises(Fenced, match=words):
        stepped(second, there)


def test_a_place_that_another_process_took_is_not_blamed_on_this_one(name: str, server: RunningServer) -> None:
    """An optimizer that was closed, or is the same, is no cause: the session's own words are raised."""
    closed = SGD(parameters(drawn(0)), lr=0.1, session=f"{name}-own")
    closed.close()
    with pytest.raises(OptionsDiffer) as refused:
        Adam(parameters(drawn(2)), session=f"{name}-own")
    assert "of this process" not in str(refused.value)


def test_without_a_server_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded optimizers share nothing, whatever the environment names; the numbers are those that workers have."""
    name = f"namesakes-{next(FRESH)}"
    monkeypatch.setenv("FARSTEP_SESSION", name)
    made: list[Any] = [SGD(parameters(drawn(seed))) for seed in range(2)]
    assert [each.session for each in made] == [name, f"{name}.2"]
