"""Exclusive writing to the memory of parameters: one step at a time, and one process.

A step assumes that the parameters are those of the last answer, sends what differs as the user's edit, and writes the
next answer over them. Of two concurrent steps one would undo the other, and take its answer for an edit.

    threads      a step on parameters that another thread's step is using waits for that to end, and then finds what it
                 has brought; where one of them waits for other workers, that would be for ever, and the step is refused
    processes    parameters in shared memory (`model.share_memory()`) belong to the first process that steps on them
                 through a server, as long as it lives; a step of another process is refused. Reading them is free

A process claims memory by an abstract unix socket named after the memory's device and inode, which Linux gives to one
process and takes back when it ends. Embedded optimizers claim none: they step in that memory itself, as torch does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from farstep.errors import FarstepError
from farstep.transport import this

Memory = tuple[str, int]
"""Shared memory: its device and its inode."""


_turn = threading.Condition(threading.Lock())
_running: list[Writing] = []
_claims: dict[Memory, tuple[socket.socket, int]] = {}


@final
class Writing:
    """Exclude other threads from stepping on some parameters, as a context manager.

    Args:
        addresses: where each parameter's memory begins.
        waits: the step may wait for other workers.
    """

    __slots__ = ("addresses", "thread", "waits")

    def __init__(self, addresses: frozenset[int], *, waits: bool) -> None:
        self.addresses = addresses
        self.waits = waits
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        """Wait for the steps of other threads on the same parameters.

        Raises:
            FarstepError: such a step runs, and one of the two waits for other workers.
        """
        with _turn:
            while _running and (others := [each for each in _running if self._collides(each)]):
                if self.waits or any(each.waits for each in others):
                    raise FarstepError(
                        "Another thread is stepping on the same parameters, in a session whose steps wait for several "
                        "workers: each would undo what the other brings.",
                        remedy="Give each worker a model of its own (copy.deepcopy); the session makes them equal.",
                        side="client",
                    )
                _turn.wait()
            _running.append(self)

    def __exit__(self, *error: object) -> None:
        with _turn:
            _running.remove(self)
            _turn.notify_all()

    def _collides(self, other: Writing) -> bool:
        return other.thread != self.thread and not self.addresses.isdisjoint(other.addresses)


# -- processes --------------------------------------------------------------------------------------------------------


class Claim:
    """Shared memory that this process steps on, until `release`."""

    def __init__(self) -> None:
        self._held: set[Memory] = set()
        self._process = this.process

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Claim the shared memory of some parameters, and give back earlier claims on other memory.

        Raises:
            FarstepError: another process has claimed it.
        """
        shared = [p for p in parameters if p.device.type == "cpu" and p.untyped_storage().is_shared()]
        wanted = _memories(p.data_ptr() for p in shared) if shared else set()
        with _turn:
            if self._process is not this.process:  # the claims are its parent's
                self._held, self._process = set(), this.process
            taken: set[Memory] = set()
            try:
                for memory in wanted - self._held:
                    _claim(memory)
                    taken.add(memory)
            except BaseException:
                _give_back(taken)
                raise
            _give_back(self._held - wanted)
            self._held = wanted

    def release(self) -> None:
        """Give everything back."""
        with _turn:
            if self._process is this.process:
                _give_back(self._held)
            self._held = set()


def _claim(memory: Memory) -> None:
    if memory in _claims:
        held, count = _claims[memory]
        _claims[memory] = held, count + 1
        return
    own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        own.bind(f"\0farstep-writer-{memory[0]}-{memory[1]}")
    except OSError as exc:
        own.close()
        raise FarstepError(
            "The parameters are in shared memory, and another process steps on them through a server: each would undo "
            "what the other brings.",
            remedy="Give each process a model of its own, without share_memory(), and let them share a session: "
            "farstep.Async() is what hogwild does, on the server's parameters.",
            side="client",
        ) from exc
    _claims[memory] = own, 1


def _give_back(memories: Iterable[Memory]) -> None:
    for memory in memories:
        held, count = _claims[memory]
        if count > 1:
            _claims[memory] = held, count - 1
        else:
            del _claims[memory]
            held.close()


def _memories(addresses: Iterable[int]) -> set[Memory]:
    """Return the shared memory that is mapped at some addresses; none if the system does not tell."""
    if sys.platform != "linux":
        return set()
    starts: list[int] = []
    mapped: list[tuple[int, Memory]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, device, inode, *_ = line.split(maxsplit=5)
        if mode[3] == "s":
            first, last = (int(each, 16) for each in span.split("-"))
            starts.append(first)
            mapped.append((last, (device, int(inode))))
    found = set()
    for address in addresses:
        place = bisect_right(starts, address) - 1
        if place >= 0 and address < mapped[place][0]:
            found.add(mapped[place][1])
    return found


def _leave_to_parent() -> None:
    """Close a fork's copies of the sockets, which would keep claims that its parent gives back."""
    global _turn
    _turn = threading.Condition()
    _running.clear()
    for held, _ in _claims.values():
        held.close()
    _claims.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
