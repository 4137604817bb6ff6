"""Sessions as files, through a real server and the command line: whole or not at all, on both sides."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import farstep
from farstep.conversation import FILE, Conversation
from farstep.errors import (
    InvalidFile,
    InvalidOption,
    LimitExceeded,
    NotInitialised,
    SessionExists,
    Unauthorized,
    Unavailable,
    UnknownSession,
)
from farstep.protocol.session_file import look_at
from tests.support.faults import Network, faulty
from tests.support.service.answers import half_sent, read_answer
from tests.support.service.raw import RawClient, RawWorker
from tests.support.service.servers import TOKEN, RunningServer, running_server
from tests.support.service.servers import farstep as command

LARGE = (torch.zeros(400_000), torch.zeros(7))


@pytest.fixture
def worker(raw: RawClient, request: pytest.FixtureRequest) -> Iterator[RawWorker]:
    """Begin a session of two parameters that has taken a step, and remove what a test leaves."""
    (own,) = raw.begun("digits", parameters=LARGE)
    own.push([torch.ones_like(each) for each in LARGE])
    yield own
    for name in names(raw):
        raw.request("DELETE", f"/v1/sessions/{name}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "digits.safetensors"


@pytest.fixture
def exported(server: RunningServer, worker: RawWorker, file: Path) -> Path:
    return farstep.export_session("digits", file, server=server.url).file


def names(raw: RawClient) -> list[str]:
    return [each["name"] for each in raw.request("GET", "/v1/sessions").document]


def contents(raw: RawClient, name: str) -> bytes:
    answer = raw.request("GET", f"/v1/sessions/{name}/contents?fields=param,sum,step,present")
    assert answer.header["version"] == 1
    return answer.payload


# -- the command line


def test_export_and_import(server: RunningServer, raw: RawClient, worker: RawWorker, file: Path) -> None:
    """A session goes into a file of its owner's and comes back under another name, with everything it had."""
    worker.raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": {"lr": 0.125}}})
    done = command("sessions", "export", "digits", str(file), "--server", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Exported session digits at version 1 to {file} (3.2 MB).\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(file.parent) == [file.name]
    done = command("sessions", "import", str(file), "--server", server.url, "--name", "again")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Imported Adagrad session again at version 1.\n", "")
    assert contents(raw, "again") == contents(raw, "digits")
    here, there = (raw.request("GET", f"/v1/sessions/{name}").document for name in ("digits", "again"))
    assert here["groups"] == there["groups"]
    assert there["groups"][0]["lr"] == 0.125
    assert here["incarnation"] != there["incarnation"]
    assert there["workers"] == {}
    assert raw.join("again", "w0", LARGE, groups=[{"lr": 0.1}]).joined["initialised"]  # by the options of its creation


def test_an_export_after_a_switch_has_the_mode_in_force(
    server: RunningServer, raw: RawClient, worker: RawWorker, file: Path
) -> None:
    """The mode that a session was created in is over: what is imported is joined in the one that it was switched to."""
    mode = {"mode": "bounded", "staleness": 3}
    worker.raw.json("PUT", f"{worker.path}/consistency", {"consistency": mode})
    farstep.export_session("digits", file, server=server.url)
    farstep.import_session(file, server=server.url, name="again")
    here, there = (raw.request("GET", f"/v1/sessions/{name}").document for name in ("digits", "again"))
    assert there["consistency"] == here["consistency"]
    assert there["consistency"]["mode"] == "bounded"
    assert raw.join("again", "w0", LARGE, consistency=mode).joined["initialised"]


def test_both_verbs_answer_in_json(server: RunningServer, worker: RawWorker, file: Path) -> None:
    """--json prints one line: what went where, or the problem."""
    options = ("--server", server.url, "--json")
    said = json.loads(command("sessions", "export", "digits", str(file), *options).stdout)
    assert said == {
        "file": str(file), "name": "digits", "optimizer": "Adagrad", "version": 1, "parameters": 2,
        "nbytes": file.stat().st_size,
    }  # fmt: skip
    done = command("sessions", "import", str(file), *options)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, "session_exists")
    said = json.loads(command("sessions", "import", str(file), "--name", "b", *options).stdout)
    assert (said["name"], said["version"]) == ("b", 1)
    done = command("sessions", "export", "digits", str(file), *options)
    assert (done.returncode, json.loads(done.stdout)["field"]) == (2, "file")


def test_neither_verb_loads_torch(server: RunningServer, worker: RawWorker, file: Path) -> None:
    """Moving a file needs no tensor, so it does not wait for the import of torch."""
    for verb in (["export", "digits", str(file)], ["import", str(file), "--name", "b"]):
        done = command("sessions", *verb, "--server", server.url, python=("-X", "importtime"))
        assert done.returncode == 0
        assert not {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()} & {"torch", "safetensors"}


def test_a_token_is_needed() -> None:
    """Whoever has no token gets no session out of a server, and none in."""
    with running_server(token=TOKEN, loaded=True) as guarded, RawClient(guarded.url) as stranger:
        for method in ("GET", "PUT"):
            assert isinstance(stranger.request(method, "/v1/sessions/s/file", b"").error, Unauthorized)


# -- the file


@pytest.mark.promise("The safetensors library reads and writes session files.", area="sessions and files")
def test_anybody_can_read_it(exported: Path) -> None:
    """The safetensors library finds the tensors by their names, and says what the session was."""
    with safe_open(exported, "pt") as opened:
        assert set(opened.keys()) == {"param/p0", "param/p1", "sum/p0", "sum/p1", "step", "present"}
        assert opened.get_tensor("sum/p1").tolist() == [1.0] * 7
        assert opened.get_tensor("step").tolist() == [1.0, 1.0]
        assert json.loads(opened.metadata()["farstep_session"])["optimizer"] == "Adagrad"


@pytest.mark.promise("The safetensors library reads and writes session files.", area="sessions and files")
def test_anybody_can_write_it(server: RunningServer, raw: RawClient, exported: Path) -> None:
    """A file that went through the library, edited and in its own order, is imported as well."""
    with safe_open(exported, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(exported)
    tensors["param/p1"] = torch.full((7,), 3.0)
    save_file(tensors, exported, metadata)
    assert farstep.import_session(exported, name="edited", server=server.url) == "edited"
    edited = raw.join("edited", parameters=LARGE)
    assert edited.pull()[1][1].tolist() == [3.0] * 7


def test_a_file_that_is_there_stays(server: RunningServer, worker: RawWorker, file: Path) -> None:
    """Nothing is overwritten unless it is asked for, and then by a whole file at once."""
    file.write_text("mine")
    with pytest.raises(InvalidOption, match="is there already"):
        farstep.export_session("digits", file, server=server.url)
    assert file.read_text() == "mine"
    assert farstep.export_session("digits", file, server=server.url, force=True).version == 1
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("where", ["nowhere/x", ".", "x" * 300])
def test_a_place_that_cannot_be_written_is_refused(
    server: RunningServer, worker: RawWorker, tmp_path: Path, where: str
) -> None:
    """A directory that is not there, one that is in the way, and an impossible name are refused in words."""
    with pytest.raises(InvalidOption, match=r"Cannot write|is there already") as refused:
        farstep.export_session("digits", tmp_path / where, server=server.url, force=where == ".")
    assert refused.value.field == "file"
    assert os.listdir(tmp_path) == []


def test_what_is_not_there_cannot_be_exported(server: RunningServer, raw: RawClient, file: Path) -> None:
    """No session, and one whose first parameters have not arrived: the server's own words, and no file."""
    with pytest.raises(UnknownSession):
        farstep.export_session("nobody", file, server=server.url)
    raw.join("empty")
    with pytest.raises(NotInitialised):
        farstep.export_session("empty", file, server=server.url)
    with pytest.raises(InvalidOption, match="No server"):
        farstep.export_session("empty", file)
    with pytest.raises(InvalidOption, match="called"):
        farstep.export_session("a/b", file, server=server.url)
    raw.request("DELETE", "/v1/sessions/empty")
    assert os.listdir(file.parent) == []


# -- half a file


@pytest.fixture
def network(server: RunningServer) -> Iterator[Network]:
    with faulty(server.port) as between:
        yield between


@pytest.mark.promise("An export is whole or not at all, also if it is killed.", area="sessions and files")
@pytest.mark.parametrize("after", [0, 300, 100_000])
def test_an_export_that_is_cut_off_leaves_no_file(network: Network, worker: RawWorker, file: Path, after: int) -> None:
    """Wherever the connection breaks there is no file, or the one that was there before."""
    for old in ([], [file]):
        network.cut_response(after=after)
        with pytest.raises(Unavailable):
            farstep.export_session("digits", file, server=network.url, force=True)
        assert list(file.parent.iterdir()) == old
        file.write_text("old")


@pytest.mark.promise("An export is whole or not at all, also if it is killed.", area="sessions and files")
def test_an_export_that_is_killed_leaves_the_old_file(exported: Path, file: Path) -> None:
    """SIGKILL in the middle of an export: under the name stands what stood there before."""
    whole = exported.read_bytes()
    exported.write_text("old")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = ["sessions", "export", "digits", str(file), "--force", "--server", url]
        process = subprocess.Popen([sys.executable, "-m", "farstep_service", *arguments])
        try:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % len(whole))
                connection.sendall(whole[:-1])  # all of it but a byte: it has been received, and mostly written
                process.kill()
                process.wait(60)
        finally:
            process.kill()
            process.wait()
    assert file.read_text() == "old"


@pytest.mark.promise(
    "An import is whole or not at all; before its last byte nobody can join the session.",
    area="sessions and files",
)
def test_an_import_that_is_cut_off_leaves_nothing(network: Network, raw: RawClient, exported: Path) -> None:
    """A connection that breaks in the head or in the tensors leaves no session, and the name stays free."""
    for after in (100, 600, 1_000_000):
        network.cut_request(after=after)
        with pytest.raises(Unavailable):
            farstep.import_session(exported, name="half", server=network.url)
        assert names(raw) == ["digits"]
    assert farstep.import_session(exported, name="half", server=network.url) == "half"


@pytest.mark.promise(
    "An import is whole or not at all; before its last byte nobody can join the session.",
    area="sessions and files",
)
def test_an_import_is_not_there_before_it_is_complete(server: RunningServer, raw: RawClient, exported: Path) -> None:
    """While the tensors are on their way nobody can join what would be an empty session; whoever takes the name then
    keeps it, and the import is refused."""
    whole = exported.read_bytes()
    headers = {"Content-Type": FILE, "Content-Length": str(len(whole))}
    with half_sent(server.url, "PUT", "/v1/sessions/new/file", headers, [whole[:2_000_000]]) as sock:
        assert names(raw) == ["digits"]
        raw.begun("new")
        sock.sendall(whole[2_000_000:])
        assert read_answer(sock).code == "session_exists"
    assert raw.request("GET", "/v1/sessions/new").document["parameters"] == 4


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 500, -1])
def test_a_truncated_file_is_refused_before_it_is_sent(server: RunningServer, exported: Path, cut: int) -> None:
    """Half a file is told from a whole one without a server."""
    exported.write_bytes(exported.read_bytes()[:cut])
    with pytest.raises(InvalidFile) as refused:
        farstep.import_session(exported, name="half", server=server.url)
    assert refused.value.side == "client"


def test_what_is_no_file_is_refused(server: RunningServer, tmp_path: Path) -> None:
    """A name without a file, a directory, and a text are refused by name."""
    text = tmp_path / "text"
    text.write_text("These are not the tensors you are looking for.")
    for path, kind in ((tmp_path / "none", InvalidOption), (tmp_path, InvalidOption), (text, InvalidFile)):
        with pytest.raises(kind):
            farstep.import_session(path, server=server.url)


@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (b"", {}, "invalid_file"),
        (b"\xff" * 8, {}, "invalid_file"),
        ((2**40).to_bytes(8, "little") + b"{}", {}, "invalid_file"),
        ((2).to_bytes(8, "little") + b"{}", {}, "invalid_file"),
        ((2).to_bytes(8, "little") + b"[]", {}, "invalid_file"),
        (b"{}", {"content-type": "application/json"}, "unsupported_media"),
        (b"{}", {"content-encoding": "gzip"}, "unsupported_media"),
    ],
)
def test_a_body_that_is_no_file_is_refused(raw: RawClient, body: bytes, headers: dict[str, str], code: str) -> None:
    """The server checks what anybody may send it, and is as it was."""
    before = names(raw)
    assert raw.request("PUT", "/v1/sessions/x/file", body, {"content-type": FILE, **headers}).code == code
    assert names(raw) == before


def test_a_name_that_cannot_be(raw: RawClient, exported: Path) -> None:
    """A session that could not be joined is not created."""
    answer = raw.request("PUT", "/v1/sessions/-x/file", exported.read_bytes(), {"content-type": FILE})
    assert answer.code == "invalid_request"


def test_a_session_that_is_too_large_is_refused_by_its_head(exported: Path) -> None:
    """The limits of a server hold for what is imported, and count before its tensors are received."""
    with running_server("--max-session-gib", str(2**-20), loaded=True) as small:
        with pytest.raises(LimitExceeded):
            farstep.import_session(exported, server=small.url)
        with running_server("--max-sessions", "1", loaded=True) as full:
            farstep.import_session(exported, server=full.url)
            with pytest.raises(SessionExists):
                farstep.import_session(exported, server=full.url)
            done = command("sessions", "import", str(exported), "--name", "b", "--server", full.url)
            assert (done.returncode, done.stderr.split(":")[0]) == (1, "error busy")


# -- while a worker pushes


@pytest.mark.promise("Parameters that are read are all of one version, the one that the answer names.", area="reads")
def test_one_version_while_a_worker_pushes(server: RunningServer, tmp_path: Path) -> None:
    """Every file that is exported while a worker trains holds one version: parameters, state, numbers and options
    agree; and the worker is not stopped."""
    place: dict[str, Any] = {"server": server.url, "session": "busy", "kernel": "reference"}
    parameters = [torch.zeros(200_000, requires_grad=True), torch.zeros(3, requires_grad=True)]
    optimizer = farstep.optim.SGD(parameters, lr=1.0, momentum=0.5, dampening=0.5, **place)
    talk, stop, steps = Conversation(server.url, None), threading.Event(), threading.Semaphore(0)

    def train() -> None:
        while not stop.is_set():
            following = optimizer.version + 1
            optimizer.param_groups[0]["lr"] = float(following)
            for p in parameters:
                p.grad = torch.full_like(p, float(following))
            optimizer.step()
            steps.release()

    thread = threading.Thread(target=train)
    thread.start()
    versions = []
    try:
        for number in range(8):
            for _ in range(2):
                assert steps.acquire(timeout=60)
            found = farstep.export_session("busy", tmp_path / str(number), server=server.url)
            versions.append(found.version)
    finally:
        stop.set()
        thread.join()
        talk.close()
    assert versions == sorted(set(versions))
    for number, version in enumerate(versions):
        assert look_at(tmp_path / str(number)).version == version
        value, buffer = 0.0, 0.0
        for step in range(1, version + 1):
            buffer = float(step) if step == 1 else 0.5 * buffer + 0.5 * step
            value = float(torch.tensor(value) - step * torch.tensor(buffer))
        with safe_open(tmp_path / str(number), "pt") as opened:
            assert json.loads(opened.metadata()["farstep_session"])["options"][0]["lr"] == version
            for name, expected in (("param", value), ("momentum_buffer", buffer)):
                for index in (0, 1):
                    tensor = opened.get_tensor(f"{name}/0.{index}")
                    assert tensor.eq(tensor[0]).all()
                    assert tensor[0].item() == pytest.approx(expected, rel=1e-5)
    optimizer.close()
