"""What modes, members and receipts promise, said again in the plainest way: everything is looked up, nothing is kept.

It shares the options (`farstep.protocol.consistency`) with what it is compared to, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from farstep.protocol.consistency import Async, Bounded, Consistency, Sync

FORGOTTEN_AFTER_S = 3600.0


@dataclass(frozen=True)
class Push:
    """A push on its way; it may arrive never, later, or twice."""

    worker: str
    epoch: int
    sequence: int
    content: int
    base: int
    skip: bool


@dataclass
class Worker:
    """One member. `arrived` is when its waiting push came and how many came before it."""

    epoch: int
    until: float
    clock: int
    done: list[tuple[Push, object]] = field(default_factory=list)
    waiting: Push | None = None
    arrived: tuple[float, int] = (0.0, 0)
    lapsed: float | None = None
    returned: bool = False


@dataclass(frozen=True)
class Told:
    """A receipt."""

    version: int
    staleness: int
    applied: bool
    contributors: tuple[str, ...]
    divisor: int
    reason: str


@dataclass(frozen=True)
class GivenUp:
    """Word that a push waited in vain, and for whom."""

    missing: tuple[str, ...]


Outcomes = dict[Push, Told | GivenUp | str]


class Reference:
    """One session."""

    def __init__(self, mode: Consistency) -> None:
        self.mode = mode
        self.now = 0.0
        self.version = 0
        self.steps: list[tuple[int, set[tuple[str, int]]]] = []
        self.least = 0
        self.forgotten = 0
        self.count = 0
        self.began = 0.0
        self.workers: dict[str, Worker] = {}
        self.applied: list[Push] = []

    # -- events -----------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> Outcomes:
        self.now += seconds
        return self.settle()

    def join(self, name: str) -> Outcomes | str:
        """Return what the joining decided, or the error's code."""
        self.look()
        outcomes = self.withdraw(name)
        full = isinstance(self.mode, Sync) and name not in self.workers and len(self.workers) == self.mode.workers
        gone = {each for each, w in self.workers.items() if self.old(w)}
        if full:
            lapsed = sorted(each for each, w in self.workers.items() if not self.live(w))
            if not lapsed:
                return "session_full"
            gone.add(lapsed[0])
        for each in gone - {name}:
            self.drop(each)
        before = self.workers.pop(name, None)
        self.look()
        epoch = (before.epoch if before else self.forgotten) + 1
        self.workers[name] = Worker(epoch, self.now + self.mode.lease_s, self.least)
        return outcomes | self.settle()

    def leave(self, name: str) -> Outcomes:
        outcomes = self.withdraw(name)
        self.drop(name)
        return outcomes | self.settle()

    def switch(self, mode: Consistency) -> Outcomes | str:
        """Return what the new mode decided, or the error's code."""
        self.look()
        if mode == self.mode:
            return {}
        if isinstance(mode, Sync) and mode.workers != "live":
            lapsed = sorted(each for each, w in self.workers.items() if not self.live(w))
            if len(self.workers) - len(lapsed) > mode.workers:
                return "session_full"
            for each in lapsed[: max(0, len(self.workers) - mode.workers)]:
                self.drop(each)
        self.mode, self.steps, self.least, self.began = mode, [], 0, self.now
        for name in sorted(self.workers):
            w = self.workers[name]
            w.clock, w.returned = 0, False
            if w.waiting:
                w.arrived = self.now, self.next()
            elif self.live(w):
                w.until = self.now + mode.lease_s
        return self.settle()

    def push(self, push: Push) -> Outcomes | str:
        """Return what the push decided; or `duplicate`, `joins`, or an error's code."""
        self.look()
        w = self.workers.get(push.worker)
        if w is None or w.epoch != push.epoch:
            return "fenced"
        if push.sequence > len(w.done) + 1:
            return "sequence_gap"
        earlier = w.done[push.sequence - 1][0] if push.sequence <= len(w.done) else w.waiting
        if earlier is not None and earlier.content != push.content:
            return "idempotency_mismatch"
        self.hear(w)
        if earlier is not None:
            return "joins" if earlier is w.waiting else "duplicate"
        if isinstance(self.mode, Sync) and self.mode.partial and self.mode.late == "refuse" and self.is_late(push):
            return {push: self.commit(push, (), 1, "late")}
        if not any(each.waiting for each in self.workers.values()):
            self.began = self.now
        w.waiting, w.arrived = push, (self.now, self.next())
        return self.settle()

    # -- decisions --------------------------------------------------------------------------------------------------

    def settle(self) -> Outcomes:
        """Decide until there is nothing to decide."""
        outcomes: Outcomes = {}
        while True:
            self.look()
            decided = self.decide()
            if not decided:
                return outcomes
            outcomes |= decided

    def decide(self) -> Outcomes:
        waiting = sorted((w for w in self.workers.values() if w.waiting), key=lambda w: w.arrived)
        if not waiting:
            return {}
        match self.mode:
            case Async():
                return self.take(waiting[:1])
            case Bounded():
                return self.decide_bounded(self.mode, waiting)
            case Sync():
                return self.decide_sync(self.mode, waiting)

    def decide_bounded(self, mode: Bounded, waiting: list[Worker]) -> Outcomes:
        for w in waiting:
            assert w.waiting
            if w.clock <= self.least + mode.staleness:
                returned, w.returned = w.returned, False
                n = sum(self.live(each) for each in self.workers.values())
                if returned and self.version - w.waiting.base > 2 * (mode.staleness + 1) * (n - 1):
                    return self.answer(w, self.commit(w.waiting, (), 1, "stale"))
                return self.take([w])
        for w in waiting:
            if self.now >= w.arrived[0] + mode.deadline_s:
                slow = [n for n, o in self.workers.items() if self.live(o) and o.clock < w.clock - mode.staleness]
                return self.answer(w, GivenUp(tuple(sorted(slow))))
        return {}

    def decide_sync(self, mode: Sync, waiting: list[Worker]) -> Outcomes:
        others = [w for w in self.workers.values() if not w.waiting]
        over = self.now >= self.began + mode.deadline_s
        if mode.workers == "live":
            if over:
                for w in others:
                    w.until = -math.inf
            return self.take(waiting) if over or not any(map(self.live, others)) else {}
        if len(waiting) >= (mode.quorum or mode.workers):
            return self.take(waiting)
        if not over:
            return {}
        for w in others:
            w.until = -math.inf
        missing = tuple(sorted(name for name, w in self.workers.items() if not w.waiting))
        outcomes: Outcomes = {}
        for w in waiting:
            outcomes |= self.answer(w, GivenUp(missing))
        return outcomes

    def take(self, waiting: list[Worker]) -> Outcomes:
        """Take a step of these, or skip it."""
        pushes = sorted((w.waiting for w in waiting if w.waiting), key=lambda push: push.worker)
        names = tuple(push.worker for push in pushes)
        skipped = any(push.skip for push in pushes)
        before = self.version
        self.version += not skipped
        outcomes: Outcomes = {}
        for push in pushes:
            reason = "skipped" if skipped else ""
            told = self.commit(push, () if skipped else names, len(pushes), reason, applied=not skipped, before=before)
            outcomes |= self.answer(self.workers[push.worker], told)
            self.workers[push.worker].clock += 1
        if not skipped:
            self.steps.append((self.version, {(push.worker, push.epoch) for push in pushes}))
            self.applied += pushes
        return outcomes

    def commit(
        self,
        push: Push,
        contributors: tuple[str, ...],
        divisor: int,
        reason: str,
        *,
        applied: bool = False,
        before: int | None = None,
    ) -> Told:
        base_to = self.version if before is None else before
        told = Told(self.version, base_to - push.base, applied, contributors, divisor, reason)
        self.workers[push.worker].done.append((push, told))
        return told

    # -- words ------------------------------------------------------------------------------------------------------

    def live(self, w: Worker) -> bool:
        return w.waiting is not None or self.now < w.until

    def is_late(self, push: Push) -> bool:
        return any(v > push.base and (push.worker, push.epoch) not in who for v, who in self.steps)

    def old(self, w: Worker) -> bool:
        return w.lapsed is not None and self.now - w.lapsed >= FORGOTTEN_AFTER_S

    def look(self) -> None:
        """See who has lapsed, and how far the slowest live worker is."""
        for w in self.workers.values():
            if not self.live(w) and w.lapsed is None:
                w.lapsed = self.now
        clocks = [w.clock for w in self.workers.values() if self.live(w)]
        self.least = max([self.least, min(clocks)]) if clocks else self.least

    def hear(self, w: Worker) -> None:
        if not self.live(w):
            w.clock, w.returned = max(w.clock, self.least), True
        w.lapsed, w.until = None, self.now + self.mode.lease_s

    def answer(self, w: Worker, outcome: Told | GivenUp | str) -> Outcomes:
        assert w.waiting
        push, w.waiting = w.waiting, None
        w.until = self.now + self.mode.lease_s
        return {push: outcome}

    def withdraw(self, name: str) -> Outcomes:
        w = self.workers.get(name)
        return self.answer(w, "fenced") if w and w.waiting else {}

    def drop(self, name: str) -> None:
        self.forgotten = max(self.forgotten, self.workers.pop(name).epoch)
        self.look()

    def next(self) -> int:
        self.count += 1
        return self.count
