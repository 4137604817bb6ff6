"""What a server refuses to map, so that no worker can end it, and what it refuses of a push that names memory."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farstep.conversation import Conversation
from farstep.errors import Fenced, InvalidOption, InvalidRequest
from farstep.protocol.shared_memory import nbytes_of
from tests.support.service.servers import RunningServer, running_server

ELEMENTS = 100_000
NBYTES = nbytes_of({"float32": ELEMENTS})
HUGE_BYTES = 2**21
MFD_NOEXEC_SEAL = 0x8
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server that listens at a path, and on a port."""
    with running_server("--unix", str(tmp_path_factory.mktemp("m") / "s"), loaded=True) as running:
        yield running


@pytest.fixture
def talk(local: RunningServer) -> Iterator[Conversation]:
    """Speak with it over its socket."""
    conversation = Conversation(local.unix, None)
    yield conversation
    conversation.close()


@pytest.fixture
def joined(talk: Conversation) -> Iterator[dict[str, Any]]:
    """Join a session of one parameter, and remove it."""
    document = {
        "name": "s",
        "worker": "w",
        "optimizer": "SGD",
        "groups": [{"lr": 0.5}],
        "segments": [{"name": "p", "shape": [ELEMENTS], "dtype": "float32"}],
    }
    yield talk.control("POST", "/v1/sessions", document)
    talk.control("DELETE", "/v1/sessions/s")


class Memory:
    """A memfd as a worker would make it, but for what is asked to be wrong."""

    def __init__(self, *, nbytes: int = NBYTES, allocate: bool = True, seals: int = SEALS, flags: int = 0) -> None:
        self.key = secrets.token_hex(16)
        self.fd = os.memfd_create(f"farstep-{self.key}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        if allocate:
            os.posix_fallocate(self.fd, 0, nbytes)
        else:
            os.ftruncate(self.fd, nbytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def offer(self, talk: Conversation, **changes: Any) -> None:
        """Offer it to the session."""
        told = {"epoch": 1, "key": self.key, "pid": os.getpid(), "fd": self.fd, **changes}
        talk.control("PUT", "/v1/sessions/s/workers/w/memory", told)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def mapped(local: RunningServer) -> int:
    return Path(f"/proc/{local.pid}/maps").read_text().count("memfd:farstep-")


def refusal(talk: Conversation, memory: Memory, **changes: Any) -> str:
    with pytest.raises(InvalidOption) as refused:
        memory.offer(talk, **changes)
    return refused.value.detail


def test_memory_as_it_has_to_be_is_mapped(local: RunningServer, talk: Conversation, joined: dict[str, Any]) -> None:
    """It is mapped once, a second offer takes the first one's place, and it goes with the session."""
    assert joined["epoch"] == 1
    for _ in range(2):
        with Memory() as memory:
            memory.offer(talk)
        assert mapped(local) == 1
    talk.control("DELETE", "/v1/sessions/s/workers/w?epoch=1")
    assert mapped(local) == 0


@pytest.mark.usefixtures("joined")
def test_memory_that_the_kernel_sealed_against_execution_is_mapped(local: RunningServer, talk: Conversation) -> None:
    """A kernel with `vm.memfd_noexec` puts a seal of its own on every memfd, which says nothing about its size."""
    try:
        memory = Memory(flags=MFD_NOEXEC_SEAL)
    except OSError:
        pytest.skip("this kernel does not know that seal")
    with memory:
        memory.offer(talk)
    assert mapped(local) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"nbytes": NBYTES - 64}, "bytes"),
        ({"nbytes": NBYTES + 64}, "bytes"),
        ({"seals": 0}, "sealed"),
        ({"seals": fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL}, "sealed"),
        ({"seals": fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW}, "sealed"),
        ({"seals": SEALS | fcntl.F_SEAL_WRITE}, "sealed"),
        ({"allocate": False}, "allocated"),
        ({"allocate": False, "nbytes": HUGE_BYTES, "flags": os.MFD_HUGETLB}, "huge pages"),
    ],
)
@pytest.mark.usefixtures("joined")
def test_other_memory_is_refused(local: RunningServer, talk: Conversation, wrong: dict[str, Any], why: str) -> None:
    """Another size, a size that could change, and memory that is not there yet could end the server with SIGBUS."""
    with Memory(**wrong) as memory:
        said = refusal(talk, memory)
    assert why in said
    assert said.count("cannot be") == 1, "a refusal inside a refusal"
    assert mapped(local) == 0


@pytest.mark.parametrize(
    "changes",
    [{"fd": 999_999}, {"pid": 2**31 - 1}, {"pid": 1}, {"pid": os.getppid()}, {"key": "0" * 32}],
    ids=["no such file", "no such process", "the first process", "another process", "another key"],
)
@pytest.mark.usefixtures("joined")
def test_memory_that_is_not_where_it_is_said_to_be_is_refused(
    local: RunningServer, talk: Conversation, changes: dict[str, Any]
) -> None:
    """A closed descriptor, another process and another key do not lead to the memory that was offered."""
    with Memory() as memory:
        assert "cannot be shared" in refusal(talk, memory, **changes)
    assert mapped(local) == 0


@pytest.mark.usefixtures("joined")
def test_what_is_no_memfd_is_never_opened(local: RunningServer, talk: Conversation, tmp_path: Path) -> None:
    """A file of the right size, a link to one, a pipe and a socket are refused by their names alone."""
    file = tmp_path / "file"
    file.write_bytes(bytes(NBYTES))
    (tmp_path / "link").symlink_to(file)
    reading, writing = os.pipe()
    with (
        Memory() as memory,
        file.open("r+b") as opened,
        (tmp_path / "link").open("r+b") as linked,
        socket.socket() as sock,
    ):
        for fd in (opened.fileno(), linked.fileno(), reading, writing, sock.fileno()):
            assert "not there" in refusal(talk, memory, fd=fd)
    os.close(reading)
    os.close(writing)
    assert mapped(local) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give memory away")
@pytest.mark.usefixtures("joined")
def test_memory_of_another_user_is_refused(talk: Conversation) -> None:
    """Only what the server's own user owns is mapped."""
    with Memory() as memory:
        os.fchown(memory.fd, 65534, 65534)
        assert "not memory of this user" in refusal(talk, memory)


@pytest.mark.usefixtures("joined")
def test_memory_is_not_offered_over_tcp(local: RunningServer) -> None:
    """A client on a TCP port may be on another machine, where the same numbers mean something else."""
    talk = Conversation(local.url, None)
    with Memory() as memory:
        assert "unix socket only" in refusal(talk, memory)
    talk.close()


@pytest.mark.usefixtures("joined")
def test_memory_of_another_epoch_is_refused(talk: Conversation) -> None:
    """A worker that was fenced shares nothing any more."""
    with Memory() as memory, pytest.raises(Fenced):
        memory.offer(talk, epoch=2)


@pytest.mark.parametrize(
    "keys",
    [
        {"area": "0" * 32, "fill": 1},
        {"area": "0" * 32},
        {"fill": 1},
        {"deliver": True},
        {"area": "0" * 32, "fill": 1, "skip": True, "segments": []},
        {"area": "0" * 32, "fill": 1, "loss": 1.0},
    ],
    ids=str,
)
def test_a_push_that_names_no_memory_of_its_worker_is_refused(
    talk: Conversation, joined: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Unknown memory, half of the keys, and keys that contradict each other change nothing."""
    head = {"v": 1, "incarnation": joined["incarnation"], "worker": "w", "epoch": 1, "seq": 1, "base": 0, **keys}
    with pytest.raises(InvalidRequest):
        talk.data("POST", "/v1/sessions/s/push", head, (), lambda header: [])
    assert talk.control("GET", "/v1/sessions/s/workers/w")["sequence"] == 0
