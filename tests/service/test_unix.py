"""A server at a path: who may use its socket, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from farstep.conversation import Conversation
from farstep.errors import InvalidOption, Unauthorized
from farstep.protocol.unix import MAX_PATH_BYTES
from farstep_service.cli.serve import banner
from farstep_service.server import Listening
from farstep_service.server.socket_file import listening
from farstep_service.settings import Settings
from tests.support.service.servers import TOKEN, farstep, running_server

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Name a socket that is not there yet, in a directory of our own."""
    return str(tmp_path / "s")


@pytest.fixture
def abandoned(path: str) -> str:
    """Leave a socket file behind that nobody listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(path)
    return path


def refusal(path: str) -> InvalidOption:
    with pytest.raises(InvalidOption) as refused, listening(path):
        pass
    return refused.value


# -- a server process


@pytest.mark.promise("Only the server's own user may use its unix socket and its kernels.", area="security")
def test_a_server_listens_at_a_path_beside_its_port(path: str) -> None:
    """The same server answers at both; only its user may use the socket, which is gone when it has left."""
    with running_server("--unix", path) as server:
        assert server.unix == f"unix://{path}"
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        for url in (server.url, server.unix):
            talk = Conversation(url, None)
            assert talk.control("GET", "/v1/info")["authentication"] is False
            talk.close()
        assert server.stop() == 0
        assert server.log == ""
    assert not os.path.exists(path)


def test_a_server_may_listen_at_a_path_alone(path: str) -> None:
    """Without TCP there is no port, and no token is needed whatever --host says."""
    with running_server("--unix", path, "--no-tcp", "--host", "0.0.0.0", port=None) as server:
        assert (server.url, server.said["port"], server.said["address"]) == (f"unix://{path}", 0, "")
        for way in (["--server", server.url], []):
            env = {} if way else {"FARSTEP_SERVER": server.url}
            assert farstep("healthcheck", *way, env=env).returncode == 0
            done = farstep("status", *way, "--json", env=env)
            assert json.loads(done.stdout)["server"]["url"] == server.url
        assert farstep("healthcheck", env={"FARSTEP_SERVE_UNIX": path}).returncode == 0


def test_a_token_is_asked_for_at_a_path_too(path: str) -> None:
    """Where the server has a token, the file's permissions do not replace it."""
    with running_server("--unix", path, token=TOKEN) as server:
        stranger, friend = Conversation(server.unix, None), Conversation(server.unix, TOKEN)
        with pytest.raises(Unauthorized):
            stranger.control("GET", "/v1/info")
        assert friend.control("GET", "/v1/info")["authentication"] is True
        stranger.close()
        friend.close()
        assert farstep("healthcheck", "--server", server.unix).returncode == 0


@pytest.mark.promise(
    "A server that was killed comes back at its port and its socket at once.",
    area="start and shutdown",
)
def test_a_killed_server_comes_back_at_its_path(path: str) -> None:
    """After SIGKILL the file is left behind, nobody answers, and the same command serves there again."""
    with running_server("--unix", path) as server:
        server.kill()
        assert os.path.exists(path)
        done = farstep("healthcheck", "--server", f"unix://{path}")
        assert (done.returncode, "no answer: Connection refused" in done.stderr) == (1, True)
        server.restart()
        assert farstep("healthcheck", "--server", server.unix).returncode == 0


@pytest.mark.promise("A second server does not take the port or the socket of the first.", area="start and shutdown")
def test_a_second_server_does_not_take_the_path_of_the_first(path: str) -> None:
    """The second is refused with a remedy, and the first goes on serving at its path."""
    with running_server("--unix", path) as server:
        done = farstep("serve", "--port", "0", "--unix", path)
        assert done.returncode == 2
        assert "has it" in done.stderr
        assert "--unix" in done.stderr
        assert farstep("healthcheck", "--server", server.unix).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_is_refused_at_once(tmp_path: Path, path: str) -> None:
    """Another user cannot connect, and is told so without being asked to wait."""
    script = """
import os, sys
from farstep.protocol.unix import connected
os.setgid(65534); os.setuid(65534)
try:
    connected(sys.argv[1], 5.0)
except Exception as exc:
    print(type(exc).__name__, exc)
"""
    with listening(path):
        for directory in (tmp_path, *tmp_path.parents):
            if directory.stat().st_uid == os.geteuid() and str(directory).startswith("/tmp/"):
                directory.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Unauthorized")
    assert path in done.stdout


# -- what is refused


def test_a_socket_that_was_left_behind_is_replaced(abandoned: str) -> None:
    """Nobody listens on it, so it is removed."""
    with listening(abandoned), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(abandoned)
    assert not os.path.exists(abandoned)


def test_a_socket_that_somebody_listens_on_is_left_alone(path: str) -> None:
    """It stays as it is, and the refusal says so."""
    with listening(path):
        before = os.lstat(path).st_ino
        assert "has it" in refusal(path).detail
        assert os.lstat(path).st_ino == before


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, path: str, kind: str) -> None:
    """A file, a directory and a symbolic link at the path are refused, and still there."""
    make: dict[str, Callable[[], object]] = {
        "file": lambda: Path(path).write_text("mine"),
        "directory": lambda: Path(path).mkdir(),
        "link": lambda: Path(path).symlink_to(tmp_path / "elsewhere"),
    }
    make[kind]()
    assert "not a socket" in refusal(path).detail
    assert os.path.lexists(path)


def test_a_directory_that_everybody_writes_to_is_refused(tmp_path: Path, path: str) -> None:
    """In such a directory another user could put a socket of their own in the place of ours."""
    tmp_path.chmod(0o1777)
    assert "every user may write to" in refusal(path).detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path, path: str) -> None:
    """Its owner could replace the socket whatever its mode."""
    os.chown(tmp_path, NOBODY, NOBODY)
    assert "another user" in refusal(path).detail


def test_a_path_without_a_directory_is_refused(path: str) -> None:
    """The error says what the system said."""
    assert "No such file or directory" in refusal(f"{path}/nowhere/s").detail


@pytest.mark.parametrize("path", ["s", "./s", "/run/s/", "/run/\0"])
def test_a_path_that_is_no_sockets_path_is_refused(path: str) -> None:
    """A relative path would name another place in every process."""
    assert refusal(path).field == "unix"


def test_a_path_that_is_too_long_is_refused_with_the_limit(tmp_path: Path) -> None:
    """One byte more than the system has room for is refused before anything is made; the longest one works."""
    room = MAX_PATH_BYTES - len(str(tmp_path)) - 1
    assert refusal(str(tmp_path / ("a" * (room + 1)))).limit == MAX_PATH_BYTES
    with listening(str(tmp_path / ("a" * room))) as sock:
        assert sock.getsockname() == str(tmp_path / ("a" * room))


def test_a_server_that_would_listen_nowhere_is_refused() -> None:
    """--no-tcp without --unix has nothing to listen on."""
    done = farstep("serve", "--no-tcp")
    assert done.returncode == 2
    assert "--unix" in done.stderr


def test_a_socket_of_another_server_is_not_removed_at_exit(path: str) -> None:
    """If the file was replaced meanwhile, what is there now stays."""
    with listening(path):
        os.unlink(path)
        Path(path).write_text("another's")
    assert Path(path).read_text() == "another's"


# -- what is said


def test_the_banner_names_the_socket() -> None:
    """Beside TCP it is named after the URL; alone it is the URL, and the banner says who may speak."""
    unix = "unix:///run/s"
    both = Listening(
        url="http://127.0.0.1:7171",
        address="127.0.0.1",
        port=7171,
        device="cpu",
        steps=2,
        threads=1,
        kernels="fused kernels",
        unix=unix,
    )
    alone = replace(both, url=unix, address="", port=0)
    first = banner(both, Settings())[0]
    said = banner(alone, Settings(tcp=False, unix="/run/s", host="0.0.0.0"))
    assert f"http://127.0.0.1:7171 and {unix}" in first
    assert said[0].endswith(f"serves at {unix}")
    assert "this user only" in "\n".join(said)


def test_httpx_speaks_to_it_as_well(path: str) -> None:
    """Any HTTP client that knows unix sockets reaches the server, and the client takes such a transport."""
    with running_server("--unix", path) as server:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            assert client.get("http://localhost/healthz").json() == {"status": "ok"}
        talk = Conversation(server.unix, None, transport=httpx.HTTPTransport(uds=path))
        assert "optimizers" in talk.control("GET", "/v1/info")
        talk.close()
