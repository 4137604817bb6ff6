"""Steps through shared memory: the same bits, applied once, and bodies wherever memory cannot be used."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import farstep
from farstep.errors import NonFinite, SessionLost, Unavailable
from farstep.optim import Adagrad, RemoteOptimizer
from farstep.protocol.unix import path_of_url
from farstep.settings import RemoteOptions
from tests.parity.cases import STEPPED
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
