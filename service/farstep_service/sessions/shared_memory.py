"""The memory that workers share with one session: each worker's latest, for as long as its epoch lasts.

The server's side of shared memory (`farstep.protocol.shared_memory`): what it maps, and what it refuses to.

A mapping must not be able to end this process. So the memory has to be a memfd of this user's, sealed against changes
of its size, exactly as large as the session's layout says, all of it allocated, and the very one that the handle names
by its random key: a number of a process in another container names something else here.

Whatever else a worker writes into it, at whatever time, are numbers: its own gradients, or the parameters that only it
reads there. So that what has been looked for in its gradients is true of those that a step takes, a session that looks
at gradients copies them first, into memory that is kept for the worker's next push: 100 MB of fresh memory took five
times as long as the copy itself.
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
    """Keep what workers share, by worker."""

    def __init__(self) -> None:
        self._shared: dict[str, MappedMemory] = {}

    @property
    def nbytes(self) -> int:
        """Return the size of all of it."""
        return sum(each.nbytes for each in self._shared.values()) if self._shared else 0

    def share(self, worker: str, handle: SharedMemoryHandle, plan: Plan) -> None:
        """Map memory of a worker, in the place of what it shared before.

        Raises:
            InvalidOption: it is not memory that can be shared. What it shared before is let go of even so.
        """
        self._shared.pop(worker, None)
        self._shared[worker] = MappedMemory(handle, plan)

    def keep_only(self, epoch: Callable[[str], int]) -> None:
        """Let go of the memory of epochs that are over.

        Args:
            epoch: returns the current one of a worker.
        """
        self._shared = {worker: each for worker, each in self._shared.items() if epoch(worker) == each.epoch}

    def clear(self) -> None:
        """Let go of all of it."""
        self._shared.clear()

    def delivering(self, head: PushHead) -> MappedMemory | None:
        """Return the memory in which a push wants its answer, None if it wants it in a body."""
        push, memory = head.shared, self._shared.get(head.name.worker)
        wanted = push is not None and push.deliver and memory is not None and memory.key == push.key
        return memory if wanted else None

    def copy_of(self, head: PushHead, contribution: Contribution) -> Buffers | None:
        """Return where the step of a push may write its answer: over its gradients, or into shared memory."""
        if head.wanted == "none":
            return None
        if head.wire_parameters is not None:
            return contribution.half_precision() if head.wire_parameters == head.wire_gradients else None
        shared = self.delivering(head)
        return shared.parameters if shared is not None and shared.layout is contribution.layout else None

    def gradients_in(self, head: PushHead, contribution: Contribution) -> MappedMemory | None:
        """Return the shared memory that a push's gradients are in, None if they come in its body.

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
    """Name memory of a worker: its key, and where its process has it open."""

    epoch: int
    key: str
    pid: int
    fd: int


@final
class MappedMemory:
    """Memory that a worker shares with its session.

    Attributes:
        key: its name in pushes.
        epoch: the life of the worker that it belongs to.
        layout: what it has room for.
        nbytes: what it takes, with the copy of the gradients.
        gradients, parameters: its halves.
        secured: where gradients are copied to before they are looked at; None in a session that does not.
    """

    def __init__(self, handle: SharedMemoryHandle, plan: Plan) -> None:
        """Map what is offered.

        Raises:
            InvalidOption: it is not what it has to be.
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
    """Return the bytes that a session takes for each worker's shared memory beside that memory itself."""
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
        # Looked at first: merely to open something else, such as a device, could have effects.
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
        except (OSError, ValueError) as exc:  # not around the check, whose refusals are a ValueError too
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
