"""Accumulated, skipped and averaged steps against torch, whatever workers send again, skip, or take with them.

The model is a list of rounds: each good push adds one, the k-th makes a step of torch's optimizer on their mean, and
torch's average takes its parameters in. A push that is repeated, at any time, adds none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from farstep.protocol.receipt import Receipt
from tests.session.averaged import Averaged, averages
from tests.session.writers import Writer, begun, equal, new_session, parameters, receipt, values

NAMES = ("w0", "w1", "w2")
Kind = Literal["good", "nan", "skip"]


class Policies(RuleBasedStateMachine):
    """One async session, its model, and everything that was ever sent."""

    @initialize(rounds=st.integers(1, 4))
    def begin(self, rounds: int) -> None:
        self.rounds = rounds
        self.session = new_session(names=("w", "b"), accumulate=rounds, nonfinite="skip", ema=0.9)
        self.writers = {writer.name: writer for writer in begun(self.session, *NAMES)}
        self.twin = Averaged(parameters(self.session))
        self.waiting: list[Sequence[Tensor]] = []
        self.steps = 0
        self.sent: list[tuple[str, int, int, Kind, int, Receipt]] = []

    def send(self, writer: Writer, seed: int, kind: Kind, **named: Any) -> Any:
        if kind == "skip":
            return writer.skip(**named)
        gradients = values(self.session, seed)
        if kind == "nan":
            gradients[seed % 2].view(-1)[seed % 5] = (math.nan, math.inf, -math.inf)[seed % 3]
        return writer.push(gradients, **named)

    @rule(
        name=st.sampled_from(NAMES), seed=st.integers(0, 2**16), kind=st.sampled_from(["good", "good", "nan", "skip"])
    )
    def push(self, name: str, seed: int, kind: Kind) -> None:
        """A new push: a round, unless it is skipped or holds NaN."""
        writer = self.writers[name]
        called = writer.named()
        told = receipt(self.send(writer, seed, kind), called)
        if kind == "good":
            self.waiting.append(values(self.session, seed))
        stepped = len(self.waiting) == self.rounds
        expected = {"good": "" if stepped else "accumulated", "nan": "nonfinite", "skip": "skipped"}[kind]
        assert (told.reason, told.applied) == (expected, stepped and kind == "good")
        if stepped:
            mean = [sum(each[1:], start=each[0]) for each in zip(*self.waiting, strict=True)]
            self.twin.step([total / self.rounds for total in mean])
            self.waiting.clear()
            self.steps += 1
            assert len(told.contributors) == self.rounds
        assert told.version == self.steps
        self.sent.append((name, called.epoch, called.sequence, kind, seed, told))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """An old push arrives again: its first receipt, if its worker has not begun a new life since."""
        name, epoch, sequence, kind, seed, told = data.draw(st.sampled_from(self.sent))
        writer = self.writers[name]
        if epoch != writer.epoch:
            return
        called = writer.named(sequence)
        again = self.send(writer, seed, kind, sequence=sequence, base=told.base)[called]
        assert again.duplicate
        assert again.result in (told, Receipt(0, 0))  # one that is long ago is known, and its receipt forgotten

    @rule(name=st.sampled_from(NAMES))
    def join(self, name: str) -> None:
        """A worker begins a new life; its rounds still count."""
        self.writers[name] = Writer.join(self.session, name)

    @invariant()
    def is_as_torch_would_have_it(self) -> None:
        """Parameters and their average have torch's bits after every event."""
        assert self.session.version == self.steps
        assert equal(parameters(self.session), self.twin.parameters)
        expected = self.twin.averages if self.steps else self.twin.parameters
        assert equal(averages(self.session), expected)
        assert (self.session.nbytes()["waiting"] > 0) == bool(self.waiting)


TestPolicies = Policies.TestCase
TestPolicies.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
