"""A file was changed behind the journal's back: that is noticed, or it does not matter; nothing is lost silently.

`DAMAGES=5000` tries more of them than `make test` does, and others.
"""

from __future__ import annotations

import os
import random

import pytest

from farstep.errors import DamagedJournal
from farstep_service.durability.journal import Sync
from tests.support.durability.life import FOLDER, Life
from tests.support.durability.power import File, PowerStorage

DAMAGES = int(os.environ.get("DAMAGES", "500"))
SEED = 0 if "DAMAGES" not in os.environ else random.SystemRandom().randrange(1 << 32)
LIVES = 10


def lived(seed: int, sync: Sync) -> tuple[Life, PowerStorage, random.Random]:
    chance, storage = random.Random(seed), PowerStorage()
    life = Life(storage, sync, chance, storage.observe, lambda: len(storage.log))
    for _ in range(40):
        life.act()
    life.acknowledge()
    storage.observe()
    return life, storage, chance


def damaged_once(storage: PowerStorage, chance: random.Random, *, rebooted: bool) -> tuple[PowerStorage, str]:
    """Return a copy with one bit flipped or one segment cut off, and what was done."""
    contents = {name: bytearray(file.seen) for name, file in storage.files.items()}
    name = chance.choice([each for each in contents if each.endswith(".journal")])
    file = contents[name]
    used = len(bytes(file).rstrip(b"\0")) + 128
    at = chance.randrange(chance.choice([128, used, used, len(file)])) % len(file)
    if chance.random() < 0.25:
        del file[at:]
        what = f"{name} cut off at {at}"
    else:
        bit = chance.randrange(8)
        file[at] ^= 1 << bit
        what = f"bit {bit} of byte {at} of {name}"
    copy = PowerStorage({each: File.of(bytes(it)) for each, it in contents.items()})
    if not rebooted:
        copy._boot = storage.boot
    return copy, what


@pytest.mark.promise(
    "A damaged journal is named with its file and offset, and nothing of it is lost silently.", area="durability"
)
@pytest.mark.timeout(0 if "DAMAGES" in os.environ else 60)
@pytest.mark.parametrize("rebooted", [False, True], ids=["the process died", "the machine was started again"])
@pytest.mark.parametrize("sync", ["os", "group"])
def test_no_damage_is_silent(sync: Sync, rebooted: bool) -> None:
    """One flipped bit, or a file cut off, is named, or what is read holds all that was acknowledged."""
    print(f"{SEED=}")
    noticed = harmless = 0
    for seed in range(SEED, SEED + LIVES):
        life, storage, chance = lived(seed, sync)
        for _ in range(DAMAGES // 4 // LIVES + 1):
            copy, what = damaged_once(storage, chance, rebooted=rebooted)
            try:
                number, found = life.read(copy)
            except DamagedJournal as exc:
                noticed += FOLDER in str(exc)
                continue
            # A process that dies loses nothing of what was appended; a machine, nothing of what was synced.
            promised = len(life.events) if not rebooted else life.certain()
            assert number >= promised, f"{seed=}: {what}"
            assert found.rebooted is rebooted
            harmless += 1
    assert noticed > DAMAGES // 40
    assert harmless > DAMAGES // 40


def test_a_whole_journal_is_read_whole() -> None:
    """Nothing is reported of journals that nobody has changed, so that the reports above mean something."""
    for seed in range(SEED, SEED + LIVES):
        life, storage, _ = lived(seed, "group")
        number, found = life.read(storage)
        assert (number, found.dropped, found.lost, found.rebooted) == (len(life.events), None, 0, False)
