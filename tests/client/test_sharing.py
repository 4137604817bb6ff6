"""Steps through shared memory: the same bits, applied once, and bodies wherever memory cannot be used."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import farstep
from farstep.conversation import Conversation
from farstep.conversation.conversation import MSGPACK
from farstep.errors import (
    Busy,
    FarstepError,
    InvalidOption,
    InvalidRequest,
    NonFinite,
    Recovering,
    SessionLost,
    Unavailable,
)
from farstep.http_link.buffers import Sharing
from farstep.http_link.retry import RetryPolicy
from farstep.http_link.writer import Writer
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.protocol import Decoder, encode
from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PushHead, SharedPush, WriteName
from farstep.protocol.unix import path_of_url
from farstep.settings import RemoteOptions
from tests.parity.cases import STEPPED
from tests.support.client.refusing import problem
from tests.support.client.twins import Twins, check_parameters, drawn
from tests.support.faults import faulty
from tests.support.forks import in_a_fork
from tests.support.service.servers import RunningServer, running_server

SHAPES = [(300, 250), (131, 2), (41, 1)]
"""Enough for memory to be shared."""
SHARED = "shared memory"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server that listens at a path, and on a port."""
    with running_server("--unix", str(tmp_path_factory.mktemp("m") / "s"), loaded=True) as running:
        yield running


def twins_at(url: str, name: str = "Adagrad", **remote: object) -> Twins:
    place: RemoteOptions = {"kernel": "reference", "server": url, **remote}  # type: ignore[typeddict-item]
    return Twins(name, {}, place, start=drawn(0, SHAPES))


def path_of(optimizer: RemoteOptimizer) -> str:
    assert optimizer.last_step is not None
    return optimizer.last_step.path


def mappings(server: RunningServer) -> int:
    """Return how many areas a server has mapped."""
    return Path(f"/proc/{server.pid}/maps").read_text().count("memfd:farstep-")


@pytest.mark.promise("Your gradients are read, and never written.", area="NaN, clipping and averages")
@pytest.mark.parametrize("policy", [{"clip_norm": 0.5}, {"clip_value": 0.3}, {"accumulate": 2}, {"ema": 0.9}])
def test_gradients_in_shared_memory_are_not_changed(policy: dict[str, Any], local: RunningServer) -> None:
    """The worker's own: what is clipped or added up there is a copy, and the steps are those of the same bodies."""
    shared, bodies = twins_at(local.unix, **policy), twins_at(local.url, **policy)
    for seed in range(1, 5):
        for twins in (shared, bodies):
            twins.give(twins.drawn(seed))
            twins.ours.step()
        assert path_of(shared.ours) == SHARED
        area = shared.ours._membership.link._buffers.sharing.memory  # type: ignore[attr-defined]
        sent = area.gradients["float32"]
        assert torch.equal(sent, torch.cat([gradient.flatten() for gradient in shared.drawn(seed)]))
        check_parameters(shared.here, bodies.here)


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "Reference kernels give the bits of `torch.optim` in float32 and float64, embedded and on a server.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", [name for name in STEPPED if name != "SparseAdam"])
def test_every_optimizer_equals_torch_through_shared_memory(name: str, local: RunningServer) -> None:
    """Parameters and state are torch's bit for bit, and no tensor was in a body."""
    twins = twins_at(local.unix, name)
    for seed in range(1, 6):
        twins.step(drawn(seed, SHAPES))
        report = twins.ours.last_step
        assert report is not None
        assert (report.path, report.bytes_sent, report.bytes_received) == (SHARED, 0, 0)
    twins.check()
    twins.ours.close()


def test_missing_gradients_and_several_dtypes(local: RunningServer) -> None:
    """A parameter without a gradient is not stepped, and each dtype has memory of its own."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    start = [drawn(i, [(200, 201)], dtype)[0] for i, dtype in enumerate(dtypes)]
    twins = Twins("Adagrad", {}, {"kernel": "reference", "server": local.unix}, start=start)
    for seed in range(1, 6):
        drew = [drawn(seed + i, [p.shape], p.dtype)[0] for i, p in enumerate(start)]
        twins.step([None if (seed + i) % 3 == 0 else g for i, g in enumerate(drew)])
        assert path_of(twins.ours) == SHARED
    twins.check()


def test_gradients_that_are_not_contiguous(local: RunningServer) -> None:
    """What matters is the values: a transposed gradient and one expanded from a number are copied as they show."""
    twins = Twins("Adagrad", {}, {"kernel": "reference", "server": local.unix}, start=drawn(0, [(300, 250), (400,)]))
    for seed in range(1, 4):
        twins.step([drawn(seed, [(250, 300)])[0].t(), torch.tensor(0.5 * seed).expand(400)])
    assert path_of(twins.ours) == SHARED
    twins.check()


def test_edits_between_steps_reach_the_session(local: RunningServer) -> None:
    """A parameter that was changed by hand is noticed against what lies in shared memory."""
    twins = twins_at(local.unix)
    twins.step(drawn(1, SHAPES))
    for each in (twins.here[0], twins.there[0]):
        each.data.mul_(0.5)
    twins.step(drawn(2, SHAPES))
    assert path_of(twins.ours) == SHARED
    twins.check()


def test_sync_workers_share_memory_and_their_sum_is_in_nobodys(local: RunningServer) -> None:
    """Two workers' gradients are averaged as ever; a barrier reads both areas, and writes to neither."""
    mode = farstep.Sync(workers=2)
    start = drawn(0, SHAPES)
    mine = [[p.clone().requires_grad_() for p in start] for _ in range(2)]
    theirs = [p.clone().requires_grad_() for p in start]
    workers = [
        Adagrad(ps, server=local.unix, session="pair", worker=f"w{i}", consistency=mode, kernel="reference")
        for i, ps in enumerate(mine)
    ]
    oracle = torch.optim.Adagrad(theirs, foreach=False)
    with ThreadPoolExecutor(2) as threads:
        for seed in range(1, 4):
            drew = [drawn(10 * seed + i, SHAPES) for i in range(2)]
            for ps, gradients in zip(mine, drew, strict=True):
                for p, g in zip(ps, gradients, strict=True):
                    p.grad = g
            for p, a, b in zip(theirs, *drew, strict=True):
                p.grad = (a + b) / 2
            list(threads.map(lambda each: each.step(), workers))
            oracle.step()
    for ps, worker in zip(mine, workers, strict=True):
        assert path_of(worker) == SHARED
        check_parameters(ps, theirs)
    for worker in workers:
        worker.close()


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A push is applied once, wherever its request or its answer is cut.", area="exactly once")
@pytest.mark.parametrize("way", ["request", "response"])
def test_a_step_through_shared_memory_is_applied_once_wherever_it_is_cut(local: RunningServer, way: str) -> None:
    """The repeated push is recognised, its parameters come in a body, and later steps share memory again."""
    with faulty(path_of_url(local.unix) or "") as network:
        twins = twins_at(network.url, timeout_s=10.0)
        twins.step(drawn(1, SHAPES))
        steps = 1
        for after in (0, 100, 250, 400, 430):
            (network.cut_request if way == "request" else network.cut_response)(after=after)
            for _ in range(2):
                steps += 1
                twins.step(drawn(steps, SHAPES))
                check_parameters(twins.here, twins.there)
                assert twins.ours.version == steps
        twins.step(drawn(steps + 1, SHAPES))
        twins.step(drawn(steps + 2, SHAPES))
        assert path_of(twins.ours) == SHARED
        twins.check()
        twins.ours.close()


def test_a_push_that_was_given_up_is_repeated_or_replaced(local: RunningServer) -> None:
    """After a lost answer the same gradients count once, and other ones come after those that were applied."""
    with faulty(path_of_url(local.unix) or "") as network:
        for again in (True, False):
            network.down = False
            twins = twins_at(network.url, timeout_s=1.0)
            twins.step(drawn(1, SHAPES))
            network.cut_response(after=0, then_down=True)
            twins.give(drawn(2, SHAPES))
            with pytest.raises(Unavailable):
                twins.ours.step()
            twins.theirs.step()
            network.down = False
            if again:
                twins.ours.step()
            else:
                twins.step(drawn(3, SHAPES))
            assert twins.ours.version == (2 if again else 3)
            assert path_of(twins.ours) in ("bodies", SHARED)
            check_parameters(twins.here, twins.there)
            twins.step(drawn(4, SHAPES))
            twins.step(drawn(5, SHAPES))
            assert path_of(twins.ours) == SHARED
            twins.check()
            twins.ours.close()


def test_a_refused_push_leaves_the_memory_in_use(local: RunningServer) -> None:
    """A gradient with NaN is refused, and the next one goes the same way."""
    twins = twins_at(local.unix)
    twins.step(drawn(1, SHAPES))
    areas = mappings(local)
    twins.give([torch.full(shape, float("nan")) for shape in SHAPES])
    with pytest.raises(NonFinite):
        twins.ours.step()
    twins.step(drawn(2, SHAPES))
    assert (path_of(twins.ours), mappings(local)) == (SHARED, areas)
    twins.check()


def test_a_server_that_was_killed_takes_nothing_with_it(tmp_path: Path) -> None:
    """After SIGKILL the parameters are as they were; a rejoined session shares memory with the new server."""
    with running_server("--unix", str(tmp_path / "s"), loaded=True) as server:
        twins = twins_at(server.unix, timeout_s=1.0)
        twins.step(drawn(1, SHAPES))
        before = [p.detach().clone() for p in twins.here]
        state = twins.ours.state_dict()
        server.kill()
        twins.give(drawn(2, SHAPES))
        with pytest.raises(Unavailable):
            twins.ours.step()
        server.restart()
        with pytest.raises(SessionLost):
            twins.ours.step()
        check_parameters(twins.here, before)
        twins.ours.rejoin(state)
        twins.step(drawn(2, SHAPES))
        twins.step(drawn(3, SHAPES))
        assert path_of(twins.ours) == SHARED
        twins.check()


def test_a_worker_that_was_killed_leaves_no_memory_behind(tmp_path: Path) -> None:
    """SIGKILL in the middle of training: the server goes on, and who takes the worker's name takes its place."""
    script = """
import os, signal, sys, torch, farstep
p = torch.nn.Parameter(torch.ones(100_000))
optimizer = farstep.optim.SGD([p], lr=0.5, server=sys.argv[1], session="s", worker="w", kernel="reference")
for step in range(3):
    p.grad = torch.ones(100_000)
    optimizer.step()
print(optimizer.last_step.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with running_server("--unix", str(tmp_path / "s"), loaded=True) as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.unix], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout.strip()) == (-signal.SIGKILL, SHARED)
        assert mappings(server) == 1
        p = torch.nn.Parameter(torch.zeros(100_000))
        heir = farstep.optim.SGD([p], lr=0.5, server=server.unix, session="s", worker="w", kernel="reference")
        assert mappings(server) == 0
        p.grad = torch.ones(100_000)
        heir.step()
        assert (p[0].item(), path_of(heir), mappings(server)) == (-1.0, SHARED, 1)
        heir.close()
        assert mappings(server) == 0
        assert server.log == ""


@pytest.mark.usefixtures("one_thread")  # a fork has no other threads
def test_a_fork_leaves_the_memory_to_its_parent(local: RunningServer) -> None:
    """A forked child that pulls reads into memory of its own, so its parent's next step is as if it had not been."""
    twins = twins_at(local.unix)
    twins.step(drawn(1, SHAPES))
    link = twins.ours

    def pull() -> None:
        for p in twins.here:
            p.data.fill_(7.0)
        link.pull()

    assert in_a_fork(pull) == 0
    twins.step(drawn(2, SHAPES))
    assert path_of(twins.ours) == SHARED
    twins.check()


# -- a server that does not know the memory ---------------------------------------------------------------------------


def forget(server: RunningServer, optimizer: RemoteOptimizer) -> None:
    """Have a server unmap a worker's memory, and remember its writes: as one does that was started again."""
    talk = Conversation(server.unix, None)
    path = f"/v1/sessions/{optimizer.session}/workers/{optimizer.worker}"
    epoch = talk.control("GET", path)["epoch"]
    with pytest.raises(InvalidOption):
        talk.control("PUT", f"{path}/memory", {"epoch": epoch, "key": "0" * 32, "pid": os.getpid(), "fd": 2**31 - 1})
    talk.close()


def test_memory_that_a_server_has_forgotten_is_offered_again(local: RunningServer) -> None:
    """The step succeeds through the same memory, and so do the later ones."""
    twins = twins_at(local.unix)
    twins.step(drawn(1, SHAPES))
    areas = mappings(local)
    for seed in range(2, 5):
        forget(local, twins.ours)
        assert mappings(local) == areas - 1
        twins.step(drawn(seed, SHAPES))
        assert (path_of(twins.ours), mappings(local)) == (SHARED, areas)
        check_parameters(twins.here, twins.there)
    assert twins.ours.version == 4
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("way", ["request", "response"])
def test_a_push_in_memory_that_a_server_has_forgotten_is_applied_once(local: RunningServer, way: str) -> None:
    """Applied or not before the connection broke, the repeated push is the same one, and counts once."""
    with faulty(path_of_url(local.unix) or "") as network:
        twins = twins_at(network.url, timeout_s=1.0)
        twins.step(drawn(1, SHAPES))
        if way == "request":
            network.down = True
        else:
            network.cut_response(after=0, then_down=True)
        twins.give(drawn(2, SHAPES))
        with pytest.raises(Unavailable):
            twins.ours.step()
        twins.theirs.step()
        forget(local, twins.ours)
        network.down = False
        twins.ours.step()
        report = twins.ours.last_step
        assert report is not None
        assert (report.applied, report.version, twins.ours.version) == (True, 2, 2)
        assert report.duplicate is (way == "response")
        check_parameters(twins.here, twins.there)
        for seed in (3, 4):
            twins.step(drawn(seed, SHAPES))
        assert path_of(twins.ours) == SHARED
        twins.check()
        twins.ours.close()


SHARED_PUSH = SharedPush("0123456789abcdef0123456789abcdef", 7)


def writer_to(answer: Callable[[httpx.Request], httpx.Response]) -> Writer:
    """Return a worker's writes in its first epoch, to a server that answers so."""
    server = Conversation("http://box", None, transport=httpx.MockTransport(answer))
    writer = Writer(server, "s", "w0", retry=RetryPolicy(0.0), barrier_s=0.0)
    writer.join(1, "a" * 32)
    return writer


def test_gradients_are_sent_where_a_server_does_not_take_the_memory_again() -> None:
    """The push that named memory is repeated at once with its gradients, and with no other name or content."""
    received: list[tuple[dict[str, Any], bytes]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        gradients = bytearray(12)
        decoder = Decoder(lambda header: [memoryview(gradients)] if "area" not in header else [])
        decoder.feed(request.read())
        received.append((decoder.header, bytes(gradients)))
        if "area" in decoder.header:
            return problem(InvalidRequest("Worker 'w0' shares no such memory.", field="area"))
        reply = {"v": 1, "incarnation": "a" * 32, "version": 1, "receipt": {}, "duplicate": False, "segments": []}
        return httpx.Response(200, headers={"content-type": MSGPACK}, content=b"".join(encode(reply, [])))

    def head(name: WriteName, incarnation: str) -> PushHead:
        return PushHead(name, incarnation, 0, "all", 0, shared=SHARED_PUSH)

    writer, asked = writer_to(answer), list[str]()

    def refused(key: str) -> bool:
        asked.append(key)
        return False

    writer.share_again = refused
    payload = tensor_memory(torch.arange(3.0))
    writer.push(head, [payload], lambda _: [])
    (first, _), (second, gradients) = received
    assert asked == [SHARED_PUSH.key]
    assert {key: first[key] for key in ("area", "fill", "deliver")} == {"area": asked[0], "fill": 7, "deliver": True}
    assert second == {key: value for key, value in first.items() if key not in ("area", "fill", "deliver")}
    assert gradients == bytes(payload)
    assert writer.names.last == 1


def test_another_fault_of_a_push_is_not_taken_for_forgotten_memory() -> None:
    """A refusal that names another field is raised, and nothing is offered again."""
    writer = writer_to(lambda _: problem(InvalidRequest("The header has a key too many.", field="header")))
    writer.share_again = lambda key: pytest.fail(f"{key} was offered again")
    with pytest.raises(InvalidRequest, match="a key too many"):
        writer.push(lambda name, life: PushHead(name, life, 0, "all", 0, shared=SHARED_PUSH), [], lambda _: [])


@pytest.mark.parametrize(
    ("error", "for_good"),
    [
        (Recovering("The session is being read.", retry_after_s=1.5), False),
        (Unavailable("The server is stopping."), False),
        (Busy("The server has no room."), True),
        (InvalidOption("The memory cannot be shared."), True),
    ],
)
def test_a_server_that_recovers_does_not_refuse_memory_for_good(error: FarstepError, for_good: bool) -> None:
    """Memory that cannot be taken at the moment is offered with a later push, other memory never again."""
    answers = [problem(error), httpx.Response(204), httpx.Response(204)]
    server = Conversation("http://box", None, transport=httpx.MockTransport(lambda _: answers.pop(0)))
    sharing = Sharing(server, "/v1/sessions/s/workers/w0", possible=True)
    parameters = drawn(0, SHAPES)
    assert not sharing.offer(1, parameters)
    assert sharing.possible is not for_good
    assert sharing.offer(1, parameters) is not for_good
    assert (sharing.memory is None) is for_good


def test_memory_that_was_given_up_is_known_until_its_push_is_settled() -> None:
    """A push that got no answer may name it still; after that nothing is offered under its key."""
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.read()))
        return httpx.Response(204)

    sharing = Sharing(Conversation("http://box", None, transport=httpx.MockTransport(answer)), "/w", possible=True)
    assert sharing.offer(3, drawn(0, SHAPES))
    key = asked[0]["key"]
    assert not sharing.offer_again("0" * 32)
    sharing.give_up()
    assert sharing.memory is None
    assert sharing.offer_again(key)
    assert asked == [asked[0]] * 2
    os.fstat(asked[0]["fd"])
    sharing.settled()
    assert not sharing.offer_again(key)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(asked[0]["fd"])


# -- where there is none ---------------------------------------------------------------------------------------------


def test_over_tcp_tensors_move_in_bodies(local: RunningServer) -> None:
    """Memory is neither offered nor used."""
    twins = twins_at(local.url)
    areas = mappings(local)
    twins.step(drawn(1, SHAPES))
    assert (path_of(twins.ours), mappings(local)) == ("bodies", areas)
    twins.check()


def test_a_server_without_room_is_used_without_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its refusal is logged once, and every step works."""
    with running_server("--unix", str(tmp_path / "s"), "--max-gib", "0.00125", loaded=True) as server:
        twins = twins_at(server.unix)
        with caplog.at_level(logging.INFO, "farstep.sharing"):
            for seed in range(1, 4):
                twins.step(drawn(seed, SHAPES))
        assert path_of(twins.ours) == "bodies"
        assert [each.name for each in caplog.records].count("farstep.sharing") == 1
        assert "no room" in caplog.text
        twins.check()


def test_sparse_and_small_and_complex_parameters_use_bodies(local: RunningServer) -> None:
    """What shared memory has no place for, or gains nothing from, moves as before."""
    for start in (drawn(0, [(10,)]), drawn(0, [(300, 300)], torch.complex64)):
        twins = Twins("Adagrad", {}, {"kernel": "reference", "server": local.unix}, start=start)
        twins.step(drawn(1, [p.shape for p in start], start[0].dtype))
        assert path_of(twins.ours) == "bodies"
        twins.check()
    twins = Twins("Adagrad", {}, {"kernel": "reference", "server": local.unix}, start=drawn(0, [(400, 400)]))
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 7]]), torch.ones(2, 400), (400, 400), check_invariants=True)
    twins.step([rows.coalesce()])
    assert path_of(twins.ours) == "bodies"
    twins.step(drawn(2, [(400, 400)]))
    assert path_of(twins.ours) == SHARED
    twins.check()


def test_a_session_that_grows_shares_new_memory(local: RunningServer) -> None:
    """What was shared has no room for the new group; the next step shares what has."""
    here = [p.requires_grad_() for p in drawn(0, SHAPES)]
    there = [p.detach().clone().requires_grad_() for p in here]
    new, known = (torch.ones(500, requires_grad=True) for _ in range(2))
    ours = Adagrad(here, server=local.unix, kernel="reference")
    theirs = torch.optim.Adagrad(there, foreach=False)
    for seed in range(1, 5):
        if seed == 3:
            ours.add_param_group({"params": [new]})
            theirs.add_param_group({"params": [known]})
        for ps in ([*here, new], [*there, known]):
            for p, g in zip(ps, drawn(seed, [*SHAPES, (500,)]), strict=True):
                p.grad = g
        ours.step()
        theirs.step()
        assert path_of(ours) == SHARED
    check_parameters([*here, new], [*there, known])
    ours.close()
