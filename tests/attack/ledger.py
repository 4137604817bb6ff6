"""Workers that are killed behind a network that cuts, and a ledger of every step that somebody was told of.

Each worker's gradients are 1 in one element after the other of its own, so the parameters count what was applied. A
step that was acknowledged is counted once. The last step of a worker that was killed may have been applied or not.
"""

from __future__ import annotations

import json
import os
import random
import select
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import torch

from farstep.protocol.consistency import Async, Consistency
from farstep.settings import RemoteOptions
from tests.support.client import training_process
from tests.support.client.training_process import SLOTS, WORKERS
from tests.support.faults import Network, faulty
from tests.support.service.raw import RawClient, tensors_of
from tests.support.service.servers import RunningServer

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload([training_process.__name__])
SILENT_S = 120.0
"""Seconds after which a worker that says nothing is counted as hanging."""


@dataclass
class Ledger:
    """What was acknowledged, and what the session holds.

    Attributes:
        steps: acknowledged steps.
        kills, faults: what was done to workers and to their network.
        lost: acknowledged steps that the parameters do not count.
        doubled: steps that they count and that were neither acknowledged nor under way at a kill.
        hanging: how often all workers said nothing for too long.
        ended: workers that gave up.
    """

    steps: int = 0
    kills: int = 0
    faults: int = 0
    lost: int = 0
    doubled: int = 0
    hanging: int = 0
    ended: int = 0


class Worker:
    """One worker after the other under the same name, and the slots that they were told of.

    Args:
        url: the server.
        number: whose slots are its own.
        session: what it joins.
        mode: the session's.
        remote: further options of its optimizer.

    Attributes:
        counted, unknown: how often it was told of a step of each of its slots, and how often it was killed in one.
    """

    def __init__(
        self,
        url: str,
        number: int,
        *,
        session: str = "ledger",
        mode: Consistency = Async(),  # noqa: B008  # frozen
        remote: RemoteOptions | None = None,
    ) -> None:
        self._place = (url, session, f"w{number}", mode, number, remote)
        self.counted = [0] * SLOTS
        self.unknown = [0] * SLOTS
        self._slot = 0
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = PROCESSES.Pipe()
        arguments = (theirs, *self._place)
        self._process: ForkServerProcess = PROCESSES.Process(target=training_process.train, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._read, self._slot = b"", 0

    def hear(self) -> int:
        """Take note of what it has said, and return how many steps that was."""
        self._read += _available(self.pipe)
        *whole, self._read = self._read.split(b"\n")
        return sum(self._note(json.loads(line)) for line in whole)

    def _note(self, said: dict[str, object]) -> int:
        if "slot" not in said:
            return 0
        self.counted[self._slot] += 1
        self._slot = (self._slot + 1) % SLOTS
        return 1

    @property
    def ended(self) -> bool:
        """Return whether it has ended by itself, which no fault may bring about."""
        return not self._process.is_alive()

    def kill(self) -> int:
        """Kill it, and return the steps that it had still told of; what it was about to step is unknown."""
        self._process.kill()
        self._process.join()
        steps = self.hear()
        self.unknown[self._slot] += 1
        self.pipe.close()
        return steps

    def restart(self) -> None:
        """Start another one in its place."""
        self._start()


def _available(pipe: Connection) -> bytes:
    read = b""
    while select.select([pipe], [], [], 0)[0]:
        chunk = os.read(pipe.fileno(), 65536)
        if not chunk:
            break
        read += chunk
    return read


def attack(server: RunningServer, *, seed: int, steps: int) -> Ledger:
    """Let workers step until so many steps are acknowledged, under faults, and compare with what the session holds."""
    rng, result = random.Random(seed), Ledger()
    with faulty(server.port) as network:
        workers = [Worker(network.url, number) for number in range(WORKERS)]
        while result.steps < steps:
            ready, _, _ = select.select([worker.pipe for worker in workers], [], [], SILENT_S)
            if not ready:
                result.hanging += 1
                break
            heard = sum(worker.hear() for worker in workers)
            result.steps += heard
            for worker in workers:
                if worker.ended:
                    result.ended += 1
                    result.steps += worker.kill()
                    worker.restart()
            if heard and rng.random() < 0.1:
                _disturb(network, rng)
                result.faults += 1
            if heard and rng.random() < 0.01:
                worker = rng.choice(workers)
                result.steps += worker.kill()
                worker.restart()
                result.kills += 1
        for worker in workers:
            result.steps += worker.kill()
    compare(server.url, workers, result)
    return result


def _disturb(network: Network, rng: random.Random) -> None:
    after = rng.choice((0, 1, rng.randint(2, 400), rng.randint(400, 3000)))
    rng.choice((network.cut_request, network.cut_response))(after=after)


def compare(url: str, workers: list[Worker], result: Ledger, *, session: str = "ledger", divisor: int = 1) -> None:
    """Count the steps that are lost or doubled.

    Args:
        url: the server.
        workers: all of the session, which step no more.
        result: takes the numbers.
        session: what they joined.
        divisor: by how much the session divided each gradient.
    """
    with RawClient(url) as raw:
        payload = raw.request("GET", f"/v1/sessions/{session}/contents").payload
    (parameters,) = tensors_of(payload, [torch.zeros(WORKERS * SLOTS)])
    applied = (-parameters * divisor).to(torch.int64).tolist()
    for number, worker in enumerate(workers):
        mine = applied[number * SLOTS : (number + 1) * SLOTS]
        for found, counted, unknown in zip(mine, worker.counted, worker.unknown, strict=True):
            result.lost += max(0, counted - found)
            result.doubled += max(0, found - counted - unknown)
