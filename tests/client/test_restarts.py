"""A client whose server is killed, or asked to end, and started again: it waits, repeats its request, and goes on.

Servers are processes with data directories. What they keep, and lose, is the subject of `tests/robustness`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import farstep
from farstep.conversation import Conversation
from farstep.errors import FarstepError, StateRolledBack, Unavailable
from farstep.optim import SGD, RemoteOptimizer
from farstep.protocol.durability import Durability
from farstep.settings import RemoteOptions
from tests.support.client.twins import Twins, check_parameters, drawn
from tests.support.service.servers import GONE_WITHIN_S, RunningServer, running_server

SHAPES = [(300, 250), (131, 2), (41, 1)]
"""Enough for memory to be shared, and for gradients to be sent during the backward pass."""
LOST = "journal.append.before"
"""Where a server ends with a push that it has received and not written down."""
KEPT = "journal.append.after"
"""Where a server ends with a push that it has written down and not answered."""
RARELY = farstep.Snapshot(every_s=3600.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """Run a server that keeps its sessions, on a port and at a path."""
    with running_server("--data-dir", str(tmp_path / "data"), "--unix", str(tmp_path / "s"), loaded=True) as running:
        yield running


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def twins_at(url: str, **remote: Any) -> Twins:
    place: RemoteOptions = {"kernel": "reference", "server": url, **remote}  # type: ignore[typeddict-item]
    return Twins("Adam", {}, place, start=drawn(0, SHAPES))


def report_of(optimizer: RemoteOptimizer) -> farstep.StepReport:
    assert optimizer.last_step is not None
    return optimizer.last_step


def step_while_it_dies(server: RunningServer, twins: Twins, seed: int, place: str, aside: ThreadPoolExecutor) -> None:
    """Let both step, ours while the server ends at a place and is started again."""
    server.restart({"FARSTEP_FAILPOINT": place})
    twins.give(drawn(seed, SHAPES))
    stepping: Future[None] = aside.submit(twins.ours.step)
    server.process.wait(GONE_WITHIN_S)
    assert not stepping.done()
    server.restart()
    stepping.result(60)
    twins.theirs.step()


# -- exactly once


@pytest.mark.promise(
    "A step that a dying server had taken in, or not, is taken once: the client waits, repeats it, and goes on.",
    area="exactly once",
)
@pytest.mark.parametrize("place", [LOST, KEPT])
@pytest.mark.parametrize("how", ["tcp", "shared memory"])
def test_a_step_outlives_its_server(how: str, place: str, server: RunningServer, aside: ThreadPoolExecutor) -> None:
    """A push that was written down gets its first receipt, one that was not is applied; the bits are torch's."""
    twins = twins_at(server.url if how == "tcp" else server.unix)
    twins.step(drawn(1, SHAPES))
    twins.step(drawn(2, SHAPES))
    assert report_of(twins.ours).path == ("bodies" if how == "tcp" else how)
    for seed in (3, 4):
        step_while_it_dies(server, twins, seed, place, aside)
        report = report_of(twins.ours)
        assert (report.applied, report.duplicate, report.version) == (True, place == KEPT, seed)
        assert report.attempts > 1
        check_parameters(twins.here, twins.there)
    for seed in (5, 6):
        twins.step(drawn(seed, SHAPES))
    assert report_of(twins.ours).path == ("bodies" if how == "tcp" else how)
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("how", ["tcp", "unix"])
def test_a_restart_between_two_steps_is_not_noticed(how: str, server: RunningServer) -> None:
    """Connections and shared memory of the old server are given up without an error, and the bits are torch's."""
    twins = twins_at(server.url if how == "tcp" else server.unix)
    for seed in range(1, 7):
        if seed in (3, 4):
            server.kill()
        elif seed == 5:
            assert server.stop() == 0
        if seed in (3, 4, 5):
            server.restart()
        twins.step(drawn(seed, SHAPES))
        assert (report_of(twins.ours).applied, report_of(twins.ours).duplicate, twins.ours.version) == (
            True,
            False,
            seed,
        )
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("place", [LOST, KEPT])
@pytest.mark.parametrize("again", [True, False])
def test_a_step_that_was_given_up_is_repeated_or_replaced(
    again: bool, place: str, server: RunningServer, aside: ThreadPoolExecutor
) -> None:
    """After `Unavailable` the same gradients count once, and others come after those that had been written down."""
    twins = twins_at(server.unix, timeout_s=0.5)
    twins.step(drawn(1, SHAPES))
    server.restart({"FARSTEP_FAILPOINT": place})
    twins.give(drawn(2, SHAPES))
    with pytest.raises(Unavailable):
        twins.ours.step()
    server.restart()
    if again:
        twins.ours.step()
        twins.theirs.step()
        assert report_of(twins.ours).duplicate is (place == KEPT)
    else:
        if place == KEPT:
            twins.theirs.step()
        twins.step(drawn(3, SHAPES))
        assert report_of(twins.ours).earlier == ("applied" if place == KEPT else "dropped")
    check_parameters(twins.here, twins.there)
    for seed in (4, 5):
        twins.step(drawn(seed, SHAPES))
    assert report_of(twins.ours).path == "shared memory"
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("when", ["before the backward pass", "after it"])
def test_a_push_during_the_backward_pass_outlives_the_server(when: str, server: RunningServer) -> None:
    """A stream that broke off is an ordinary push in the step, and later ones are streamed again."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 8)) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    ours = SGD(models[0].parameters(), lr=0.1, server=server.url, overlap=True, kernel="reference")
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1, foreach=False)
    streamed = 0
    for count in range(8):
        inputs = torch.randn(5, 300)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            if count == 4 and optimizer is ours and when != "after it":
                server.kill()
                server.restart()
            loss.backward()
            if count == 4 and optimizer is ours and when == "after it":
                server.kill()
                server.restart()
            optimizer.step()
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
        assert (ours.version, report_of(ours).duplicate) == (count + 1, False)
        streamed += count > 5 and report_of(ours).overlap == "streamed"
    assert streamed
    ours.close()


def test_a_barrier_outlives_the_server(server: RunningServer, aside: ThreadPoolExecutor) -> None:
    """A push that waits for another worker's is repeated, and the step is made of both, each once."""
    mode = farstep.Sync(workers=2)
    ps = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    workers = [
        SGD([p], lr=1.0, server=server.url, session="pair", worker=f"w{i}", consistency=mode) for i, p in enumerate(ps)
    ]
    for p, value in zip(ps, (2.0, 4.0), strict=True):
        p.grad = torch.full((3,), value)
    first = aside.submit(workers[0].step)
    until_it_waits(server, "pair", "w0")
    server.kill()
    server.restart()
    assert not first.done()
    workers[1].step()
    first.result(60)
    assert [p.tolist() for p in ps] == [[-3.0] * 3] * 2
    assert [worker.version for worker in workers] == [1, 1]
    assert report_of(workers[0]).contributors == ("w0", "w1")
    for worker in workers:
        worker.close()


def until_it_waits(server: RunningServer, session: str, worker: str) -> None:
    """Return when a push of a worker waits."""
    talk = Conversation(server.url, None)
    while not talk.control("GET", f"/v1/sessions/{session}/workers/{worker}")["waiting"]:
        pass
    talk.close()


def test_other_requests_wait_for_the_server(server: RunningServer, aside: ThreadPoolExecutor) -> None:
    """A pull, a heartbeat, a state_dict, a new group, a switch of the mode and a join go on when it is there again."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = farstep.optim.Adagrad([p], lr=1.0, server=server.url, session="asking", worker="w0")
    p.grad = torch.ones(3)
    optimizer.step()
    late, mode = torch.nn.Parameter(torch.ones(2)), farstep.Async(lease_s=30.0)

    def join() -> None:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(count))]} for count in (3, 2)]
        place: RemoteOptions = {"server": server.url, "session": "asking", "worker": "w1", "consistency": mode}
        place["options"] = "session"
        farstep.optim.Adagrad(groups, lr=1.0, **place).close()

    calls: list[Callable[[], object]] = [
        optimizer.pull,
        optimizer.heartbeat,
        optimizer.state_dict,
        partial(optimizer.set_consistency, mode),
        partial(optimizer.add_param_group, {"params": [late]}),
        optimizer.options_in_force,
        join,
    ]
    answers = []
    for call in calls:
        server.kill()
        asking = aside.submit(call)
        server.restart()
        answers.append(asking.result(60))
    version, heartbeat, state, _, _, options, _ = answers
    assert (version, heartbeat.version, heartbeat.epoch) == (1, 1, 1)  # type: ignore[attr-defined]
    assert state["state"][0]["sum"].tolist() == [1.0] * 3  # type: ignore[index]
    assert [group["lr"] for group in options] == [1.0, 1.0]  # type: ignore[attr-defined]
    assert optimizer.version == 2
    optimizer.close()


# -- rolled back


def rolled_back(server: RunningServer, level: Durability = RARELY, **options: Any) -> SGD:
    """Return an optimizer at version 5 whose session a kill has taken back to version 2."""
    p = torch.nn.Parameter(torch.full((4,), 10.0))
    optimizer = SGD([p], lr=1.0, server=server.url, session="back", worker="w0", durability=level, **options)
    for _ in range(2):
        step(optimizer)
    assert server.stop() == 0
    server.restart()
    for _ in range(3):
        step(optimizer)
    assert (optimizer.version, values(optimizer)) == (5, [5.0] * 4)
    server.kill()
    server.restart()
    return optimizer


def step(optimizer: SGD) -> None:
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    optimizer.step()


def values(optimizer: SGD) -> list[float]:
    found: list[float] = optimizer.param_groups[0]["params"][0].tolist()
    return found


@pytest.mark.promise("A rollback is announced: the next call raises `StateRolledBack`.", area="client errors")
@pytest.mark.parametrize("call", [step, SGD.pull, SGD.heartbeat], ids=["step", "pull", "heartbeat"])
def test_a_rollback_is_raised_until_the_worker_joins_again(call: Any, server: RunningServer) -> None:
    """Each call says which version was seen and which there is; `rejoin()` goes on from the session's parameters."""
    optimizer = rolled_back(server)
    for _ in range(2):
        with pytest.raises(StateRolledBack, match="went back to version 2, and worker 'w0' had seen version 5") as told:
            call(optimizer)
        assert (told.value.side, told.value.extra) == ("client", {"version": 2, "seen": 5})
        assert values(optimizer) == [5.0] * 4
    assert optimizer.rejoin() is False
    assert (optimizer.version, values(optimizer)) == (2, [8.0] * 4)
    step(optimizer)
    assert (optimizer.version, values(optimizer)) == (3, [7.0] * 4)
    optimizer.close()


@pytest.mark.promise('With `on_rollback="accept"` a worker goes on from what the session has.', area="client errors")
@pytest.mark.parametrize("call", [step, SGD.pull, SGD.heartbeat], ids=["step", "pull", "heartbeat"])
def test_an_accepted_rollback_goes_on(call: Any, server: RunningServer) -> None:
    """The call brings the session's parameters, and the next step counts."""
    optimizer = rolled_back(server, on_rollback="accept")
    call(optimizer)
    report = report_of(optimizer)
    assert (report.applied, report.reason, report.version) == (False, "rolled_back", 2)
    assert report.durability == "snapshot:every_s=3600"
    assert (optimizer.version, values(optimizer)) == (2, [8.0] * 4)
    step(optimizer)
    assert (report_of(optimizer).reason, optimizer.version, values(optimizer)) == ("", 3, [7.0] * 4)
    optimizer.close()


def test_every_worker_is_told_of_a_rollback(server: RunningServer) -> None:
    """A worker that comes back when another one has joined again and stepped is told as well, also after a restart."""
    p = torch.nn.Parameter(torch.full((4,), 10.0))
    other = SGD([p], lr=1.0, server=server.url, session="back", worker="w1", durability=RARELY)
    optimizer = rolled_back(server)
    with pytest.raises(StateRolledBack):
        step(optimizer)
    optimizer.rejoin()
    for _ in range(6):
        step(optimizer)
    assert server.stop() == 0
    server.restart()
    step(optimizer)
    with pytest.raises(StateRolledBack, match="went back to version 9"):
        step(other)
    other.rejoin()
    step(other)
    assert other.version == 10
    optimizer.close()
    other.close()


@pytest.mark.parametrize("on_rollback", ["raise", "accept"])
def test_a_session_that_someone_rolls_back_tells_its_workers(on_rollback: Any, server: RunningServer) -> None:
    """A rollback that was asked for is announced like one that a dead server caused, while the server goes on."""
    p = torch.nn.Parameter(torch.full((4,), 10.0))
    place: RemoteOptions = {"server": server.url, "session": "undone", "on_rollback": on_rollback}
    optimizer = SGD([p], lr=1.0, **place)
    for _ in range(4):
        step(optimizer)
    talk = Conversation(server.url, None)
    talk.control("POST", "/v1/sessions/undone/rollback", {"version": 1})
    talk.close()
    if on_rollback == "raise":
        with pytest.raises(StateRolledBack, match=r"went back to version 1, .* had seen version 4.*they were undone"):
            step(optimizer)
        assert values(optimizer) == [6.0] * 4
        optimizer.rejoin()
    else:
        step(optimizer)
        assert report_of(optimizer).reason == "rolled_back"
    assert (optimizer.version, values(optimizer)) == (1, [9.0] * 4)
    step(optimizer)
    assert (optimizer.version, values(optimizer)) == (2, [8.0] * 4)
    optimizer.close()


def test_a_journaled_session_is_never_rolled_back(server: RunningServer) -> None:
    """The same kill leaves a session with a journal where it was."""
    optimizer = rolled_back(server, farstep.Journal())
    step(optimizer)
    assert (optimizer.version, values(optimizer)) == (6, [4.0] * 4)
    optimizer.close()


@pytest.mark.parametrize("call", [step, SGD.pull, SGD.heartbeat], ids=["step", "pull", "heartbeat"])
def test_an_older_copy_of_the_data_directory_is_found_out(call: Any, server: RunningServer, tmp_path: Path) -> None:
    """A server on a backup believes that it has lost nothing; its worker knows better, and says so."""
    p = torch.nn.Parameter(torch.full((4,), 10.0))
    optimizer = SGD([p], lr=1.0, server=server.url, session="copied", durability=farstep.Journal())
    for _ in range(2):
        step(optimizer)
    assert server.stop() == 0
    shutil.copytree(tmp_path / "data", tmp_path / "backup")
    server.restart()
    for _ in range(3):
        step(optimizer)
    server.kill()
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "backup").rename(tmp_path / "data")
    server.restart()
    with pytest.raises(StateRolledBack, match="had seen version 5"):
        call(optimizer)
    assert values(optimizer) == [5.0] * 4
    assert optimizer.rejoin() is False
    assert (optimizer.version, values(optimizer)) == (2, [8.0] * 4)
    optimizer.close()


def test_a_session_in_memory_is_lost_with_its_server(server: RunningServer) -> None:
    """The level none is what it was: the session is gone, and the error says so."""
    p = torch.nn.Parameter(torch.full((4,), 10.0))
    optimizer = SGD([p], lr=1.0, server=server.url, session="memory", durability="none")
    step(optimizer)
    server.kill()
    server.restart()
    with pytest.raises(FarstepError, match="is gone from"):
        step(optimizer)
    optimizer.close()
