"""The server's side of shared memory (`farstep.area`): what it maps, and what it refuses to.

A mapping must not be able to end this process. So the memory has to be a memfd of this user's, sealed against changes
of its size, exactly as large as the session's layout says, all of it allocated, and the very one that the offer names
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
from dataclasses import dataclass
from typing import Final, final

from farstep.area import NAME_PREFIX, Area, nbytes_of
from farstep.errors import InvalidOption
from farstep_service.plan import Plan
from farstep_service.store import FlatBuffers

_BLOCK_BYTES: Final = 512  # the unit of st_blocks
_F_SEAL_EXEC: Final = 0x20  # a kernel may put it on every memfd (vm.memfd_noexec)


@dataclass(frozen=True, slots=True)
class Offer:
    """Name memory of a worker: its key, and where its process has it open."""

    epoch: int
    key: str
    pid: int
    fd: int


@final
class Shared:
    """Memory that a worker shares with its session.

    Attributes:
        key: its name in pushes.
        epoch: the life of the worker that it belongs to.
        layout: what it has room for.
        nbytes: what it takes, with the copy of the gradients.
        gradients, parameters: its halves.
        secured: where gradients are copied to before they are looked at; None in a session that does not.
    """

    def __init__(self, offer: Offer, plan: Plan) -> None:
        """Map what is offered.

        Raises:
            InvalidOption: it is not what it has to be.
        """
        layout = plan.layout
        if any(segment.is_complex for segment in layout.segments):
            raise refused("complex parameters are not shared")
        self.key, self.epoch, self.layout = offer.key, offer.epoch, layout
        size = nbytes_of(layout.sizes)
        area = Area.over(_mapped(offer, size), layout.sizes)
        self.nbytes = size + nbytes_beside(plan)
        self.gradients = FlatBuffers(layout, flat=area.gradients)
        self.parameters = FlatBuffers(layout, flat=area.parameters)
        self.secured = FlatBuffers(layout, zero=False) if plan.looks_at_gradients else None


def nbytes_beside(plan: Plan) -> int:
    """Return the bytes that a session takes for each worker's shared memory beside that memory itself."""
    return plan.layout.nbytes if plan.looks_at_gradients else 0


def refused(why: str) -> InvalidOption:
    """Return the error for memory that is not shared."""
    return InvalidOption(
        f"The memory cannot be shared: {why}.", remedy="Send tensors in bodies, as over TCP.", field="memory"
    )


def _mapped(offer: Offer, nbytes: int) -> mmap.mmap:
    if sys.platform != "linux":
        raise refused("this system has no sealed memory")
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    try:
        # Looked at first: merely to open something else, such as a device, could have effects.
        found = os.readlink(path)
    except OSError as exc:
        raise refused(f"it cannot be opened ({exc.strerror})") from exc
    if found != f"/memfd:{NAME_PREFIX}{offer.key} (deleted)":
        raise refused("it is not there; the worker may be in another container")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as exc:
        raise refused(f"it cannot be opened ({exc.strerror})") from exc
    try:
        _check(fd, nbytes)
        try:
            return mmap.mmap(fd, nbytes)
        except (OSError, ValueError) as exc:  # not around the check, whose refusals are a ValueError too
            raise refused(f"it cannot be mapped ({exc})") from exc
    finally:
        os.close(fd)


def _check(fd: int, nbytes: int) -> None:
    import fcntl

    found = os.fstat(fd)
    if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise refused("it is in huge pages, of which there may be none left when it is read")
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise refused("it is not memory of this user")
    if found.st_size != nbytes:
        raise refused(f"it has {found.st_size} bytes, and the session takes {nbytes}")
    if found.st_blocks * _BLOCK_BYTES < nbytes:
        raise refused("not all of it is allocated")
    sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ~_F_SEAL_EXEC != sealed:
        raise refused("its size is not sealed, or its contents are")
