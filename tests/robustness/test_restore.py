"""What comes back from an archive that is damaged, incomplete or fails; and `farstep sessions restore`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farstep.errors import DamagedJournal, FarstepError
from farstep_service.cli.output import REFUSED
from farstep_service.durability.archive import SessionArchive
from farstep_service.durability.directory import DataDirectory
from farstep_service.durability.objects import FolderObjects, Objects
from farstep_service.durability.reading import segments_in
from farstep_service.durability.restoring import Restored, archived_in, restore
from farstep_service.keeping.recovery import Progress, recover
from farstep_service.kernels import Kernels
from tests.robustness.archiving import OFTEN, Faulty, Training, archived, files_below, view
from tests.support.service.servers import farstep as run_farstep
from tests.support.service.servers import running_server

STEPS = 220
FEW = 70


@dataclass
class Kept:
    """A data directory of a server that was killed, and what its session was.

    Attributes:
        data: the directory.
        versions: the parameters of each version.
    """

    data: Path
    versions: list[Tensor]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Return what a server had on its disk when it was killed: the snapshot of its last end, and segments behind it."""
    data = tmp_path_factory.mktemp("kept") / "data"
    with running_server("--data-dir", str(data), loaded=True) as server:
        training = Training(server.url).run(60)
        server.stop()
        server.restart()
        training.run(STEPS)
        server.kill()
    return Kept(data, training.versions)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Return the same of a shorter life: one snapshot, and two closed segments."""
    data = tmp_path_factory.mktemp("few") / "data"
    with running_server("--data-dir", str(data), loaded=True) as server:
        training = Training(server.url).run(FEW)
        server.kill()
    return Kept(data, training.versions)


@pytest.fixture(scope="module")
def full(kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that is an archive of it."""
    folder = tmp_path_factory.mktemp("archive")
    bring(kept, FolderObjects(folder))
    return folder


def bring(kept: Kept, objects: Objects, *, times: int = 1) -> None:
    """Copy the session to a store, as its server would; every segment but the last is closed."""
    with closing(DataDirectory(str(kept.data), "a test")) as directory:
        (folder,) = directory.folders()
        last = max(number for number, _ in segments_in(directory.storage, folder))
        copy = SessionArchive(objects, directory.storage, folder, "s", lambda _: None, lambda: last)
        for _ in range(times):
            copy.bring()


def back(objects: Objects, data: Path) -> tuple[Restored, int, Tensor]:
    """Restore the only session, recover it as a server would, and return its version and parameters."""
    with closing(DataDirectory(str(data), "a test")) as directory:
        (one,) = archived_in(objects)
        restored = restore(objects, one.identity, directory)
        (folder,) = directory.folders()
        kernels = Kernels("auto")
        recovered = recover(directory.storage, folder, Progress(0.0), kernels=lambda _: kernels, device="cpu")
        contents = recovered.session.record().tensors.snapshot
        assert contents is not None
        assert recovered.predecessors
        assert recovered.session.incarnation not in recovered.predecessors
        memory = bytes(contents.contents.memory_of_entries()[0])
        return restored, recovered.session.version, torch.frombuffer(bytearray(memory), dtype=torch.float32)


def test_what_comes_back_is_a_version_that_was(kept: Kept, full: Path, tmp_path: Path) -> None:
    """Snapshot and closed segments give the version at the end of the last of these, with its bits."""
    restored, version, parameters = back(FolderObjects(full), tmp_path / "data")
    assert restored.dropped == ()
    assert restored.version < version <= STEPS
    assert version > STEPS - 40
    assert torch.equal(parameters, kept.versions[version])


@pytest.mark.parametrize(("gone", "half"), [(False, True), (True, False)])
def test_a_store_that_fails_at_any_call_loses_nothing(few: Kept, tmp_path: Path, *, gone: bool, half: bool) -> None:
    """For every call to the store: it fails, once or from then on, with or without half an object left behind.

    Whatever was whole before still comes back, and the next copy completes the archive.
    """
    calls = Faulty(FolderObjects(tmp_path / "calm"), 0)
    bring(few, calls)
    assert calls.calls > 8
    whole, (_, last, _) = 0, back(FolderObjects(tmp_path / "calm"), tmp_path / "calm-data")
    for fails_at in range(1, calls.calls + 1):
        objects = FolderObjects(tmp_path / str(fails_at))
        bring(few, Faulty(objects, fails_at, gone=gone, half=half))
        if archived_in(objects):
            _, version, parameters = back(objects, tmp_path / f"data-{fails_at}")
            assert torch.equal(parameters, few.versions[version])
            whole += 1
        bring(few, objects)
        restored, version, _ = back(objects, tmp_path / f"again-{fails_at}")
        assert (restored.dropped, version) == ((), last)
    assert whole > 0


def test_a_newer_snapshot_that_fails_midway_leaves_the_older_one(few: Kept, tmp_path: Path) -> None:
    """An archive that has a whole snapshot has one after every failure of the copy of the next."""
    shutil.copytree(few.data, tmp_path / "later")
    with running_server("--data-dir", str(tmp_path / "later"), loaded=True) as server:
        assert view(server)["version"] == FEW
    later = Kept(tmp_path / "later", few.versions)
    before = FolderObjects(tmp_path / "before")
    bring(few, before)
    shutil.copytree(tmp_path / "before", tmp_path / "calm")
    calls = Faulty(FolderObjects(tmp_path / "calm"), 0)
    bring(later, calls)
    assert calls.calls > 8
    assert [each.version for each in archived_in(FolderObjects(tmp_path / "calm"))] == [FEW]
    for fails_at in range(1, calls.calls + 1):
        shutil.copytree(tmp_path / "before", tmp_path / f"archive-{fails_at}")
        objects = FolderObjects(tmp_path / f"archive-{fails_at}")
        bring(later, Faulty(objects, fails_at, gone=True, half=True))
        _, version, parameters = back(objects, tmp_path / f"data-{fails_at}")
        assert torch.equal(parameters, few.versions[version])
        assert version > 0


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a flipped bit": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
}


def flipped(content: bytes) -> bytes:
    """Return bytes with one bit in the middle changed."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.promise("Damage in an archive is found, and what is whole comes back.", area="durability")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_ends_what_comes_back(damage: str, kept: Kept, full: Path, tmp_path: Path) -> None:
    """The events before it come back, those behind it do not, and the command says what it left."""
    shutil.copytree(full, tmp_path / "archive")
    DAMAGE[damage](sorted((tmp_path / "archive").rglob("*.journal"))[-2])
    restored, version, parameters = back(FolderObjects(tmp_path / "archive"), tmp_path / "data")
    assert len(restored.dropped) == 1
    assert restored.version < version < STEPS - 40
    assert torch.equal(parameters, kept.versions[version])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", ["*.json", "*.safetensors", "*.state"])
def test_an_archive_without_a_whole_snapshot_is_refused(damage: str, ending: str, full: Path, tmp_path: Path) -> None:
    """Nothing is put into the data directory where the only snapshot is damaged."""
    shutil.copytree(full, tmp_path / "archive")
    (file,) = (tmp_path / "archive").rglob(ending)
    DAMAGE[damage](file)
    with closing(DataDirectory(str(tmp_path / "data"), "a test")) as directory:
        with pytest.raises(DamagedJournal):
            restore(FolderObjects(tmp_path / "archive"), file.parent.name, directory)
        assert directory.storage.names("sessions") == []


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", ["json", "safetensors", "state"])
def test_an_older_snapshot_takes_the_place_of_a_damaged_one(damage: str, ending: str, tmp_path: Path) -> None:
    """The newest snapshot is damaged: the one before comes back, with what its segments hold."""
    url = f"file://{tmp_path}/archive"
    with running_server("--data-dir", str(tmp_path / "a"), "--archive", url, *OFTEN, loaded=True) as server:
        training = Training(server.url).run(60)
        archived(server, 0)
        training.close()
        server.stop()
        server.restart()
        training = Training(server.url)
        training.step(61)
        archived(server, 60)
        server.kill()
    manifests = sorted((tmp_path / "archive").rglob("*.json"))
    assert len(manifests) == 2
    DAMAGE[damage](manifests[-1].with_suffix(f".{ending}"))
    restored, version, _ = back(FolderObjects(tmp_path / "archive"), tmp_path / "b")
    assert restored.version == 0
    assert version > 0
    assert len(restored.dropped) == (0 if (ending, damage) == ("json", "gone") else 1)


def test_a_restoration_that_fails_leaves_nothing(full: Path, tmp_path: Path) -> None:
    """For every call to the store that fails: the directory has no session, and no file of one."""
    (one,) = archived_in(FolderObjects(full))
    calls = Faulty(FolderObjects(full), 0)
    with closing(DataDirectory(str(tmp_path / "calm"), "a test")) as directory:
        restore(calls, one.identity, directory)
    assert calls.calls > 5
    with closing(DataDirectory(str(tmp_path / "data"), "a test")) as directory:
        for fails_at in range(1, calls.calls + 1):
            with pytest.raises(OSError, match="refused"):
                restore(Faulty(FolderObjects(full), fails_at, gone=True), one.identity, directory)
            assert directory.storage.names("sessions") == []


def test_what_a_killed_restoration_left_is_no_session(full: Path, tmp_path: Path) -> None:
    """A folder that was not complete when its process ended is gone when the directory is next opened."""
    (one,) = archived_in(FolderObjects(full))
    with closing(DataDirectory(str(tmp_path / "data"), "a test")) as directory:
        restore(FolderObjects(full), one.identity, directory)
        (folder,) = directory.folders()
        directory.storage.rename(folder, f"{folder}.new")
        assert directory.folders() == []
    with closing(DataDirectory(str(tmp_path / "data"), "a test")) as directory:
        assert directory.storage.names("sessions") == []


def test_a_segment_that_changes_after_it_was_closed_is_copied_again(kept: Kept, tmp_path: Path) -> None:
    """A body that arrives in a closed segment is in the archive once an event of a later segment refers to it."""
    shutil.copytree(kept.data, tmp_path / "data")
    objects = FolderObjects(tmp_path / "archive")
    with closing(DataDirectory(str(tmp_path / "data"), "a test")) as directory:
        (folder,) = directory.folders()
        there = [*segments_in(directory.storage, folder)]
        number, name = there[-2]
        copy = SessionArchive(objects, directory.storage, folder, "s", lambda _: None, lambda: there[-1][0])
        copy.bring()
        file = tmp_path / "data" / name
        changed = flipped(file.read_bytes())
        with file.open("r+b") as opened:
            opened.write(changed)
        copy.bring()
        assert objects_of(tmp_path / "archive", number) != [changed]
        copy.late.append(number)
        copy.bring()
        assert objects_of(tmp_path / "archive", number) == [changed]


def objects_of(archive: Path, number: int) -> list[bytes]:
    """Return what an archive holds of a segment."""
    return [each.read_bytes() for each in archive.rglob(f"{number:08}.*.journal")]


def test_a_segment_that_is_used_again_meanwhile_is_not_in_the_archive(kept: Kept, tmp_path: Path) -> None:
    """A segment whose file got another name while it was copied leaves no object that says it is that segment."""
    shutil.copytree(kept.data, tmp_path / "data")
    with closing(DataDirectory(str(tmp_path / "data"), "a test")) as directory:
        (folder,) = directory.folders()
        there = [*segments_in(directory.storage, folder)]
        number, name = there[-2]

        class Renaming(Faulty):
            """A store during whose first copy the journal lets go of the segment."""

            def put(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
                super().put(name, let_go(pieces))

        def let_go(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
            for piece in pieces:
                yield piece
                if name in (each for _, each in segments_in(directory.storage, folder)):
                    directory.storage.rename(name, f"{folder}/{number:08}.spare")

        objects = Renaming(FolderObjects(tmp_path / "archive"), 0)
        copy = SessionArchive(objects, directory.storage, folder, "s", lambda _: None, lambda: there[-1][0])
        copy.bring()
        assert objects_of(tmp_path / "archive", number) == []
        assert objects_of(tmp_path / "archive", there[-3][0]) != []


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(full: Path, tmp_path: Path) -> str:
    """Return the URL of an archive of two sessions."""
    (session,) = full.iterdir()
    for name in (session.name, "0" * 32):
        shutil.copytree(session, tmp_path / "archive" / name)
    return f"file://{tmp_path}/archive"


def test_several_sessions_are_listed_and_one_is_chosen_by_its_id(two: str, tmp_path: Path) -> None:
    """The URL of an archive of several restores none and lists them; with an ID behind it, it restores that one."""
    data = str(tmp_path / "data")
    done = run_farstep("sessions", "restore", two, "--data-dir", data, loaded=True)
    assert done.returncode == REFUSED
    assert "0" * 32 in done.stdout
    assert not (tmp_path / "data").exists()
    listed = json.loads(run_farstep("sessions", "restore", two, "--data-dir", data, "--json", loaded=True).stdout)
    assert [each["name"] for each in listed["sessions"]] == ["s", "s"]
    chosen = run_farstep("sessions", "restore", f"{two}/{'0' * 32}", "--data-dir", data, "--json", loaded=True)
    assert json.loads(chosen.stdout)["name"] == "s"


def test_a_name_that_is_there_is_refused_and_another_can_be_given(two: str, kept: Kept, tmp_path: Path) -> None:
    """Restoring a session under the name of one that is there changes nothing; `--as` gives it another."""
    data, one = tmp_path / "data", f"{two}/{'0' * 32}"
    assert run_farstep("sessions", "restore", one, "--data-dir", str(data), loaded=True).returncode == 0
    before = files_below(data / "sessions")
    done = run_farstep("sessions", "restore", one, "--data-dir", str(data), loaded=True)
    assert (done.returncode, "--as" in done.stderr) == (1, True)
    assert files_below(data / "sessions") == before
    done = run_farstep("sessions", "restore", one, "--data-dir", str(data), "--as", "s2", loaded=True)
    assert done.returncode == 0, done.stderr
    with running_server("--data-dir", str(data), loaded=True) as server:
        for name in ("s", "s2"):
            copy = Training(server.url, name)
            assert any(torch.equal(copy.parameters, each) for each in kept.versions[-40:])


@pytest.mark.parametrize("name", ["../s", "", "a/b", "a b"])
def test_a_name_that_is_a_path_is_refused(name: str, two: str, tmp_path: Path) -> None:
    """`--as` takes the name of a session only."""
    data = str(tmp_path / "data")
    done = run_farstep("sessions", "restore", f"{two}/{'0' * 32}", "--data-dir", data, "--as", name, loaded=True)
    assert (done.returncode, "Invalid name" in done.stderr) == (REFUSED, True)


def test_a_directory_that_a_server_has_is_refused(two: str, tmp_path: Path) -> None:
    """While a server owns the directory the command says which, and changes nothing."""
    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server:
        done = run_farstep(
            "sessions", "restore", f"{two}/{'0' * 32}", "--data-dir", str(tmp_path / "data"), loaded=True
        )
        assert (done.returncode, str(server.pid) in done.stderr) == (REFUSED, True)


@pytest.mark.parametrize(
    ("url", "said"),
    [("file:///nothing/here", "There is no session"), ("ftp://a/b", "scheme"), ("s3://a/b?key=x", "secret")],
)
def test_a_url_without_a_session_is_refused(url: str, said: str, tmp_path: Path) -> None:
    """A URL at which there is nothing, or that is none, makes no directory."""
    done = run_farstep("sessions", "restore", url, "--data-dir", str(tmp_path / "data"), loaded=True)
    assert (done.returncode, said in done.stderr) == (REFUSED, True)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--archive", "file:///backups"), "--data-dir"),
        (("--data-dir", "{data}", "--archive", "backups"), "file://"),
        (("--data-dir", "{data}", "--archive", "s3://key:secret@bucket"), "variables"),
    ],
)
def test_an_archive_that_cannot_be_is_refused_at_the_start(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    """A server without a data directory, or with what is no URL, does not start, and the remedy says what to give."""
    done = run_farstep("serve", *(each.format(data=tmp_path / "data") for each in arguments), loaded=True)
    assert (done.returncode, said in done.stderr) == (REFUSED, True)
    assert "secret@" not in done.stderr


def test_errors_of_farstep_are_what_the_archive_raises(full: Path, tmp_path: Path) -> None:
    """A session that is not in the archive is an error that names it."""
    with (
        closing(DataDirectory(str(tmp_path), "a test")) as directory,
        pytest.raises(FarstepError, match=f"no whole snapshot of {'1' * 32}"),
    ):
        restore(FolderObjects(full), "1" * 32, directory)
