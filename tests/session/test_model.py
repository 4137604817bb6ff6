"""A network that loses, repeats and reorders, against a model of the promise: each write once, receipts for ever.

Writes are pushes, and param groups that the session grows by.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from farstep.errors import (
    BarrierTimeout,
    FarstepError,
    Fenced,
    IdempotencyMismatch,
    InvalidOption,
    NonFinite,
    OptionsDiffer,
    SequenceGap,
    TensorMismatch,
)
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.session import Outcomes
from tests.session.writers import Twin, Writer, equal, new_session, parameters, sync, values

DEADLINE_S = 10.0
BAD = 3
"""The content that holds NaN."""
LRS = (0.1, 0.3, 0.4)
"""Learning rates of groups, by content."""
SKIP = 4
"""The content of a push that skips its step."""


@dataclass(frozen=True)
class Message:
    """A push on its way, or a param group; it may arrive never, later, or twice.

    Attributes:
        groups: how many the worker knows when it makes the message; a group that is added has this number.
    """

    name: WriteName
    content: int
    groups: int
    adds: bool = False


@dataclass
class Page:
    known: int
    epoch: int = 0
    last: int = 0
    done: dict[int, Message | None] = field(default_factory=dict)
    knew: dict[int, int] = field(default_factory=dict)
    waiting: Message | None = None

    def commit(self, message: Message) -> None:
        """Note a write that happened, and how many groups the worker knew with it."""
        self.last += 1
        self.done[self.last], self.knew[self.last] = message, self.known


class Model:
    """What the session promises, in a few lines.

    Args:
        workers: how many make a step; 1 is async.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pages: dict[str, Page] = {}
        self.steps: list[tuple[Message, ...]] = []
        self.groups: list[int] = [0]
        self.skipped: set[WriteName] = set()
        self.deadline: float | None = None
        self.forgotten = 0  # the highest epoch of a worker that left

    def expect(self, message: Message, now: float) -> type[FarstepError] | str:
        """Return the error a write gets, or what becomes of it, having done it.

        That is `duplicate`, `joins`, `waits`, `learned`, `applied` or `skipped`.
        """
        page, name = self.pages.get(message.name.worker, Page(1)), message.name
        if name.epoch != page.epoch:
            return Fenced
        if name.sequence > page.last + 1:
            return SequenceGap
        if not message.adds:
            if name.sequence > page.last and page.known < len(self.groups):
                return Fenced
            if message.content != SKIP and message.groups != page.knew.get(name.sequence, page.known):
                return TensorMismatch
        if name.sequence <= page.last:
            return "duplicate" if page.done[name.sequence] == message else IdempotencyMismatch
        if message.adds:
            return self.expect_group(page, message)
        if page.waiting:
            return "joins" if page.waiting == message else IdempotencyMismatch
        if message.content == BAD:
            return NonFinite
        page.waiting = message
        together = [page for _, page in sorted(self.pages.items()) if page.waiting]
        if len(together) < self.workers:
            self.deadline = now + DEADLINE_S if len(together) == 1 else self.deadline
            return "waits"
        step = tuple(page.waiting for page in together if page.waiting)
        skipped = any(each.content == SKIP for each in step)
        if skipped:
            self.skipped = {each.name for each in step}
        else:
            self.steps.append(step)
        for each in together:
            assert each.waiting
            each.commit(each.waiting)
            each.waiting = None
        self.deadline = None
        return "skipped" if skipped else "applied"

    def expect_group(self, page: Page, message: Message) -> type[FarstepError] | str:
        """Return what becomes of a group: the session's own, one that it has, or another one in its place."""
        if message.groups > page.known:
            return InvalidOption
        there = message.groups < len(self.groups)
        if there and self.groups[message.groups] != message.content:
            return OptionsDiffer
        if page.waiting:
            return IdempotencyMismatch
        page.known = max(page.known, message.groups + 1)
        page.commit(message)
        if there:
            return "learned"
        self.groups.append(message.content)
        self.steps.append((message,))
        return "applied"

    def withdraw(self) -> None:
        """Note that a push that waited may have been taken out."""
        if not any(page.waiting for page in self.pages.values()):
            self.deadline = None


class Network(RuleBasedStateMachine):
    """Workers join, leave, send and send again; after each event the session is what the model says."""

    messages = Bundle("messages")

    @initialize(workers=st.sampled_from([1, 1, 2, 3]))
    def begin(self, workers: int) -> None:
        self.session = new_session(
            names=("b",), consistency=sync(workers, DEADLINE_S) if workers > 1 else {"mode": "async"}
        )
        self.model, self.now, self.receipts = Model(workers), 0.0, dict[WriteName, Receipt]()
        self.names = [f"w{index}" for index in range(workers if workers > 1 else 3)]
        for name in self.names:
            self.join(name)
        Writer(self.session, "w0", 1).put({"param": values(self.session, 0)}, initial=True)
        page = self.model.pages["w0"]
        page.last, page.done[1], page.knew[1] = 1, None, 1
        self.twin = Twin(parameters(self.session))
        self.replayed = 0

    def join(self, name: str) -> None:
        epoch, outcomes = self.session.join(name, self.now)
        page = self.model.pages.get(name, Page(1, self.model.forgotten))
        assert epoch == page.epoch + 1
        self.expect_fenced(page, outcomes)
        self.model.pages[name] = Page(len(self.model.groups), epoch)
        self.model.withdraw()

    def expect_fenced(self, page: Page, outcomes: Outcomes) -> None:
        assert outcomes.keys() == ({page.waiting.name} if page.waiting else set())
        assert all(isinstance(outcome.result, Fenced) for outcome in outcomes.values())

    @rule(which=st.integers(0, 2))
    def join_again(self, which: int) -> None:
        self.join(self.names[which % len(self.names)])

    @rule(which=st.integers(0, 2))
    def leave_and_join(self, which: int) -> None:
        name = self.names[which % len(self.names)]
        page = self.model.pages[name]
        self.expect_fenced(page, self.session.leave(name, page.epoch, self.now))
        del self.model.pages[name]
        self.model.forgotten = max(self.model.forgotten, page.epoch)
        self.model.withdraw()
        self.join(name)

    @rule(
        target=messages,
        which=st.integers(0, 2),
        ahead=st.sampled_from([0, 0, 0, 0, 0, 0, -1, -2, 1]),
        older=st.sampled_from([0, 0, 0, 0, 0, 1]),
        content=st.sampled_from([0, 0, 1, 1, 2, BAD, SKIP]),
    )
    def send(self, which: int, ahead: int, older: int, content: int) -> Message:
        """Make a push, most often the next one, and deliver it."""
        name = self.names[which % len(self.names)]
        page = self.model.pages[name]
        sequence = max(1, page.last + 1 + ahead)
        known = 0 if content == SKIP else page.knew.get(sequence, page.known)  # a skip names no groups
        message = Message(WriteName(name, page.epoch - older, sequence), content, known)
        self.deliver(message)
        return message

    @rule(
        target=messages,
        which=st.integers(0, 2),
        ahead=st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1]),
        group=st.sampled_from([0, 0, 0, 0, -1, 1]),
        content=st.sampled_from([1, 1, 1, 2]),
    )
    def add(self, which: int, ahead: int, group: int, content: int) -> Message:
        """Add a param group, most often the first that the worker does not know, and deliver it."""
        name = self.names[which % len(self.names)]
        page = self.model.pages[name]
        sequence = max(1, page.last + 1 + ahead)
        message = Message(WriteName(name, page.epoch, sequence), content, max(1, page.known + group), adds=True)
        self.deliver(message)
        return message

    @rule(message=messages)
    def deliver(self, message: Message) -> None:
        """Deliver a write, for the first time or once more."""
        waiting = {each.waiting.name for each in self.model.pages.values() if each.waiting}
        expected = self.model.expect(message, self.now)
        if isinstance(expected, type):
            with pytest.raises(expected):
                self.write(message)
            return
        outcomes = self.write(message)
        if message.adds and expected == "applied":
            assert outcomes.keys() == {message.name} | waiting
            assert all(isinstance(outcomes[name].result, Fenced) for name in waiting)
            for page in self.model.pages.values():
                page.waiting = None
            self.model.withdraw()
        if expected == "learned" or (message.adds and expected == "applied"):
            own = outcomes[message.name].result
            assert isinstance(own, Receipt)
            assert (own.version, own.applied) == (len(self.model.steps), expected == "applied")
            self.receipts[message.name] = own
        elif expected in ("joins", "waits"):
            assert outcomes == {}
        elif expected == "duplicate":
            assert outcomes.keys() == {message.name}
            assert outcomes[message.name].duplicate
            known = self.receipts.get(message.name)
            assert known is None or outcomes[message.name].result == known
        elif expected == "skipped":
            assert outcomes.keys() == self.model.skipped
            for name, outcome in outcomes.items():
                assert outcome.result == Receipt(
                    len(self.model.steps),
                    0,
                    len(self.model.steps),
                    applied=False,
                    divisor=self.model.workers,
                    reason="skipped",
                )
                self.receipts[name] = outcome.result
        else:
            assert expected == "applied"
            step = self.model.steps[-1]
            assert outcomes.keys() == {each.name for each in step}
            for name, outcome in outcomes.items():
                assert isinstance(outcome.result, Receipt)
                assert not outcome.duplicate
                assert outcome.result.version == len(self.model.steps)
                assert outcome.result.contributors == tuple(each.name.worker for each in step)
                self.receipts[name] = outcome.result

    def write(self, message: Message) -> Outcomes:
        writer, sequence = Writer(self.session, message.name.worker, message.name.epoch), message.name.sequence
        if message.adds:
            late, options = (
                {f"g{message.groups}": torch.full((3,), float(message.groups))},
                {"lr": LRS[message.content]},
            )
            return writer.append(late, group=message.groups, options=options, sequence=sequence)
        if message.content == SKIP:
            return writer.skip(sequence=sequence, base=0, now=self.now)
        gradient = values(self.session, message.content)[: message.groups]
        if message.content == BAD:
            gradient[0][0] = float("nan")
        return writer.push(gradient, sequence=sequence, base=0, now=self.now)

    @rule(seconds=st.sampled_from([1.0, 4.0, DEADLINE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        outcomes = self.session.tick(self.now)
        waiting = {page.waiting.name for page in self.model.pages.values() if page.waiting}
        if self.model.deadline is None or self.now < self.model.deadline:
            assert outcomes == {}
            return
        assert outcomes.keys() == waiting
        assert all(isinstance(outcome.result, BarrierTimeout) for outcome in outcomes.values())
        for page in self.model.pages.values():
            page.waiting = None
        self.model.deadline = None

    @invariant()
    def the_session_is_what_the_model_says(self) -> None:
        assert self.session.version == len(self.model.steps)
        assert self.session.deadline == self.model.deadline
        for name, page in self.model.pages.items():
            assert self.session.position(name) == (page.epoch, page.last, page.waiting is not None)
        while self.replayed < len(self.model.steps):
            step = self.model.steps[self.replayed]
            self.replayed += 1
            if step[0].adds:
                late = torch.full((3,), float(step[0].groups))
                self.twin.parameters.append(late)
                self.twin.optimizer.add_param_group({"params": [late], "lr": LRS[step[0].content]})
                continue
            each = [values(self.session, push.content)[: push.groups] for push in step]
            self.twin.step([sum(own[1:], start=own[0]) / len(step) for own in zip(*each, strict=True)])
        assert equal(parameters(self.session), self.twin.parameters)


TestNetwork = Network.TestCase
TestNetwork.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
