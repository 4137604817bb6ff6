"""A process that writes a journal is killed with -9: everything that it appended is there."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farstep_service.durability.storage import DiskStorage
from farstep_service.failpoints import KILLED, NAMES, VARIABLE
from tests.support.durability.life import Life

ROOT = Path(__file__).parents[2]
PLACES = [name for name in NAMES if name.startswith("journal.")]

pytestmark = pytest.mark.process


def appending(root: Path, sync: str, seed: int, failpoint: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.durability.appending", str(root), sync, str(seed)],
        cwd=ROOT,
        env={VARIABLE: failpoint} if failpoint else {},
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen[str]) -> Iterator[int]:
    """Yield how many events it says that it has appended, to its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("\n"):
            yield int(line)


def is_there(root: Path, twin_root: Path, seed: int, appended: int) -> tuple[int, Life]:
    """Check that what a killed process left is what it would have written, all that it said included.

    Returns:
        how many events are there, and a twin of the process that has written them, too.
    """
    twin_root.mkdir()
    twin = Life(DiskStorage(twin_root), "os", random.Random(seed))
    while len(twin.events) < appended + 10:
        twin.act()
    number, found = twin.read(DiskStorage(root))
    assert number >= appended
    assert (found.dropped, found.lost) == (None, 0)
    assert not found.rebooted or not number  # unknown before the first segment
    return number, twin


@pytest.mark.promise(
    "A process killed with -9 leaves everything that it had written into a journal.", area="durability"
)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_was_appended_is_lost(tmp_path: Path, seed: int) -> None:
    """At the level `os`, a process killed while it appends leaves every event that it had appended."""
    (root := tmp_path / "data").mkdir()
    with appending(root, "os", seed) as process:
        said = printed(process)
        appended = next(number for number in said if number > 40 * (seed + 1))
        process.kill()
        appended = max([appended, *said])
    assert process.returncode == -9
    is_there(root, tmp_path / "twin", seed, appended)


@pytest.mark.promise(
    "A process killed with -9 leaves everything that it had written into a journal.", area="durability"
)
@pytest.mark.parametrize("visit", [1, 4])
@pytest.mark.parametrize("place", PLACES)
def test_it_is_killed_at_every_place(tmp_path: Path, place: str, visit: int) -> None:
    """Killed before, within or after each operation, it leaves what it had appended, and its session goes on."""
    (root := tmp_path / "data").mkdir()
    with appending(root, "group", visit, f"{place}:{visit}") as process:
        appended = max(printed(process), default=0)
    assert process.returncode == KILLED
    number, twin = is_there(root, tmp_path / "twin", visit, appended)
    assert number <= appended + 2  # a push is two events
    twin.acknowledged.clear()
    twin.recover(DiskStorage(root))
    for _ in range(20):
        twin.act()
    assert twin.read(DiskStorage(root))[0] == len(twin.events)
