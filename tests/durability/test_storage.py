"""The files of a data directory, and the storage that tests put in their place: both keep the same contract."""

from __future__ import annotations

import contextlib
import os
import resource
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from farstep_service.durability.storage import DiskStorage, Storage
from tests.support.durability.power import PowerStorage


@pytest.fixture(params=["disk", "power"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return DiskStorage(tmp_path) if request.param == "disk" else PowerStorage()


def test_a_file_that_is_made_is_zeros_of_its_size(storage: Storage) -> None:
    """A new file is there with all its bytes, in folders that were not there; a second of its name is refused."""
    storage.create("a/b/c", 1000)
    assert storage.size("a/b/c") == 1000
    assert bytes(storage.map("a/b/c")) == bytes(1000)
    with pytest.raises(FileExistsError):
        storage.create("a/b/c", 1)
    assert storage.names("a/b") == ["c"]
    assert storage.names("a") == ["b"]
    assert storage.names("other") == []


def test_memory_of_a_file_is_the_file(storage: Storage) -> None:
    """What is written into mapped memory is read by whoever maps the file next, also under another name."""
    storage.create("x/1", 128)
    memory = storage.map("x/1")
    memory[:4] = b"here"
    storage.sync("x/1")
    storage.rename("x/1", "x/2")
    memory[4:8] = b"too."
    storage.sync("x/2")
    storage.sync_names("x")
    assert bytes(storage.map("x/2", writable=False)[:8]) == b"heretoo."
    private = storage.map("x/2", writable=False)
    private[:4] = b"gone"
    assert bytes(private[:8]) == b"gonetoo."
    assert bytes(storage.map("x/2")[:8]) == b"heretoo."
    assert storage.names("x") == ["2"]


def test_memory_stays_when_its_file_goes(storage: Storage) -> None:
    """A file that is removed, or replaced, leaves memory that was mapped before as it is."""
    storage.create("x/1", 64)
    memory = storage.map("x/1")
    memory[:] = b"m" * 64
    storage.write("x/2", [b"other"])
    storage.rename("x/2", "x/1")
    assert bytes(storage.map("x/1")) == b"other"
    storage.remove("x/1")
    storage.remove("x/1")  # one that is not there is no error
    assert bytes(memory) == b"m" * 64
    with pytest.raises(FileNotFoundError):
        storage.size("x/1")


@pytest.mark.parametrize(
    "reference",
    [lambda each: each[3:9], lambda each: torch.frombuffer(each[:], dtype=torch.uint8)[5:], lambda each: None],
)
def test_memory_is_used_again_only_alone(storage: Storage, reference: Callable[[memoryview], object]) -> None:
    """The storage knows whether a slice or a tensor still refers to memory that is to be used again."""
    storage.create("x", 64)
    memory = storage.map("x")
    memory[:4] = b"same"
    held = reference(memory)
    again = storage.reuse(memory)
    with pytest.raises(ValueError, match="released"):
        memory[0]
    assert (again is None) is (held is not None)
    if again is not None:
        assert bytes(again[:4]) == b"same"
        again[:4] = b"file"
        assert bytes(storage.map("x")[:4]) == b"file"


def test_pieces_become_a_file(storage: Storage) -> None:
    """Pieces of all kinds of memory are written one after the other, over what was there, and an empty file is one."""
    numbers = array("h", range(4))
    assert storage.write("x/1", [b"before", b"it"]) == 8
    assert storage.write("x/1", [b"ab", memoryview(numbers), b""]) == 10
    assert bytes(storage.map("x/1")) == b"ab\0\0\1\0\2\0\3\0"
    assert storage.write("x/2", []) == 0
    assert bytes(storage.map("x/2")) == b""
    storage.sync("x/2")


def test_a_folder_goes_with_all_that_is_in_it(storage: Storage) -> None:
    """A folder is renamed and removed whole, open files included, and its files can be made again."""
    for name in ("x/1", "x/y/2", "xy"):
        storage.create(name, 64)
        storage.sync(name)
    storage.rename("x", "z")
    assert storage.names("x") == []
    assert storage.names("z") == ["1", "y"]
    storage.sync("z/y/2")
    storage.remove("z")
    assert storage.names("z") == []
    assert storage.size("xy") == 64
    storage.create("x/1", 10)
    storage.sync("x/1")


# -- of this machine


def open_below(root: Path) -> int:
    """Return how many descriptors of this process are of files below a directory."""
    found = 0
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{each}").startswith(str(root))
    return found


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    """A file that is removed, alone or with its folder, under its first name or another, is closed."""
    storage = DiskStorage(tmp_path)
    storage.create("x/0", 64)
    assert open_below(tmp_path) == 1
    for name in ("x/1", "y/1", "y/2"):
        storage.create(name, 64)
        storage.sync(name)
    assert open_below(tmp_path) == 4
    storage.rename("x/1", "x/2")
    storage.remove("x/2")
    storage.rename("y", "z")
    storage.sync("z/1")
    storage.remove("z")
    assert open_below(tmp_path) == 1
    storage.close()
    assert open_below(tmp_path) == 0


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file grow beyond 4,096 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_file_that_cannot_be_made_is_not_there(tmp_path: Path) -> None:
    """Where there is no room for a file, none of it stays: neither of one of zeros nor of one in pieces."""
    storage = DiskStorage(tmp_path)
    with pytest.raises(OSError, match="File too large"):
        storage.create("x/1", 8192)
    with pytest.raises(OSError, match="File too large"):
        storage.write("x/2", [b"x" * 4096, b"y"])
    assert storage.names("x") == []
    storage.create("x/1", 4096)
    assert storage.write("x/2", [b"x" * 4096]) == 4096


def test_what_failed_to_sync_once_fails_again(tmp_path: Path) -> None:
    """A sync that failed is not tried again for its file, under whatever name; a new file of that name is another."""
    os.mkfifo(tmp_path / "x")  # the kernel syncs no pipe
    storage = DiskStorage(tmp_path)
    for name in ("x", "x"):
        with pytest.raises(OSError, match="Invalid argument") as first:
            storage.sync(name)
    storage.rename("x", "y")
    with pytest.raises(OSError, match="Invalid argument") as again:
        storage.sync("y")
    assert again.value is first.value
    storage.create("x", 64)
    storage.sync("x")
    storage.remove("y")
    storage.write("y", [b"another"])
    storage.sync("y")


@pytest.mark.parametrize("name", ["link/1", "folder/link", "../outside/1", "folder/../folder/1", "/etc/x", "", "a//b"])
def test_no_way_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    """A symbolic link is not followed, and no name leads to a file elsewhere, whatever is asked for."""
    (root := tmp_path / "data").mkdir()
    (outside := tmp_path / "outside").mkdir()
    (outside / "1").write_bytes(b"not ours")
    (root / "link").symlink_to(outside)
    (root / "folder").mkdir()
    (root / "folder" / "link").symlink_to(outside / "1")
    storage = DiskStorage(root)
    for attempt in (
        lambda: storage.create(name, 10),
        lambda: storage.write(name, [b"x"]),
        lambda: storage.map(name),
        lambda: storage.sync(name),
        lambda: storage.remove(name),
        lambda: storage.rename(name, "y"),
        lambda: storage.names(name),
    ):
        with pytest.raises(OSError, match="A data directory has no symbolic links"):
            attempt()
    assert (outside / "1").read_bytes() == b"not ours"
    assert [path.name for path in outside.iterdir()] == ["1"]


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Other users of the machine cannot read parameters and gradients."""
    storage = DiskStorage(tmp_path)
    storage.create("x/1", 10)
    storage.write("x/2", [b"2"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"x": 0o700, "1": 0o600, "2": 0o600}


def test_the_time_since_the_machine_was_started_has_a_name(tmp_path: Path) -> None:
    """Two storages of one machine agree on when it was started; one whose power failed was started again."""
    assert DiskStorage(tmp_path).boot == DiskStorage(tmp_path).boot != b""
    assert PowerStorage().boot != PowerStorage().boot
