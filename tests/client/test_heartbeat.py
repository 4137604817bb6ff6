"""Heartbeats: a worker that is busy with something else stays live, and learns how things are.

The last part has workers in processes of their own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from farstep import Async, Bounded, Heartbeat, Sync, worker
from farstep.conversation import Conversation
from farstep.errors import FarstepError, Fenced, SessionFull, SessionLost, Unavailable
from farstep.heartbeat import beating
from farstep.optim import SGD, Adagrad
from farstep.protocol.consistency import Consistency
from farstep.settings import RemoteOptions
from tests.support.client.twins import drawn, parameters
from tests.support.loaded import Script, running_script
from tests.support.service.servers import RunningServer, running_server

FRESH = itertools.count()
WITHIN_S = 60.0


@pytest.fixture
def shared(server: RunningServer) -> RemoteOptions:
    """Name a session of our own on the server."""
    return {"server": server.url, "session": f"beats-{next(FRESH)}", "kernel": "reference"}


def joined(shared: RemoteOptions, name: str, mode: Consistency | None = None) -> SGD:
    place: RemoteOptions = {**shared, "worker": worker(name), "consistency": mode or Async()}
    return SGD(parameters(drawn(0)), lr=0.1, **place)


def page(talk: Conversation, optimizer: SGD) -> dict[str, Any]:
    return talk.control("GET", f"/v1/sessions/{optimizer.session}/workers/{optimizer.worker}")


def test_a_heartbeat_says_how_things_are(shared: RemoteOptions) -> None:
    """Version, mode and how many are live come back, and what the worker holds stays as it is."""
    w0, w1 = joined(shared, "w0"), joined(shared, "w1")
    for p in w1.param_groups[0]["params"]:
        p.grad = p.detach().clone()
    w1.step()
    assert w0.heartbeat() == Heartbeat(
        worker="w0", epoch=1, lapsed=False, lease_s=60.0, live=2, version=1, consistency=Async()
    )
    assert w0.version == 0
    w1.set_consistency(Bounded(staleness=3, lease_s=5.0))
    w1.close()
    beat = w0.heartbeat()
    assert (beat.live, beat.lease_s, beat.consistency) == (1, 5.0, Bounded(staleness=3, lease_s=5.0))
    w0.close()


def test_in_this_process_there_is_no_lease_to_lose() -> None:
    """An embedded optimizer takes heartbeats, which say that it is alone and lives for ever."""
    optimizer = Adagrad(parameters(drawn(0)), worker="me")
    with optimizer.keep_alive():
        beat = optimizer.heartbeat()
    assert (beat.worker, beat.live, beat.lease_s, beat.lapsed) == ("me", 1, math.inf, False)


def test_a_heartbeat_of_who_was_away_brings_it_back(shared: RemoteOptions, talk: Conversation) -> None:
    """A lease that ran out is told, once, and the worker is live again without a step."""
    w0 = joined(shared, "w0", Async(lease_s=0.05))
    while page(talk, w0)["live"]:
        pass
    w0.set_consistency(Async(lease_s=60.0))
    assert [w0.heartbeat().lapsed, w0.heartbeat().lapsed] == [True, False]
    assert page(talk, w0)["live"]
    w0.close()


@pytest.mark.promise(
    "`heartbeat()` and `keep_alive()` keep the place of a worker that evaluates or saves.",
    area="consistency modes",
)
def test_a_worker_keeps_its_lease_while_it_does_something_else(shared: RemoteOptions, talk: Conversation) -> None:
    """Inside `keep_alive` a lease that is much shorter than the block never runs out, and after it it does."""
    w0 = joined(shared, "w0", Async(lease_s=2.0))
    until = time.monotonic() + 5.0
    with w0.keep_alive():
        while time.monotonic() < until:
            assert page(talk, w0)["live"]
    while page(talk, w0)["live"]:
        pass
    w0.close()


def test_steps_inside_keep_alive_are_steps(shared: RemoteOptions) -> None:
    """The thread that keeps a lease is in nobody's way."""
    w0 = joined(shared, "w0", Async(lease_s=0.003))
    with w0.keep_alive():
        for _ in range(50):
            for p in w0.param_groups[0]["params"]:
                p.grad = p.detach().clone()
            w0.step()
    assert w0.version == 50
    w0.close()


# -- what can be wrong -----------------------------------------------------------------------------------------------


def test_a_worker_whose_name_was_taken_is_told(shared: RemoteOptions) -> None:
    """Another process under the same name has the lease; `rejoin` takes it back, and the other one is told."""
    first, second = joined(shared, "w0"), joined(shared, "w0")
    with pytest.raises(Fenced, match=r"epoch 2 is current.*give each worker its own name"):
        first.heartbeat()
    assert second.heartbeat().epoch == 2
    assert not first.rejoin()
    assert first.heartbeat().epoch == 3
    with pytest.raises(Fenced):
        second.heartbeat()
    first.close()


def test_a_place_that_went_to_another_is_told(shared: RemoteOptions, talk: Conversation) -> None:
    """Who was away while a newcomer took its place is not a member, and a heartbeat does not make it one."""
    w0 = joined(shared, "w0", Sync(workers=1, lease_s=0.05))
    while page(talk, w0)["live"]:
        pass
    w1 = joined(shared, "w1", Sync(workers=1, lease_s=0.05))
    with pytest.raises(Fenced, match="not a member"):
        w0.heartbeat()
    w1.close()


def test_a_session_that_is_gone_is_told(shared: RemoteOptions, talk: Conversation) -> None:
    """Removed, and removed and created anew: `SessionLost`, which says what `rejoin` needs."""
    w0 = joined(shared, "w0")
    talk.control("DELETE", f"/v1/sessions/{w0.session}")
    with pytest.raises(SessionLost, match=r"is gone from.*rejoin"):
        w0.heartbeat()
    again = joined(shared, "w0")
    with pytest.raises(SessionLost, match=r"created anew.*rejoin"):
        w0.heartbeat()
    again.close()


def test_a_server_that_is_away_is_told_after_the_time_that_was_given(server: RunningServer) -> None:
    """`Unavailable` says what was tried; a thread that keeps the lease goes on, and the end of its block is prompt."""
    with running_server(loaded=True) as away:
        w0 = SGD(parameters(drawn(0)), lr=0.1, server=away.url, session="s", worker="w0", timeout_s=0.5)
        with w0.keep_alive():
            away.kill()
            with pytest.raises(Unavailable, match=r"Renewing the lease of worker 'w0' in session 's'.*0\.5 s"):
                w0.heartbeat()
            began = time.monotonic()
        assert time.monotonic() - began < 5.0


def test_a_closed_optimizer_has_no_lease(shared: RemoteOptions) -> None:
    """It has left, and says so; closing inside `keep_alive` ends that quietly."""
    w0 = joined(shared, "w0")
    with w0.keep_alive(), closing(w0):
        pass
    for late in (w0.heartbeat, w0.keep_alive().__enter__):
        with pytest.raises(FarstepError, match="closed"):
            late()


@pytest.mark.parametrize("refusal", [Fenced, SessionLost])
def test_a_thread_that_is_refused_goes_on_when_its_worker_has_joined_again(
    shared: RemoteOptions, refusal: type[FarstepError]
) -> None:
    """The next step says why it was refused; `rejoin` inside `keep_alive` has the lease kept again."""
    w0 = joined(shared, "w0")
    refused, renewed = threading.Event(), threading.Event()

    def beat() -> Heartbeat:
        if not refused.is_set():
            refused.set()
            raise refusal("as a server would")
        found = w0.heartbeat()
        renewed.set()
        return found

    with beating(beat):
        assert refused.wait(WITHIN_S)
        w0.rejoin()
        assert renewed.wait(WITHIN_S)
    w0.close()


def test_a_thread_whose_optimizer_is_closed_ends(shared: RemoteOptions) -> None:
    """Nobody has a lease to renew any more, and the block may last."""
    w0 = joined(shared, "w0", Async(lease_s=0.01))
    with w0.keep_alive():
        w0.close()
        while any(each.name == "farstep-heartbeat" for each in threading.enumerate()):
            pass


# -- processes -------------------------------------------------------------------------------------------------------

EVALUATING = """
import sys
import torch, farstep

optimizer = farstep.optim.SGD([torch.nn.Parameter(torch.zeros(4))], lr=0.1, worker=farstep.worker(),
                              consistency=farstep.Sync(workers=1, lease_s=2.0))
with optimizer.keep_alive():
    print("evaluates", flush=True)
    sys.stdin.readline()
try:
    print(optimizer.heartbeat().epoch, flush=True)
except farstep.FarstepError as error:
    print(error.code, flush=True)
optimizer.close()
"""


@contextmanager
def evaluating(shared: RemoteOptions, name: str) -> Iterator[Script]:
    """Run a worker that has joined and does something that needs no session."""
    told = {"FARSTEP_SERVER": str(shared["server"]), "FARSTEP_SESSION": str(shared["session"]), "FARSTEP_WORKER": name}
    with running_script(EVALUATING, {**os.environ, **told}) as script:
        assert script.line(WITHIN_S) == "evaluates"
        yield script


def done(script: Script) -> str:
    """Let a worker be done with what it does, and return what becomes of it."""
    script.tell("done")
    return script.line(WITHIN_S)


@pytest.mark.promise(
    "`heartbeat()` and `keep_alive()` keep the place of a worker that evaluates or saves.",
    area="consistency modes",
)
def test_a_process_that_evaluates_keeps_its_place_and_one_that_is_stopped_does_not(
    shared: RemoteOptions, talk: Conversation
) -> None:
    """For more than two leases a newcomer is refused its place in `keep_alive`; after SIGSTOP it gets it."""
    mode = Sync(workers=1, lease_s=2.0)
    shared = {"server": shared["server"], "session": shared["session"]}
    newly: RemoteOptions = {**shared, "worker": "w1", "consistency": mode}
    path = f"/v1/sessions/{shared['session']}/workers/w0"
    with evaluating(shared, "w0") as script:
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            assert talk.control("GET", path)["live"]
        with pytest.raises(SessionFull, match="w0"):
            SGD(parameters(drawn(0, [(4,)])), lr=0.1, **newly)
        script.process.send_signal(signal.SIGSTOP)
        while talk.control("GET", path)["live"]:
            pass
        newcomer = SGD(parameters(drawn(0, [(4,)])), lr=0.1, **newly)
        script.process.send_signal(signal.SIGCONT)
        assert done(script) == "fenced"
    newcomer.close()


@pytest.mark.promise(
    "Another process under a worker's name fences the earlier one, which may `rejoin()`.",
    area="client errors",
)
def test_of_two_processes_with_one_name_the_later_one_is_the_worker(shared: RemoteOptions, talk: Conversation) -> None:
    """The first one is told that it is fenced, the second one goes on, and a clean end leaves nobody behind."""
    shared = {"server": shared["server"], "session": shared["session"]}
    with evaluating(shared, "w0") as first, evaluating(shared, "w0") as second:
        assert done(first) == "fenced"
        assert first.process.wait(WITHIN_S) == 0
        assert list(talk.control("GET", f"/v1/sessions/{shared['session']}")["workers"]) == ["w0"]
        assert done(second) == "2"
        assert second.process.wait(WITHIN_S) == 0
    assert json.dumps(talk.control("GET", f"/v1/sessions/{shared['session']}")["workers"]) == "{}"
