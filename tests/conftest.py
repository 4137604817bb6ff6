"""Give every test the same surroundings, whoever starts pytest, from whichever shell and in however many processes.

`make test` runs two processes (pytest-xdist), each of which takes whole files. What keeps them apart:

    ports, sockets, sessions, tmp_path    the kernel's choice, or one for each process
    compiled kernels                      built under a lock, named by their sources, put in place by renaming
    examples of hypothesis                files named by their contents
    times and memory with narrow limits   `alone`: no other test runs meanwhile, in any process of the run

The tests of pure rooms (`tests/support/in_process.py`) start no process and open no connection, or they fail; `--fast`
runs them alone.

A test is `alone` if its limit is a promise to users and nearer to what the code needs than a busy neighbour can take.
A limit of a second within which processes have to be run counts what the machine gave to others
(`tests/support/limits.py`).
"""

import fcntl
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import xdist
from hypothesis import settings

from tests.support.in_process import Guard, is_fast, leads_to_fast

# Two OpenMP threads on two busy cores spin while they wait. This must be set before the first import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A server, session or token that the developer uses must not leak into the tests. The kernel cache may be shared.
for name in [name for name in os.environ if name.startswith("FARSTEP_") and name != "FARSTEP_KERNEL_CACHE"]:
    del os.environ[name]

# The same examples in every run, however busy the machine is; `make model` tries others, and more of them.
settings.register_profile("farstep", deadline=None, print_blob=True, derandomize="MODEL_EXAMPLES" not in os.environ)
settings.load_profile("farstep")


class Room:
    """Where tests run: several at once, or one that is alone.

    Who waits to be alone holds the door, so that those who come later wait behind it.

    Args:
        place: a directory that all processes of the run know.
    """

    def __init__(self, place: Path) -> None:
        self._door, self._room = (os.open(place / name, os.O_CREAT) for name in ("door", "room"))

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """Be in the room until the end of the block."""
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)


ROOM = pytest.StashKey[Room]()
WAS_PURE = pytest.StashKey[bool]()
GUARD = Guard()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take `--fast`."""
    parser.addoption("--fast", action="store_true", help="run the tests of pure rooms only, which start no process")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over files that are not asked for, before they are imported."""
    if not config.getoption("--fast"):
        return None
    return None if (leads_to_fast if collection_path.is_dir() else is_fast)(collection_path) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Begin to watch a test of a pure room, its fixtures included."""
    pure = is_fast(item.path) and item.get_closest_marker("process") is None
    if pure and not item.config.stash.get(WAS_PURE, False):
        gc.collect()  # optimizers that a test before left behind leave their sessions, for which they connect
    item.config.stash[WAS_PURE] = pure
    if pure:
        GUARD.arm()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """End that, and fail a test that has caught what it was refused."""
    try:
        return (yield)
    finally:
        if tried := GUARD.disarm():
            pytest.fail(f"a test of a pure room tried {tried[0]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files with tests that are alone at the end, so that few others wait for them."""
    if config.getoption("--fast"):
        items[:] = [item for item in items if item.get_closest_marker("process") is None]
    files = {item.path for item in items if item.get_closest_marker("alone")}
    items.sort(key=lambda item: item.path in files)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Open the room, if there are several processes."""
    if xdist.is_xdist_worker(session):
        session.config.stash[ROOM] = Room(Path(session.config.option.basetemp).parent)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test, its fixtures included, in the room; the time it waits at the door is not its own."""
    room = item.config.stash.get(ROOM, None)
    with room.entered(alone=item.get_closest_marker("alone") is not None) if room else nullcontext():
        return (yield)
