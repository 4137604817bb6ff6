"""A session whose server dies or loses its power comes back at a version that it had, and knows what was answered."""

from __future__ import annotations

from pathlib import Path

import pytest

import farstep
from farstep.errors import DamagedJournal
from farstep.protocol.durability import Durability
from tests.robustness.power import damage_gradients, end_process, live, lose_power

STATES = 100
KEEPING: tuple[Durability, ...] = (farstep.Journal(sync="group"), farstep.Journal(sync="always"))
LOSING: tuple[Durability, ...] = (farstep.Journal(sync="os"), farstep.Snapshot(every_steps=2))


@pytest.mark.promise(
    "At `journal:group` and `journal:always` a loss of power takes no acknowledged step, receipt or option.",
    area="durability",
)
@pytest.mark.parametrize("level", KEEPING, ids=["group", "always"])
def test_a_loss_of_power_takes_nothing_that_was_answered(level: Durability, tmp_path: Path) -> None:
    """Whatever was not synced is lost; every answered push gets its receipt again, and the training its last bits."""
    losses = lose_power(live(level, str(tmp_path)), seed=7, states=STATES)
    assert losses.wrong == []
    assert losses.told > STATES


@pytest.mark.promise("A session that has lost acknowledged steps says so to its workers.", area="durability")
@pytest.mark.parametrize("level", LOSING, ids=["os", "snapshot"])
def test_a_loss_of_power_that_takes_steps_is_announced(level: Durability, tmp_path: Path) -> None:
    """The session comes back with the bits of an older version, and workers of the newer ones are told."""
    losses = lose_power(live(level, str(tmp_path)), seed=7, states=STATES)
    assert losses.wrong == []
    assert losses.rolled_back == STATES


@pytest.mark.parametrize("level", [KEEPING[0], LOSING[0]], ids=["group", "os"])
def test_the_death_of_the_process_takes_nothing_that_was_answered(level: Durability, tmp_path: Path) -> None:
    """After each operation of its storage a session comes back with every receipt, and trains to its last bits."""
    losses = end_process(live(level, str(tmp_path)), seed=7)
    assert losses.wrong == []
    assert losses.told > losses.states
    assert losses.rolled_back == 0


def test_a_step_happens_again_with_the_kernel_that_ran(tmp_path: Path) -> None:
    """A server that goes over to another kernel and dies comes back with the bits that each step had."""
    losses = end_process(live(farstep.Journal(), str(tmp_path), improving=True), seed=7)
    assert losses.wrong == []
    assert losses.told > losses.states


def test_gradients_that_are_damaged_are_not_applied(tmp_path: Path) -> None:
    """One flipped bit in what a push brought, of a process that died, refuses the session and names the place."""
    with pytest.raises(DamagedJournal, match=r"journal is damaged at byte \d+: event \d+ does not hold, or what came"):
        damage_gradients(live(farstep.Journal(), str(tmp_path)))
