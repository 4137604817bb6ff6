"""Workers come, die and return, a network loses, repeats and reorders, modes change: all of it against `reference.py`.

Nothing here has a tensor, a clock or a socket. `MODEL_EXAMPLES` says how many examples are tried (`make model`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import product

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from farstep.errors import BarrierTimeout, FarstepError
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync
from farstep.protocol.messages import PushHead, WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import (
    Answer,
    ChangeMode,
    Coordinator,
    Event,
    Heartbeat,
    Instruction,
    Join,
    Leave,
    Result,
    TakeStep,
    Tick,
)
from farstep_service.coordinator import Push as Pushed
from farstep_service.coordinator.written import read_back, write_down
from tests.coordinator.reference import GivenUp, Outcomes, Push, Reference, Told
from tests.coordinator.table import Table, result_of

NAMES = ("w0", "w1", "w2", "w3")
MODES: Sequence[Consistency] = (
    Async(lease_s=8.0),
    Sync(workers=2, deadline_s=4.0, lease_s=8.0),
    Sync(workers=4, deadline_s=4.0, lease_s=2.0),
    Sync(workers=4, quorum=2, deadline_s=4.0, lease_s=8.0),
    Sync(workers=3, quorum=2, deadline_s=16.0, lease_s=8.0, late="fold"),
    Sync(workers="live", deadline_s=4.0, lease_s=8.0),
    Sync(workers="live", deadline_s=16.0, lease_s=8.0, late="fold"),
    Bounded(staleness=0, deadline_s=16.0, lease_s=8.0),
    Bounded(staleness=0, deadline_s=4.0, lease_s=16.0),
    Bounded(staleness=1, deadline_s=4.0, lease_s=8.0),
)


class Subject:
    """The coordinator of a session, with a count in the place of tensors."""

    def __init__(self, mode: Consistency) -> None:
        self.coordinator = Table(mode, ()).coordinator
        self.roster = self.coordinator.roster
        self.applied: list[WriteName] = []

    def join(self, name: str, now: float) -> Outcomes:
        self.coordinator.check_join(name, now)
        return self.happen(Join(name), now)

    def leave(self, name: str, now: float) -> Outcomes:
        return self.happen(Leave(name), now)

    def switch(self, mode: Consistency, now: float) -> Outcomes:
        self.coordinator.check_mode(mode, now)
        return self.happen(ChangeMode(mode), now)

    def push(self, push: Push, now: float) -> Outcomes | str:
        name, content = WriteName(push.worker, push.epoch, push.sequence), str(push.content)
        self.coordinator.check_write(name, "here")
        if self.coordinator.seen(name, "here", content) is not None:
            self.happen(Heartbeat(name.worker), now)
            return "duplicate"
        if self.coordinator.holds(name, content):
            return "joins"
        head = PushHead(name, "here", push.base, segments=[] if push.skip else None, skip=push.skip)
        return self.happen(Pushed(head, content), now)

    def tick(self, now: float) -> Outcomes:
        return self.happen(Tick(), now)

    def happen(self, event: Event, now: float) -> Outcomes:
        """Let an event happen, written down and read back, and everything that follows from it."""
        event = read_back(write_down(event))
        sent = {each.head.name: each for each in self.coordinator.state.waiting.values()}
        if isinstance(event, Pushed):
            sent[event.head.name] = event
        outcomes: Outcomes = {}
        following: Event | Result | None = event
        while following is not None:
            instructions, following = self.coordinator.apply(following, now), None
            for each in instructions:
                if isinstance(each, Answer):
                    outcomes[push_of(sent[each.name])] = told(each.result)
                elif isinstance(each, TakeStep):
                    self.applied += each.pushes
                assert_equal(read_back(write_down(each)), each)
                following = following or read_back(write_down(result_of(each, self.coordinator.version)))
        return outcomes

    def restart(self) -> None:
        """Go on with a coordinator that was written down and read back."""
        written = write_down(self.coordinator.state)
        self.coordinator = Coordinator(read_back(written))
        assert write_down(self.coordinator.state) == written
        self.roster = self.coordinator.roster


def assert_equal(one: Instruction, other: Instruction) -> None:
    """Compare two instructions, whose errors are equal if they say the same."""
    if isinstance(one, Answer) and isinstance(other, Answer) and isinstance(one.result, FarstepError):
        assert isinstance(other.result, FarstepError)
        assert (one.name, one.result.to_problem()) == (other.name, other.result.to_problem())
    else:
        assert one == other


def push_of(pushed: Pushed) -> Push:
    name, base, skip = pushed.head.name, pushed.head.base, pushed.head.skip
    return Push(name.worker, name.epoch, name.sequence, int(pushed.fingerprint), base, skip)


def told(result: Receipt | FarstepError) -> Told | GivenUp | str:
    """Return what a worker learns, in the words of the reference."""
    if isinstance(result, BarrierTimeout):
        missing = result.extra["missing"]
        assert isinstance(missing, list)
        return GivenUp(tuple(missing))
    if isinstance(result, FarstepError):
        return result.code
    return Told(
        result.version,
        result.staleness,
        result.applied,
        result.contributors,
        result.divisor,
        result.reason,
    )


def answer_of(call: Callable[[], Outcomes | str]) -> Outcomes | str:
    """Return what a call returns, or the code of its error."""
    try:
        return call()
    except FarstepError as error:
        return error.code


WHICH = st.integers(0, len(NAMES) - 1)
Made = tuple[int, int, int, int, int, bool]
MADE: Sequence[Made] = [
    (which, ahead, older, content, behind, skip)
    for which, (ahead, older), content, behind, skip in product(
        range(len(NAMES)),
        [*[(0, 0)] * 8, (-1, 0), (1, 0), (0, 1)],
        [0, 0, 1],
        [0, 0, 0, 1, 2, 9],
        [False] * 4 + [True],
    )
]
"""How a push is made: by whom, how far from the next sequence, of which epoch, content, how old, and if it skips."""


class Network(RuleBasedStateMachine):
    """After each event both sides have told the same workers the same things."""

    @initialize(mode=st.sampled_from(MODES), joining=st.integers(1, 4))
    def begin(self, mode: Consistency, joining: int) -> None:
        self.subject, self.reference, self.now = Subject(mode), Reference(mode), 0.0
        self.sent: list[Push] = []
        for which in range(joining):
            self.join(which)

    @rule(which=WHICH)
    def join(self, which: int) -> None:
        """A worker joins: a new one, or one that died and returns with a new epoch."""
        expected = self.reference.join(NAMES[which])
        assert answer_of(lambda: self.subject.join(NAMES[which], self.now)) == expected

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        if NAMES[which] in self.reference.workers:
            assert self.subject.leave(NAMES[which], self.now) == self.reference.leave(NAMES[which])

    @rule(made=st.sampled_from(MADE))
    def send(self, made: Made) -> None:
        """A worker makes a push, most often the next one, and it arrives at once, or first of all."""
        which, ahead, older, content, behind, skip = made
        worker = self.reference.workers.get(NAMES[which])
        epoch, last = (worker.epoch, len(worker.done)) if worker else (1, 0)
        base = max(0, self.reference.version - behind)
        push = Push(NAMES[which], max(1, epoch - older), max(1, last + 1 + ahead), content, base, skip)
        self.sent.append(push)
        self.deliver(push)

    @rule(which=WHICH, content=st.sampled_from([0, 1]))
    def lose(self, which: int, content: int) -> None:
        """A worker makes a push that is on its way for long, or lost."""
        worker = self.reference.workers.get(NAMES[which])
        if worker:
            base = self.reference.version
            self.sent.append(Push(NAMES[which], worker.epoch, len(worker.done) + 1, content, base, False))

    @rule(number=st.integers(0, 30))
    def arrive(self, number: int) -> None:
        """What was sent some time ago arrives, for the first time or once more."""
        if number < len(self.sent):
            self.deliver(self.sent[-1 - number])

    def deliver(self, push: Push) -> None:
        expected = self.reference.push(push)
        assert answer_of(lambda: self.subject.push(push, self.now)) == expected

    @rule(mode=st.sampled_from(MODES))
    def switch(self, mode: Consistency) -> None:
        expected = self.reference.switch(mode)
        assert answer_of(lambda: self.subject.switch(mode, self.now)) == expected

    @rule()
    def restart(self) -> None:
        """The process ends, and another one goes on with what was written down."""
        self.subject.restart()

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 9.0, 20.0, 5000.0]))
    def time_passes(self, seconds: float) -> None:
        """The alarm rings when the machines asked for it, and never too late."""
        target = self.now + seconds
        while (alarm := self.subject.coordinator.deadline) is not None and alarm <= target:
            self.at(max(alarm, self.now))
        expected = self.at(target)
        assert expected == {}

    def at(self, now: float) -> Outcomes:
        expected = self.reference.pass_time(now - self.reference.now)
        self.now = now
        assert self.subject.tick(now) == expected
        return expected

    @invariant()
    def both_stand_at_the_same_place(self) -> None:
        reference, subject = self.reference, self.subject
        assert subject.coordinator.version == reference.version
        assert subject.roster.names() == sorted(reference.workers)
        assert len(subject.roster) == len(reference.workers)
        for name, worker in reference.workers.items():
            assert subject.roster.epoch(name) == worker.epoch
            assert subject.roster.sequence(name) == len(worker.done)
            assert subject.roster.is_live(name) == reference.live(worker)
            assert subject.coordinator.waits(name) == (worker.waiting is not None)

    @invariant()
    def nothing_is_applied_twice(self) -> None:
        assert len(set(self.subject.applied)) == len(self.subject.applied)


EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "2000"))
TestNetwork = pytest.mark.timeout(1800)(Network.TestCase)
TestNetwork.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
