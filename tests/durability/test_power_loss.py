"""The power fails: whatever the disk made of what was not synced, every acknowledged event comes back, and no other.

`CRASH_STATES=100000` tries more of them than `make test` does, and others.
"""

from __future__ import annotations

import os
import random

import pytest

from farstep_service.durability.journal import Sync
from tests.support.durability.life import Life
from tests.support.durability.power import PowerStorage

STATES = int(os.environ.get("CRASH_STATES", "1000"))
SEED = 0 if "CRASH_STATES" not in os.environ else random.SystemRandom().randrange(1 << 32)
LIVES = max(1, STATES // 40)


def lived(seed: int, sync: Sync) -> tuple[Life, PowerStorage, random.Random]:
    """Return a session that has done some things, on a storage whose power is about to fail."""
    chance, storage = random.Random(seed), PowerStorage()
    life = Life(storage, sync, chance, storage.observe, lambda: len(storage.log))
    for _ in range(chance.randrange(5, 40)):
        life.act()
    return life, storage, chance


@pytest.mark.promise(
    "What was acknowledged after a sync survives a loss of power, whatever the disk made of the rest.",
    area="durability",
)
@pytest.mark.timeout(0 if "CRASH_STATES" in os.environ else 60)
@pytest.mark.parametrize("sync", ["os", "group"])
def test_what_was_acknowledged_survives_a_loss_of_power(sync: Sync) -> None:
    """Whatever is lost of what was not synced, a prefix of the events is there, with all that were acknowledged."""
    print(f"{SEED=}")
    states = 0
    for seed in range(SEED, SEED + LIVES // 2):
        life, storage, chance = lived(seed, sync)
        for _ in range(39):
            cut = chance.randrange(len(storage.log) + 1)
            number, found = life.read(storage.crash(chance, cut))
            assert number >= life.certain(cut), f"{seed=} {cut=}"
            assert found.rebooted
            states += 1
        life.recover(storage.crash(chance))  # and once, life goes on
        states += 1
    assert states == LIVES // 2 * 40


@pytest.mark.promise(
    "What was acknowledged after a sync survives a loss of power, whatever the disk made of the rest.",
    area="durability",
)
def test_it_survives_one_after_the_other() -> None:
    """A session keeps its promises through losses of power and deaths of its process, one after the other."""
    for seed in range(SEED, SEED + 40):
        life, storage, chance = lived(seed, "group")
        for _ in range(5):
            storage = storage if chance.random() < 0.5 else storage.crash(chance)
            life.observe, life.moment = storage.observe, lambda log=storage.log: len(log)  # type: ignore[misc]
            life.recover(storage)
            for _ in range(chance.randrange(8)):
                life.act()
