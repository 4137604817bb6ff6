"""A server that is killed again and again under load, and a ledger of every step that a worker was told of.

    4 worker processes ──► server ◄── SIGKILL at a random moment, started again on its directory and port

Each worker's gradients are 1 in one element after the other of its own, so that the parameters count what was applied:
a step that was acknowledged is counted once, and the version of the session is the number of steps. Workers notice
nothing: they send a push again under its name until the server answers. Now and then one is killed along with the
server; its last step may have been applied or not.
"""

from __future__ import annotations

import random
import select
import time
from dataclasses import dataclass
from typing import Final

import torch

from farstep.protocol.consistency import Async, Consistency, Sync
from farstep.settings import RemoteOptions
from tests.attack.ledger import SILENT_S, Ledger, Worker, compare
from tests.support.client.training_process import SLOTS, WORKERS
from tests.support.service.raw import RawClient, tensors_of
from tests.support.service.servers import RunningServer

SESSION: Final = "ledger"
ROTATING: Final = ("--max-journal-gib", "1e-3")
"""Options of a server that lets a snapshot take the place of a journal of 350 KiB, so that it is killed within some."""
LONGEST_S: Final = 0.1
"""How long the server lives at most, once every worker has been told of a step."""
AT_ONCE: Final = 0.15
"""How often it is killed as soon as it answers, so that it dies again while it is still recovering."""
WORKER_TOO: Final = 0.1
"""How often a worker is killed along with it."""
MODES: Final[dict[str, tuple[Consistency, int]]] = {
    "async": (Async(), 1),
    "sync": (Sync(workers=WORKERS, deadline_s=60.0), WORKERS),
}
"""The modes, and by how much each divides the gradient of one worker."""


@dataclass
class Campaign(Ledger):
    """What became of a campaign.

    Attributes:
        server_kills: how often the server was killed.
        wrong_versions: how often the session's version was not the number of steps that its parameters count.
        slowest_s: the longest time from a kill until all workers had been told of a step again.
    """

    server_kills: int = 0
    wrong_versions: int = 0
    slowest_s: float = 0.0

    @property
    def broken(self) -> bool:
        """Return whether a promise was broken."""
        return bool(self.lost or self.doubled or self.hanging or self.ended or self.wrong_versions)


def attack(server: RunningServer, *, seed: int, kills: int, mode: str, remote: RemoteOptions | None = None) -> Campaign:
    """Kill a server so many times while four processes step, and compare what they heard with what it holds.

    Args:
        server: keeps its sessions in a directory.
        seed: decides when.
        kills: how often.
        mode: a name of `MODES`.
        remote: further options of the workers' optimizers.
    """
    rng, result = random.Random(seed), Campaign()
    consistency, divisor = MODES[mode]
    workers = [
        Worker(server.url, number, session=SESSION, mode=consistency, remote=remote) for number in range(WORKERS)
    ]
    try:
        while result.server_kills < kills and _all_step(workers, result):
            _listen(workers, result, rng.uniform(0, LONGEST_S))
            began = time.monotonic()
            while result.server_kills < kills:
                server.kill()
                result.server_kills += 1
                if rng.random() < WORKER_TOO:
                    worker = rng.choice(workers)
                    result.steps += worker.kill()
                    result.kills += 1
                    worker.restart()
                server.restart()
                if rng.random() >= AT_ONCE:
                    break
            if _all_step(workers, result):
                result.slowest_s = max(result.slowest_s, time.monotonic() - began)
    finally:
        for worker in workers:
            result.steps += worker.kill()
    if result.broken:
        return result
    compare(server.url, workers, result, session=SESSION, divisor=divisor)
    result.wrong_versions += _version_is_wrong(server.url)
    return result


def _all_step(workers: list[Worker], result: Campaign) -> bool:
    """Return whether every worker is told of a step; False if one says nothing for too long, or has given up."""
    waiting = {worker.pipe: worker for worker in workers}
    while waiting:
        ready, _, _ = select.select([worker.pipe for worker in workers], [], [], SILENT_S)
        if not ready:
            result.hanging += 1
            return False
        for worker in workers:
            if heard := worker.hear():
                result.steps += heard
                waiting.pop(worker.pipe, None)
            if worker.ended:
                result.ended += 1
                return False
    return True


def _listen(workers: list[Worker], result: Campaign, seconds: float) -> None:
    """Take note of what workers say for a time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        select.select([worker.pipe for worker in workers], [], [], left)
        result.steps += sum(worker.hear() for worker in workers)


def _version_is_wrong(url: str) -> bool:
    """Return whether the version is another one than the number of steps that the parameters hold."""
    with RawClient(url) as raw:
        answer = raw.request("GET", f"/v1/sessions/{SESSION}/contents")
    (parameters,) = tensors_of(answer.payload, [torch.zeros(WORKERS * SLOTS)])
    return int(answer.header["version"]) != -int(parameters.sum(dtype=torch.float64))
