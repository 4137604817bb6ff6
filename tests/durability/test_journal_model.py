"""Whatever is done to a journal, in whichever order: appended, rotated, forgotten, killed, cut off from its power.

`make model` tries other sequences, and more of them.
"""

from __future__ import annotations

import os
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from farstep_service.durability.journal import Sync
from farstep_service.durability.reading import name_of
from tests.support.durability.life import FOLDER, NO_PLACE, Arriving, Life, body_of
from tests.support.durability.power import PowerStorage

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "60"))
SIZES = st.integers(0, 200) | st.integers(0, 5000)


class JournalModel(RuleBasedStateMachine):
    """A session's life, told what to do; its own list of what it appended is the model."""

    @initialize(sync=st.sampled_from(["os", "group", "always"]), seed=st.integers(0, 1 << 32))
    def begin(self, sync: Sync, seed: int) -> None:
        self.storage = PowerStorage()
        self.life = Life(self.storage, sync, random.Random(seed), self.observe, self.moment)
        self.arriving: list[Arriving] = []

    def observe(self) -> None:
        self.storage.observe()

    def moment(self) -> int:
        return len(self.storage.log)

    @rule(nbytes=SIZES)
    def event(self, nbytes: int) -> None:
        self.life.append(body_of(NO_PLACE, b"", self.life.chance.randbytes(nbytes)))

    @rule(nbytes=SIZES)
    def push(self, nbytes: int) -> None:
        self.life.push(nbytes)

    @rule(nbytes=SIZES)
    def begin_to_arrive(self, nbytes: int) -> None:
        self.arriving.append(self.life.begin_to_arrive(nbytes))

    @rule(which=st.integers(0, 9))
    def end_to_arrive(self, which: int) -> None:
        if self.arriving:
            self.life.end_to_arrive(self.arriving.pop(which % len(self.arriving)))

    @rule()
    def rotate(self) -> None:
        self.life.journal.rotate()

    @rule()
    def acknowledge(self) -> None:
        self.life.acknowledge()

    @rule()
    def snapshot(self) -> None:
        self.life.snapshot()

    @rule()
    def die(self) -> None:
        self.life.recover(self.storage)
        self.arriving.clear()

    @rule(seed=st.integers(0, 1 << 32))
    def lose_power(self, seed: int) -> None:
        self.storage = self.storage.crash(random.Random(seed))
        self.life.recover(self.storage)
        self.arriving.clear()

    @invariant()
    def what_is_written_can_be_read(self) -> None:
        number, found = self.life.read(self.storage)
        assert number == len(self.life.events)
        if name_of(FOLDER, self.life.journal.segment) in self.storage.files:  # else a torn end is not superseded yet
            assert (found.dropped, found.lost) == (None, 0)
        assert found.chain == self.life.journal.chain
        assert self.life.journal.first <= self.life.journal.segment


def test_any_sequence_of_operations() -> None:
    """What was appended is read again, and what was acknowledged survives, after any sequence of operations."""
    run_state_machine_as_test(
        JournalModel, settings=settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
    )
