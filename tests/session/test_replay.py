"""A session is written down anywhere, and what happened from there on happens again: the same receipts, the same bits.

Events, results and what the coordinator knows go through bytes. The model drives a session as workers do; its teardown
replays the journal from every record that was made on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor

from farstep.errors import FarstepError
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync, to_options
from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import Evaluation
from farstep_service.coordinator import Append, Event, Failed, Heartbeat, NoStep, Push, Put, Result, StepTaken, Written
from farstep_service.coordinator.written import read_back, write_down
from farstep_service.kernels import Kernels
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.session import Outcomes, Session, SessionRecord
from farstep_service.session.growth import grown, room_for
from farstep_service.tensors.contents import Contents
from farstep_service.tensors.contribution import Contribution
from tests.policies.table import ROWS, toys
from tests.session.failing import FailingKernels
from tests.session.writers import DTYPES, SHAPES, Writer, begun, new_session, values

NAMES = ("w0", "w1", "w2")
MODES: tuple[Consistency, ...] = (
    Async(lease_s=8.0),
    Async(lease_s=8.0, delay_compensation=0.5),
    Async(lease_s=8.0, staleness_scaling="inverse"),
    Sync(workers=2, deadline_s=4.0, lease_s=8.0),
    Sync(workers=3, quorum=2, deadline_s=16.0, lease_s=8.0, late="fold"),
    Sync(workers="live", deadline_s=4.0, lease_s=8.0),
    Bounded(staleness=1, deadline_s=4.0, lease_s=8.0),
)
POLICIES: tuple[Mapping[str, Any], ...] = (
    {},
    {"accumulate": 3},
    {"ema": 0.9, "clip_norm": 0.5},
    *(row.written for row in ROWS),
    *({"accumulate": 2, **row.written} for row in ROWS),
)
OF_REAL_NUMBERS = {name for row in ROWS if not row.takes_complex for name in row.options}
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "60"))


@dataclass
class Entry:
    """One event of the journal, as bytes, with what came of it and what arrived."""

    event: bytes
    now: float
    results: list[bytes] = field(default_factory=list)
    arrived: Contribution | bytes | None = None
    outcomes: dict[Any, Any] = field(default_factory=dict)


def answers(outcomes: Outcomes) -> dict[Any, Any]:
    """Return outcomes without the time that anything took; errors are equal if they say the same."""
    return {
        name: each.result.to_problem() if isinstance(each.result, FarstepError) else (each.result, each.duplicate)
        for name, each in outcomes.items()
    }


def bits(session: Session) -> list[Tensor]:
    """Return every tensor and number of a session."""
    contents = session.snapshot()[0].contents
    return [torch.frombuffer(bytearray(view), dtype=torch.uint8) for view in contents.memory() if len(view)]


class Replayed(RuleBasedStateMachine):
    """Workers of one session, its journal, and records of it."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[Entry] = []
        self.records: list[tuple[int, SessionRecord]] = []
        self.now = 0.0

    @initialize(
        optimizer=st.sampled_from(["Adagrad", "AdamW", "ASGD", "SGD"]),
        mode=st.sampled_from(MODES),
        policy=st.sampled_from(POLICIES),
        nonfinite=st.sampled_from(["refuse", "skip"]),
    )
    def begin(self, optimizer: str, mode: Consistency, policy: Mapping[str, Any], nonfinite: str) -> None:
        complex_too = OF_REAL_NUMBERS.isdisjoint(policy)
        self.session = self.opened(
            optimizer, to_options(mode), policy, nonfinite, names=("w", "b", "z")[: 2 + complex_too]
        )
        self.writers = {name: Writer(self.session, name) for name in NAMES}
        self.record()
        self.join("w0", named=True)
        self.put(1, initial=True)

    def opened(
        self, optimizer: str, mode: Mapping[str, Any], policy: Mapping[str, Any], nonfinite: str, names: tuple[str, ...]
    ) -> Session:
        momentum = {"momentum": 0.9} if optimizer == "SGD" else {}
        self.plan = Plan.build(
            name="s",
            optimizer=optimizer,
            groups=[{"lr": 0.1, **momentum}],
            segments=[SegmentSpec(name, SHAPES[name], DTYPES[name], 0) for name in names],
            consistency=mode,
            nonfinite=nonfinite,
            kernel="reference",
            policy=policy,
        )
        return Session(self.plan, incarnation="here", kernels=Kernels("reference"), device="cpu", journal=self.note)

    def note(self, happened: Event | Result, now: float) -> None:
        written = write_down(happened)
        if isinstance(happened, StepTaken | NoStep | Written | Failed):
            self.journal[-1].results.append(written)
            return
        arrived: Contribution | bytes | None = None
        if isinstance(happened, Push):
            arrived = self.session._tensors.arrived.pushes[happened.head.name].contribution.cloned()
        elif isinstance(happened, Put | Append) and happened.head.name in self.session._tensors.arrived.contents:
            arrived = b"".join(self.session._tensors.arrived.contents[happened.head.name].contents.memory())
        self.journal.append(Entry(written, now, arrived=arrived))

    def take(self, outcomes: Outcomes) -> None:
        """Note what came of the last event; what came of earlier ones, and is said again, is no part of it."""
        self.journal[-1].outcomes = answers({name: each for name, each in outcomes.items() if not each.duplicate})

    # -- what happens -----------------------------------------------------------------------------------------------

    @rule()
    def record(self) -> None:
        self.records.append((len(self.journal), self.session.record()))

    @rule(name=st.sampled_from(NAMES), named=st.booleans())
    def join(self, name: str, named: bool) -> None:
        with suppress(FarstepError):
            self.writers[name] = Writer.join(self.session, name, self.now, named=named)
            self.take(self.writers[name].joined)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        before = len(self.journal)
        outcomes = self.session.leave(name, self.writers[name].epoch, self.now)
        if len(self.journal) > before:
            self.take(outcomes)

    @rule(
        name=st.sampled_from(NAMES),
        seed=st.integers(1, 1000),
        behind=st.integers(0, 2),
        lr=st.sampled_from([None, 0.2]),
        bad=st.integers(0, 9),
    )
    def push(self, name: str, seed: int, behind: int, lr: float | None, bad: int) -> None:
        writer, gradients = self.writers[name], values(self.session, seed)
        if bad == 9:
            gradients[0][0] = float("nan")
        before = self.state(), len(self.journal)
        try:
            groups = {} if lr is None else {0: {"lr": lr}}
            base = max(0, self.session.version - behind)
            outcomes = writer.push(gradients, now=self.now, base=base, groups=groups)
        except FarstepError:
            assert (self.state(), len(self.journal)) == before, "what is refused leaves a trace"
            return
        if len(self.journal) > before[1]:
            self.take(outcomes)

    @rule(name=st.sampled_from(NAMES), again=st.integers(0, 3))
    def push_again(self, name: str, again: int) -> None:
        """A push arrives once more, perhaps with another content."""
        writer, before = self.writers[name], (self.state(), len(self.journal))
        try:
            outcomes = writer.push(
                values(self.session, 5 + again % 2), sequence=max(1, writer.last - again), now=self.now
            )
        except FarstepError:
            assert (self.state(), len(self.journal)) == before, "what is refused leaves a trace"
            return
        if len(self.journal) > before[1]:
            self.take(outcomes)

    @rule(seed=st.integers(1, 1000))
    def put(self, seed: int, initial: bool = False) -> None:
        with suppress(FarstepError):
            self.take(self.writers["w0"].put({"param": values(self.session, seed)}, initial=initial, now=self.now))

    @precondition(lambda self: len(self.session.plan.groups) < 3)
    @rule(name=st.sampled_from(NAMES))
    def append(self, name: str) -> None:
        with suppress(FarstepError):
            own = {f"late{len(self.session.plan.groups)}": torch.full((3,), 0.5)}
            self.take(self.writers[name].append(own, now=self.now))

    @rule(name=st.sampled_from(NAMES))
    def receive(self, name: str) -> None:
        self.session.received(name, self.writers[name].epoch, self.now)

    @rule(mode=st.sampled_from(MODES))
    def switch(self, mode: Consistency) -> None:
        with suppress(FarstepError):
            self.take(self.session.set_consistency(mode, self.now))

    @rule(lr=st.sampled_from([0.05, 0.3, -1.0]))
    def set_options(self, lr: float) -> None:
        with suppress(FarstepError):
            self.take(self.session.set_groups({0: {"lr": lr}}))

    @rule()
    def forget_base(self) -> None:
        self.session.forget_base()

    @rule(seconds=st.sampled_from([0.5, 2.0, 9.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.session.tick(self.now))

    # -- and happens again ------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        return write_down(self.session._coordinator.state)

    def teardown(self) -> None:
        for first, record in self.records:
            again = Session(self.plan, incarnation="here", kernels=Kernels("reference"), device="cpu", record=record)
            for entry in self.journal[first:]:
                event = read_back(entry.event)
                receive(again, event, entry.arrived)
                outcomes = again.replay(event, entry.now, [read_back(each) for each in entry.results])
                assert answers(outcomes) == entry.outcomes
            assert write_down(again._coordinator.state) == self.state()
            assert again.version == again._coordinator.version == self.session.version
            if self.session.initialised:
                assert all(map(torch.equal, bits(again), bits(self.session)))


def receive(session: Session, event: Event, arrived: Contribution | bytes | None) -> None:
    """Give a session what arrived with an event."""
    if isinstance(event, Push):
        assert isinstance(arrived, Contribution)
        session._tensors.arrived.receive_push(event.head, arrived.cloned())
    elif isinstance(event, Put):
        session._tensors.arrived.receive_contents(event.head, filled(session.intake(event.head), arrived))
    elif isinstance(event, Append) and not event.there:
        plan = grown(session.plan, event.head, known=len(session.plan.groups), in_force=session.groups)
        contents = filled(room_for(session.plan, event.head), arrived)
        session._tensors.arrived.receive_group(event.head.name, contents, plan)


def filled(contents: Contents, arrived: object) -> Contents:
    """Return contents with the payload that arrived."""
    assert isinstance(arrived, bytes)
    at = 0
    for view in contents.allocate():
        view[:] = arrived[at : at + len(view)]
        at += len(view)
    return contents


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Make the policies of the table known here."""
    with toys():
        yield


@pytest.mark.timeout(1800)
def test_whatever_happens_happens_again() -> None:
    """From any record on, a replay gives the same receipts, the same coordinator and the same bits."""
    run_state_machine_as_test(
        Replayed,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_step_that_waits_for_an_evaluation_goes_on() -> None:
    """L-BFGS is written down between two evaluations of one step, and takes it to the same end."""
    session = Session(
        Plan.build(
            name="s",
            optimizer="LBFGS",
            groups=[{"line_search_fn": "strong_wolfe"}],
            segments=[SegmentSpec("w", (3, 4), "float32", 0)],
            consistency=to_options(Async()),
            nonfinite="refuse",
            kernel="reference",
        ),
        incarnation="here",
        kernels=Kernels("reference"),
        device="cpu",
    )
    writer = Writer.join(session)
    writer.put({"param": values(session, 1)}, initial=True)
    outcomes = writer.push(values(session, 2), evaluation=Evaluation(3.0))
    assert any(each.result.again for each in outcomes.values())  # type: ignore[union-attr]
    record = session.record()
    other = Session(session.plan, incarnation="here", kernels=Kernels("reference"), device="cpu", record=record)
    twin = Writer(other, writer.name, writer.epoch, writer.last)
    for each in (writer, twin):
        for seed in (3, 4, 5):
            each.push(values(session, seed), evaluation=Evaluation(2.0 / seed, continues=seed == 3))
    assert all(map(torch.equal, bits(session), bits(other)))


@pytest.mark.parametrize("block", range(5))
def test_a_step_that_was_interrupted_happens_again(block: int) -> None:
    """A step that failed midway and was finished for the retry is replayed to the same receipts and bits."""
    kernels, journal = FailingKernels(), list[tuple[Event | Result, float]]()
    session = new_session(names=("w", "b"), kernels=kernels)
    (writer,) = begun(session)
    session.journal = lambda event, now: journal.append((event, now))
    record, gradients, name = session.record(), values(session, 2), writer.named()
    kernels.fault.at = block
    writer.push(gradients)
    kernels.fault.at = None
    last = writer.push(gradients)[name]
    again = new_session(names=("w", "b"), record=record)
    (push, _), (failed, _), (taken, _), (heartbeat, _) = journal
    assert isinstance(push, Push)
    assert isinstance(failed, Failed)
    assert isinstance(heartbeat, Heartbeat)
    contribution = again.contribution(push.head)
    for view, gradient in zip(
        contribution.allocate(), [torch.cat([each.reshape(-1) for each in gradients])], strict=True
    ):
        view[:] = tensor_memory(gradient)
    receive(again, push, contribution)
    again.replay(push, 0.0, [failed])
    assert again.replay(taken, 0.0, [])[name].result == last.result
    again.replay(heartbeat, 0.0, [])
    assert write_down(again._coordinator.state) == write_down(session._coordinator.state)
    assert all(map(torch.equal, bits(again), bits(session)))
