"""A server that ends at a named place in its own code, as by SIGKILL, and whether anybody can tell afterwards.

    FARSTEP_FAILPOINT=journal.append.written:3    ends the process when it comes there for the third time

Each time a server goes through a small life on its directory, armed from its start, so that places of recovery are
among them: sessions of an earlier life come back, two workers train with barriers, accumulation and a scheduler, a
session is kept by snapshots, one is created and removed, and the server is asked to end. Where it dies it is started
again, unarmed, and the workers go on; then all of it ends with the same bits as in a life that nothing disturbed.
"""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import httpx
import torch
from torch import Tensor

import farstep
from farstep.errors import Recovering, StateRolledBack
from farstep.optim import Adam
from farstep.settings import RemoteOptions
from farstep_service.failpoints import KILLED, VARIABLE
from tests.robustness.twins import PAIR, SHAPES, Case, Ended, Steps, train
from tests.support.client.twins import drawn, parameters
from tests.support.service.raw import RawClient, tensors_of
from tests.support.service.servers import RunningServer

CASE: Final = Case("Adam", PAIR, 2, {"lr": 0.05}, steps=8)
JOURNALED: Final[RemoteOptions] = {"durability": farstep.Journal(sync="group")}
SNAPSHOT_STEPS: Final = 6
SNAPSHOTTED: Final[RemoteOptions] = {"durability": farstep.Snapshot(every_steps=2)}
SMALL: Final = ("--max-journal-gib", "2e-5")
"""Options of a server that lets a snapshot take the place of a journal of 7 KiB."""
ENDED_S: Final = 60.0
MOST: Final = 9
"""How often a place is reached at most before the server ends there."""


@dataclass
class Life:
    """What a life of the server leaves.

    Attributes:
        pair: what each of the two workers has at the end.
        alone: the parameters of the session that is kept by snapshots.
    """

    pair: list[Ended]
    alone: list[Tensor]

    def differences(self, other: Life) -> list[str]:
        """Return where another one has something else."""
        wrong = [
            f"worker {i}: {each}"
            for i, (a, b) in enumerate(zip(self.pair, other.pair, strict=True))
            for each in a.differences(b)
        ]
        if not all(map(torch.equal, self.alone, other.alone)):
            wrong.append("the session that is kept by snapshots")
        return wrong


@dataclass
class Deaths:
    """What became of the deaths at one place.

    Attributes:
        point: the place.
        reached: how often the server ended there.
        missed: how often it did not come there so many times.
        wrong: what was not as in a life that nothing disturbed.
    """

    point: str
    reached: int = 0
    missed: int = 0
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """End a server at one place after the other; `farstep_service.failpoints.NAMES` has all.

    Args:
        server: on a directory of its own; it runs.
        seed: decides how often the server comes to a place before it ends there.
        most: how often that is at most.
    """

    def __init__(self, server: RunningServer, seed: int, most: int = MOST) -> None:
        self._server = server
        self._most = most
        self._rng = random.Random(seed)
        self._lives = 0
        self._kept = ""
        self._calm = self._live(server.url)

    def end_at(self, point: str, times: int = 1) -> Deaths:
        """End the server at a place so many times, and compare each life with the calm one."""
        deaths = Deaths(point)
        while deaths.reached < times and not deaths.wrong and deaths.missed < 2 * times:
            first = 1 if deaths.missed > deaths.reached else self._rng.randint(1, self._most)
            self._end_once(deaths, first)
        return deaths

    def _end_once(self, deaths: Deaths, k: int) -> None:
        server = self._server
        server.kill()  # whatever it had in memory, and only there, is gone
        with ThreadPoolExecutor(1) as threads:
            try:
                server.restart({VARIABLE: f"{deaths.point}:{k}"})
            except RuntimeError:  # it ended before it answered
                code = server.process.wait(ENDED_S)
                life = threads.submit(self._live, server.url)
            else:
                life = threads.submit(self._live, server.url)
                life.add_done_callback(lambda _: server.process.terminate())
                code = server.process.wait(ENDED_S)
            died = code == KILLED
            if died:
                server.restart()
            self._compare(deaths, life, k)
            if not died and code:
                deaths.wrong.append(f"{k}: the server ended with {code}")
        server.restart()
        self._check_kept(deaths, k)
        deaths.reached += died
        deaths.missed += not died

    def _compare(self, deaths: Deaths, life: Future[Life], k: int) -> None:
        try:
            lived = life.result(ENDED_S)
        except Exception as error:  # whatever a worker sees
            deaths.wrong.append(f"{k}: {type(error).__name__}: {error}")
            return
        deaths.wrong += [f"{k}: {each}" for each in self._calm.differences(lived)]

    def _check_kept(self, deaths: Deaths, k: int) -> None:
        """Compare what a session is after the server was started again with what its workers had at the end."""
        like = [torch.zeros(shape) for shape in SHAPES]
        with RawClient(self._server.url) as raw:
            answer = raw.request("GET", f"/v1/sessions/{self._kept}/contents")
            while answer.status == 503 and isinstance(answer.error, Recovering):
                answer = raw.request("GET", f"/v1/sessions/{self._kept}/contents")
        if answer.status != 200:
            deaths.wrong.append(f"{k}: the session is not there: {answer.body!r:.200}")
        elif not all(map(torch.equal, tensors_of(answer.payload, like), self._calm.pair[0].parameters)):
            deaths.wrong.append(f"{k}: the session came back with other parameters")

    def _live(self, url: str) -> Life:
        """Live once: train, keep by snapshots, create and remove."""
        self._lives += 1
        before, self._kept = self._kept, f"pair{self._lives}"
        pair = train(url, self._kept, CASE, JOURNALED, Steps())
        alone = _alone(url, f"alone{self._lives}")
        for name in filter(None, (before, f"alone{self._lives}")):
            _remove(url, name)
        return Life(pair, alone)


def _alone(url: str, session: str) -> list[Tensor]:
    """Train by the version that the session has, so that steps that were lost and announced are taken again."""
    own = parameters(drawn(0, SHAPES))
    place: RemoteOptions = {"server": url, "session": session, "kernel": "reference", **SNAPSHOTTED}
    optimizer = Adam(own, lr=0.05, foreach=False, **place)
    while optimizer.version < SNAPSHOT_STEPS:
        for p, gradient in zip(own, drawn(optimizer.version + 1, SHAPES), strict=True):
            p.grad = gradient
        try:
            optimizer.step()
        except StateRolledBack:
            optimizer.rejoin()
    ended = [p.detach().clone() for p in own]
    optimizer.close()
    return ended


def _remove(url: str, session: str) -> None:
    """Remove a session, however often the server ends meanwhile."""
    with httpx.Client(trust_env=False) as client:
        while True:
            with suppress(httpx.TransportError):
                answer = client.delete(f"{url}/v1/sessions/{session}")
                if answer.status_code in (200, 204, 404, 410):
                    return
