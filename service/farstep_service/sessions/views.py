"""Memory on its way in and out of a session in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch

from farstep.errors import TensorMismatch
from farstep.wire import MAX_HEADER_BYTES, Limits
from farstep_service.contents import Contents
from farstep_service.gradients import Contribution, memory_of, on_device
from farstep_service.sessions.answers import AtMost, Intake, View
from farstep_service.sessions.shared import Shared
from farstep_service.store import FlatBuffers, Held

CPU = torch.device("cpu")
OVERHEAD_BYTES = MAX_HEADER_BYTES + 5 * Limits().frames
"""Bytes of a message that are not payload, at most."""


def check_fit(payload_bytes: int, body_bytes: int) -> None:
    """Refuse a body that cannot carry what its header announces, before memory is taken for it.

    Raises:
        TensorMismatch: it is shorter than the payload, or longer than payload, frames and header can be.
    """
    longest = 0 if isinstance(body_bytes, AtMost) else body_bytes
    if not payload_bytes <= body_bytes or longest > payload_bytes + OVERHEAD_BYTES:
        raise TensorMismatch(
            f"The body has {body_bytes} bytes, but the announced tensors take {payload_bytes}.",
            remedy="Compare the parameters' count, shapes and dtypes with the session's.",
            limit=payload_bytes,
        )


@final
class PushIntake(Intake):
    """Memory for the gradients of a push; where they are in shared memory already, nothing is to come."""

    def __init__(
        self, contribution: Contribution, body_bytes: int, shared: Shared | None = None, *, watch: bool = False
    ) -> None:
        check_fit(0 if shared else contribution.nbytes, body_bytes)
        self.contribution = contribution
        if shared is not None:
            contribution.borrow(shared.gradients, shared.secured)
        self._views = [] if shared is not None else contribution.allocate()
        if shared is None and watch:
            contribution.look_while_arriving()

    @property
    def views(self) -> Sequence[memoryview]:
        return self._views

    def arrived(self, received: int) -> None:
        if self.contribution.watch is not None:
            self.contribution.watch.arrived(received)


@final
class ContentsIntake(Intake):
    """Memory for new contents."""

    def __init__(self, contents: Contents, body_bytes: int) -> None:
        check_fit(contents.nbytes, body_bytes)
        self.contents = contents
        self._views = contents.allocate()

    @property
    def views(self) -> Sequence[memoryview]:
        return self._views


def missing(indices: Sequence[int], there: frozenset[int]) -> Sequence[int]:
    """Return those of some segments that are not there."""
    return [index for index in indices if index not in there] if there else indices


@final
class HeldView(View):
    """The parameters of a held version, or some of them."""

    def __init__(
        self,
        held: Held,
        indices: Sequence[int] | None,
        ranges: list[int] | None,
        released: Callable[[], None],
    ) -> None:
        layout = held.buffers.layout
        chosen = range(len(layout.segments)) if indices is None else indices
        super().__init__(
            version=held.version,
            count=len(layout.segments),
            segments=ranges,
            views=memory_of(on_device(held.buffers, CPU), layout, chosen),
        )
        self._held = held
        self._chosen = chosen
        self._released = released

    def copy_to_(self, buffers: FlatBuffers, there: frozenset[int] = frozenset()) -> None:
        """Copy the parameters into other memory of the same layout, but for those that are there."""
        buffers.copy_(self._held.buffers, missing(self._chosen, there))

    def release(self) -> None:
        self._held.release()
        self._released()


@final
class CopiedView(View):
    """A copy of some fields of one version."""

    def __init__(self, contents: Contents, version: int, count: int, ranges: list[int] | None = None) -> None:
        super().__init__(
            version=version,
            count=count,
            segments=ranges,
            views=contents.memory(),
            fields=contents.fields,
            shapes=contents.shapes,
        )

    def release(self) -> None:
        """Nothing is held: the copy goes with this object."""
