"""Data directories that are wrong: each is refused with what is wrong and what to do, and nothing in it is changed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import farstep
from farstep.protocol.durability import to_document
from tests.support.service.histories import came_back, equal, trained
from tests.support.service.raw import RawClient, gradient
from tests.support.service.servers import READY_WITHIN_S, running_server
from tests.support.service.servers import farstep as run_farstep

LARGE = [torch.zeros(32 * 1024)]
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24
WITHOUT_PRIVILEGE = f"""
import ctypes, os, sys
if os.geteuid() == 0:  # whose processes may write anywhere, but for this
    assert ctypes.CDLL(None, use_errno=True).prctl({PR_CAPBSET_DROP}, {CAP_DAC_OVERRIDE}, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "farstep_service", *sys.argv[1:]])
"""


def refused(directory: Path, *arguments: str) -> str:
    """Return what a server says that does not start on a directory."""
    done = run_farstep("serve", "--port", "0", "--data-dir", str(directory), *arguments, loaded=True)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error invalid_option: Invalid data_dir: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*") if each.is_file()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data directory with one session of three steps, whose server was killed."""
    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server:
        with RawClient(server.url) as raw:
            trained(raw, "s", 3)
        server.kill()
    return tmp_path / "data"


def folder_of(data: Path) -> Path:
    """Return the folder of the one session."""
    (folder,) = (data / "sessions").iterdir()
    return folder


@pytest.mark.promise(
    "A data directory that is not ours, read-only, full, newer or owned by another server is refused, and left alone.",
    area="bad input",
)
def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    """A directory with other files is no data directory; so is one whose marker cannot be read."""
    (tmp_path / "thesis.tex").write_text("do not touch")
    assert "holds 'thesis.tex'" in refused(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"do not touch"}
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "farstep.json").write_text("[]")
    assert "farstep.json cannot be read" in refused(tmp_path)
    assert contents(tmp_path) == {"farstep.json": b"[]"}


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    """A path that is a file, or leads through one, is refused."""
    file = tmp_path / "file"
    file.write_text("x")
    assert "cannot be used" in refused(file)
    assert "cannot be used" in refused(file / "below")
    assert file.read_text() == "x"


def test_a_newer_format_is_refused(data: Path) -> None:
    """A directory of a later release is refused, naming both formats, and left as it is."""
    (data / "farstep.json").write_text('{"format": 99}')
    before = contents(data)
    assert "has the format 99, and this release reads up to 1" in refused(data)
    assert contents(data) == before


def test_a_newer_session_is_refused_alone(data: Path) -> None:
    """A manifest of a later release refuses its session, naming the format; the server starts."""
    import xxhash

    for manifest in folder_of(data).glob("*.json"):
        said = json.loads(manifest.read_bytes().partition(b"\n")[0])
        text = json.dumps({**said, "format": 99}).encode()
        manifest.write_bytes(text + b"\n" + xxhash.xxh3_128_hexdigest(text).encode() + b"\n")
    before = contents(data / "sessions")
    with running_server("--data-dir", str(data), loaded=True) as server:
        with RawClient(server.url) as raw:
            assert raw.begun("other")
        assert "has the format 99, and this release reads up to 1" in server.log
    after = contents(data / "sessions")
    assert {name: after[name] for name in before} == before


@pytest.mark.skipif(sys.platform != "linux", reason="drops a capability of Linux, which lets root write anywhere")
def test_a_directory_that_cannot_be_written_is_refused(data: Path) -> None:
    """A user who may not write there is told so; with an empty directory, too."""
    empty = data.parent / "empty"
    empty.mkdir()
    (data / "owner.lock").chmod(0o400)
    for directory in (data, empty):
        directory.chmod(0o500)
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PRIVILEGE, "serve", "--port", "0", "--data-dir", str(directory)],
            capture_output=True,
            text=True,
            check=False,
            timeout=READY_WITHIN_S,
        )
        directory.chmod(0o700)
        assert done.returncode == 2, done.stderr
        assert f"{directory} cannot be used (Permission denied)" in done.stderr
        assert "Give a directory that can be written." in done.stderr


def test_a_second_server_is_told_who_owns_the_directory(data: Path) -> None:
    """The refusal names the process; the first server goes on, and after it another one may start."""
    with running_server("--data-dir", str(data), loaded=True) as server:
        assert f"owned by the farstep server with process id {server.pid}" in refused(data)
        with RawClient(server.url) as raw:
            came_back(raw, "s")
        server.kill()
        with running_server("--data-dir", str(data), loaded=True) as another, RawClient(another.url) as raw:
            came_back(raw, "s")


@pytest.mark.promise("A symbolic link that somebody planted in a data directory is not followed.", area="security")
@pytest.mark.parametrize("name", ["sessions", "farstep.json", "owner.lock"])
def test_a_link_in_the_directory_is_refused(name: str, data: Path) -> None:
    """A link in the place of a file or folder of the directory is refused, and what it leads to is left alone."""
    elsewhere = data.parent / "elsewhere"
    (data / name).rename(elsewhere)
    (data / name).symlink_to(elsewhere)
    before = contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    assert "symbolic link" in refused(data)
    assert (contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before


def test_a_link_in_the_place_of_a_session_is_refused(data: Path) -> None:
    """A folder of a session that is a link is refused by its name."""
    elsewhere = data.parent / "elsewhere"
    folder = folder_of(data)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert f"{folder} is not a folder" in refused(data)


@pytest.mark.parametrize("ending", ["state", "journal", "json"])
def test_a_link_in_the_folder_of_a_session_refuses_that_session(ending: str, data: Path) -> None:
    """What the link leads to is neither read nor written; the error names the file, and other sessions are served."""
    (file,) = folder_of(data).glob(f"*.{ending}")
    elsewhere = data.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    with running_server("--data-dir", str(data), loaded=True) as server, RawClient(server.url) as raw:
        (other,) = raw.begun("other")
        assert other.version == 0
        if ending == "json":  # nothing says what the session is called
            assert "symbolic link" in server.log
        else:
            while (answer := raw.request("GET", "/v1/sessions/s")).document["code"] == "recovering":
                pass
            assert answer.document["code"] == "damaged_journal"
            assert file.name in answer.document["detail"]
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("name", ["..", "../../up", "a/b", "/etc/cron.d/x", "a\0b", ".hidden", "sessions/../../up", ""])
def test_a_name_that_is_a_path_reaches_no_file(name: str, tmp_path: Path) -> None:
    """No session is called so, and no file is made for it."""
    with running_server("--data-dir", str(tmp_path / "in" / "data"), loaded=True) as server:
        with RawClient(server.url) as raw:
            answer = raw.json(
                "POST",
                "/v1/sessions",
                {
                    "name": name,
                    "worker": "w0",
                    "optimizer": "SGD",
                    "groups": [{"lr": 0.1}],
                    "segments": [{"name": "p", "shape": [1], "dtype": "float32"}],
                },
            )
            assert answer.status == 400
            assert answer.document["code"] == "invalid_request"
        server.stop()
    assert contents(tmp_path).keys() == {"in/data/farstep.json", "in/data/owner.lock"}


@pytest.mark.promise(
    "A disk that is full fails pushes with 507, and nothing else; when there is room, all goes on.", area="bad input"
)
def test_a_full_disk_fails_pushes_and_answers_pulls(tmp_path: Path) -> None:
    """Without room for another file pushes and new sessions get 507, and pulls go on; with room, everything does."""
    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server, RawClient(server.url) as raw:
        (worker,) = raw.begun("s", parameters=LARGE)
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, hard))  # no file may become larger
        step = 0
        while (answer := worker.push(gradient(step, LARGE), base=step)).status == 200:
            step += 1
        assert (answer.status, answer.document["code"]) == (507, "not_durable")
        assert "Make room" in answer.document["remedy"]
        version, parameters = worker.pull()
        assert version == step
        journal = to_document(farstep.Journal())
        created = raw.json(
            "POST",
            "/v1/sessions",
            {
                "name": "new",
                "worker": "w0",
                "optimizer": "SGD",
                "groups": [{"lr": 0.1}],
                "segments": [{"name": "p", "shape": [1], "dtype": "float32"}],
                "durability": journal,
            },
        )
        assert created.status == 507
        assert raw.request("GET", "/v1/sessions/new").status == 404
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        while (answer := worker.push(gradient(step, LARGE), base=step)).status == 507:
            pass
        assert answer.status == 200
        after = worker.pull()
        assert after[0] == step + 1
        assert not equal(after[1], parameters)
        server.kill()
        server.restart()
        with RawClient(server.url) as again:
            came_back(again, "s")
            worker.raw = again
            assert worker.pull()[0] == step + 1
            assert equal(worker.pull()[1], after[1])


def test_a_server_does_not_start_on_a_full_disk(tmp_path: Path) -> None:
    """Where not even the marker can be written, the refusal says so; when there is room, a server starts there."""
    full = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)); "
        "os.execv(sys.executable, [sys.executable, '-m', 'farstep_service', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", full, "serve", "--port", "0", "--data-dir", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
        timeout=READY_WITHIN_S,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be used (File too large)" in done.stderr
    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server, RawClient(server.url) as raw:
        assert raw.begun("s")
