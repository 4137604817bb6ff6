"""The memory that workers share with one session: mapped and checked, and kept until a worker's epoch ends.

The server's side of `farstep.protocol.shared_memory`. A mapping must not be able to crash this process. So the memory
has to be a memfd of this user, sealed against changes of its size, exactly as large as the session's layout requires,
fully allocated, and the one whose random key the handle names: a descriptor of a process in another container names
something else here.

A worker may write other numbers into it at any time: its own gradients, or the parameters that only it reads there. A
session that checks gradients therefore copies them first, so that the step uses what was checked. The copy's memory is
kept for the worker's next push: 100 MB of fresh memory took five times as long as the copy itself.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from farstep.errors import InvalidOption, InvalidRequest
from farstep.protocol.messages import PushHead
from farstep.protocol.shared_memory import NAME_PREFIX, SharedMemory, nbytes_of
from farstep_service.plan import Plan
from farstep_service.store import Buffers, FlatBuffers
from farstep_service.tensors.contribution import Contribution


@final
class SharedMemories:
    """The mapped shared memory of workers, by worker."""

    def __init__(self) -> None:
        self._shared: dict[str, MappedMemory] = {}

    @property
    def nbytes(self) -> int:
        """Return its total size."""
        return sum(each.nbytes for each in self._shared.values()) if self._shared else 0

    def share(self, worker: str, handle: SharedMemoryHandle, plan: Plan) -> None:
        """Map memory of a worker, in place of what it shared before.

        Raises:
            InvalidOption: it is not memory that can be shared. The earlier memory is unmapped even so.
        """
        self._shared.pop(worker, None)
        self._shared[worker] = MappedMemory(handle, plan)

    def keep_only(self, epoch: Callable[[str], int]) -> None:
        """Unmap the memory of past epochs.

        Args:
            epoch: returns the current epoch of a worker.
        """
        self._shared = {worker: each for worker, each in self._shared.items() if epoch(worker) == each.epoch}

    def clear(self) -> None:
        """Unmap all of it."""
        self._shared.clear()

    def delivering(self, head: PushHead) -> MappedMemory | None:
        """Return the memory to write a push's answer to, None for an answer in the body."""
        push, memory = head.shared, self._shared.get(head.name.worker)
        wanted = push is not None and push.deliver and memory is not None and memory.key == push.key
        return memory if wanted else None

    def copy_of(self, head: PushHead, contribution: Contribution) -> Buffers | None:
        """Return the memory to which the step of a push may write its answer: its gradients', or shared memory."""
        if head.wanted == "none":
            return None
        if head.wire_parameters is not None:
            overwritten = head.wire_parameters == head.wire_gradients and not contribution.journaled
            return contribution.half_precision() if overwritten else None
        shared = self.delivering(head)
        return shared.parameters if shared is not None and shared.layout is contribution.layout else None

    def gradients_in(self, head: PushHead, contribution: Contribution) -> MappedMemory | None:
        """Return the shared memory of a push's gradients, None if they come in its body.

        Raises:
            InvalidRequest: the worker shares no such memory.
        """
        if head.shared is None:
            return None
        shared = self._shared.get(head.name.worker)
        if shared is None or shared.key != head.shared.key or shared.layout is not contribution.layout:
            raise InvalidRequest(
                f"Worker {head.name.worker!r} shares no such memory.", remedy="Send the gradients.", field="area"
            )
        return shared


_BLOCK_BYTES: Final = 512  # the unit of st_blocks
_F_SEAL_EXEC: Final = 0x20  # a kernel may put it on every memfd (vm.memfd_noexec)


@dataclass(frozen=True, slots=True)
class SharedMemoryHandle:
    """A handle of a worker's memory: its key, and the process and descriptor that have it open."""

    epoch: int
    key: str
    pid: int
    fd: int


@final
class MappedMemory:
    """The mapped memory that a worker shares with its session.

    Attributes:
        key: its name in pushes.
        epoch: the epoch of its worker.
        layout: the layout of either half.
        nbytes: its size, with the copy of the gradients.
        gradients, parameters: its halves.
        secured: memory to copy gradients to before they are checked; None in a session that does not check them.
    """

    def __init__(self, handle: SharedMemoryHandle, plan: Plan) -> None:
        """Map the memory of a handle.

        Raises:
            InvalidOption: it does not meet the requirements.
        """
        layout = plan.layout
        if any(segment.is_complex for segment in layout.segments):
            raise not_shared("complex parameters are not shared")
        self.key, self.epoch, self.layout = handle.key, handle.epoch, layout
        size = nbytes_of(layout.sizes)
        memory = SharedMemory.over(_mapped(handle, size), layout.sizes)
        self.nbytes = size + nbytes_beside(plan)
        self.gradients = FlatBuffers(layout, flat=memory.gradients)
        self.parameters = FlatBuffers(layout, flat=memory.parameters)
        self.secured = FlatBuffers(layout, zero=False) if plan.looks_at_gradients else None


def nbytes_beside(plan: Plan) -> int:
    """Return the additional bytes that a session takes for each worker's shared memory."""
    return plan.layout.nbytes if plan.looks_at_gradients else 0


def not_shared(why: str) -> InvalidOption:
    """Return the error for memory that is not shared."""
    return InvalidOption(
        f"The memory cannot be shared: {why}.", remedy="Send tensors in bodies, as over TCP.", field="memory"
    )


def _mapped(handle: SharedMemoryHandle, nbytes: int) -> mmap.mmap:
    if sys.platform != "linux":
        raise not_shared("this system has no sealed memory")
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    try:
        # Checked first: opening something else, such as a device, could have effects.
        found = os.readlink(path)
    except OSError as exc:
        raise not_shared(f"it cannot be opened ({exc.strerror})") from exc
    if found != f"/memfd:{NAME_PREFIX}{handle.key} (deleted)":
        raise not_shared("it is not there; the worker may be in another container")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as exc:
        raise not_shared(f"it cannot be opened ({exc.strerror})") from exc
    try:
        _check(fd, nbytes)
        try:
            return mmap.mmap(fd, nbytes)
        except (OSError, ValueError) as exc:  # not around the check, whose refusals are also a ValueError
            raise not_shared(f"it cannot be mapped ({exc})") from exc
    finally:
        os.close(fd)


def _check(fd: int, nbytes: int) -> None:
    import fcntl

    found = os.fstat(fd)
    if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise not_shared("it is in huge pages, of which there may be none left when it is read")
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise not_shared("it is not memory of this user")
    if found.st_size != nbytes:
        raise not_shared(f"it has {found.st_size} bytes, and the session takes {nbytes}")
    if found.st_blocks * _BLOCK_BYTES < nbytes:
        raise not_shared("not all of it is allocated")
    sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ~_F_SEAL_EXEC != sealed:
        raise not_shared("its size is not sealed, or its contents are")
