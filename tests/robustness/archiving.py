"""A training whose every version is known, and what a server and its archive have of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

import farstep
from farstep.conversation import Conversation
from farstep.errors import Recovering, UnknownSession
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from farstep_service.durability.objects import Objects
from tests.support.service.servers import RunningServer

ELEMENTS: Final = 2000
STEPS: Final = 400
OFTEN: Final = ("--max-journal-gib", "0.004")
"""With this a snapshot takes the place of the journal about every 170 steps, and a segment is closed every 30."""
WITHIN_S: Final = 60.0

T = TypeVar("T")


class Training:
    """One worker with momentum, whose gradients are those of its step's number.

    Args:
        url: the server.
        session: the session's name.
        durability: its level; None for the server's.

    Attributes:
        versions: the parameters of each version, from the first.
    """

    def __init__(self, url: str, session: str = "s", durability: Any = None) -> None:
        self._parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, ELEMENTS))
        remote: RemoteOptions = {"server": url, "session": session, "durability": durability, "timeout_s": WITHIN_S}
        self.optimizer: RemoteOptimizer = farstep.optim.SGD([self._parameter], lr=0.01, momentum=0.9, **remote)
        self.versions = [self.parameters]

    @property
    def parameters(self) -> Tensor:
        """Return a copy of the parameters as the worker has them."""
        return self._parameter.detach().clone()

    def step(self, number: int) -> None:
        """Take a step."""
        self._parameter.grad = torch.sin(torch.arange(ELEMENTS) * float(number))
        self.optimizer.step()

    def run(self, steps: int = STEPS) -> Training:
        """Take steps up to a number, and keep each version."""
        while len(self.versions) <= steps:
            self.step(len(self.versions))
            self.versions.append(self.parameters)
        return self

    def close(self) -> None:
        """Leave the session to others."""
        self.optimizer.close()


def until(found: Callable[[], T | None]) -> T:
    """Ask again and again, and return the first answer that is not None; each question takes a process's time."""
    ended = time.monotonic() + WITHIN_S
    while time.monotonic() < ended:
        if (answer := found()) is not None:
            return answer
    raise AssertionError(f"not so within {WITHIN_S:g} s")


def view(server: RunningServer, session: str = "s") -> dict[str, Any]:
    """Return what a server shows of a session, once it is back."""
    conversation = Conversation(server.url, None)

    def shown() -> dict[str, Any] | None:
        try:
            return conversation.control("GET", f"/v1/sessions/{session}")
        except (Recovering, UnknownSession):
            return None

    try:
        return until(shown)
    finally:
        conversation.close()


def archived(server: RunningServer, version: int, session: str = "s") -> None:
    """Return when the newest snapshot in the archive is of such a version, or a later one."""

    def there() -> bool | None:
        found = view(server, session)["archived_version"]
        return True if found is not None and found >= version else None

    until(there)


class Faulty(Objects):
    """A store that fails at one call, or at all from that one on.

    Args:
        objects: the store.
        fails_at: the call, from 1; 0 for none.
        gone: it fails from then on.
        half: a `put` that fails leaves half of its object, as a store does that cannot replace one at once.
    """

    def __init__(self, objects: Objects, fails_at: int, *, gone: bool = False, half: bool = False) -> None:
        self.calls = 0
        self._objects, self._fails_at, self._gone, self._half = objects, fails_at, gone, half

    def _fails(self) -> bool:
        self.calls += 1
        return self.calls == self._fails_at or (self._gone and 0 < self._fails_at < self.calls)

    def _check(self) -> None:
        if self._fails():
            raise OSError(None, "the connection was refused")

    def put(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        if not self._fails():
            self._objects.put(name, pieces)
            return
        if self._half:
            whole = b"".join(bytes(each) for each in pieces)
            self._objects.put(name, [whole[: len(whole) // 2]])
        raise OSError(None, "the connection was reset")

    def get(self, name: str) -> Iterator[bytes]:
        self._check()
        return self._objects.get(name)

    def names(self, folder: str) -> list[str]:
        self._check()
        return self._objects.names(folder)

    def folders(self) -> list[str]:
        self._check()
        return self._objects.folders()

    def remove(self, name: str) -> None:
        self._check()
        self._objects.remove(name)


def files_below(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}
