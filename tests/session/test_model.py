"""A network that loses, repeats and reorders, against a model of the promise: each write once, receipts for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from farstep.errors import BarrierTimeout, FarstepError, Fenced, IdempotencyMismatch, NonFinite, SequenceGap
from farstep.messages import Receipt, WriteName
from farstep_service.session import Outcomes
from tests.session.writers import Twin, Writer, equal, new_session, parameters, sync, values

DEADLINE_S = 10.0
BAD = 3
"""The content that holds NaN."""
SKIP = 4
"""The content of a push that skips its step."""


@dataclass(frozen=True)
class Message:
    """A push on its way; it may arrive never, later, or twice."""

    name: WriteName
    content: int


@dataclass
class Page:
    epoch: int = 0
    last: int = 0
    done: dict[int, tuple[int, Receipt | None]] = field(default_factory=dict)
    waiting: Message | None = None


class Model:
    """What the session promises, in a few lines.

    Args:
        workers: how many make a step; 1 is async.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pages: dict[str, Page] = {}
        self.steps: list[tuple[Message, ...]] = []
        self.skipped: set[WriteName] = set()
        self.deadline: float | None = None

    def expect(self, message: Message, now: float) -> type[FarstepError] | str:
        """Return the error a push gets, or `duplicate`, `joins`, `waits`, `applied` or `skipped`, having done it."""
        page, name = self.pages.get(message.name.worker, Page()), message.name
        if name.epoch != page.epoch:
            return Fenced
        if name.sequence > page.last + 1:
            return SequenceGap
        if name.sequence <= page.last:
            return "duplicate" if page.done[name.sequence][0] == message.content else IdempotencyMismatch
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
            each.last += 1
            each.done[each.last], each.waiting = (each.waiting.content, None), None
        self.deadline = None
        return "skipped" if skipped else "applied"

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
        self.model.pages["w0"].last, self.model.pages["w0"].done[1] = 1, (-1, None)
        self.twin = Twin(parameters(self.session))
        self.replayed = 0

    def join(self, name: str) -> None:
        epoch, outcomes = self.session.join(name)
        page = self.model.pages.get(name, Page())
        assert epoch == page.epoch + 1
        self.expect_fenced(page, outcomes)
        self.model.pages[name] = Page(epoch)
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
        self.expect_fenced(page, self.session.leave(name, page.epoch))
        self.model.pages[name] = Page(page.epoch + 1)
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
        message = Message(WriteName(name, page.epoch - older, max(1, page.last + 1 + ahead)), content)
        self.deliver(message)
        return message

    @rule(message=messages)
    def deliver(self, message: Message) -> None:
        """Deliver a push, for the first time or once more."""
        expected = self.model.expect(message, self.now)
        writer = Writer(self.session, message.name.worker, message.name.epoch)
        gradient = values(self.session, message.content)
        if message.content == BAD:
            gradient[0][0] = float("nan")
        if isinstance(expected, type):
            with pytest.raises(expected):
                writer.push(gradient, sequence=message.name.sequence, base=0, now=self.now)
            return
        if message.content == SKIP:
            outcomes = writer.skip(sequence=message.name.sequence, base=0, now=self.now)
        else:
            outcomes = writer.push(gradient, sequence=message.name.sequence, base=0, now=self.now)
        if expected in ("joins", "waits"):
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
                    len(self.model.steps), 0, len(self.model.steps), applied=False, divisor=self.model.workers
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
            total = torch.zeros(0)
            for index, each in enumerate(step):
                own = values(self.session, each.content)[0]
                total = own if index == 0 else total + own
            self.twin.step([total / len(step)])
            self.replayed += 1
        assert equal(parameters(self.session), self.twin.parameters)


TestNetwork = Network.TestCase
TestNetwork.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
