"""Memory of incoming bodies, and views of a session's contents for answers.

    PushIntake, ContentsIntake    memory for an incoming payload
    HeldView                      parameters in the memory of a held version
    EncodedView                   parameters encoded by a codec, or copied from a device: one copy for all readers of a
                                  version, which is released at once, so that the next step may write over it
    CopiedView                    a copy of some fields

A step whose gradients came in the same 16 bits has mostly encoded its parameters already, over those gradients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import final
from weakref import WeakValueDictionary

import torch

from farstep.errors import TensorMismatch
from farstep.protocol import to_ranges
from farstep.protocol.codecs import Codec
from farstep_service.layout import Layout
from farstep_service.sessions.answers import OVERHEAD_BYTES, AtMost, Intake, View
from farstep_service.sessions.shared_memory import MappedMemory
from farstep_service.store import Buffers, FlatBuffers, Held, encode_
from farstep_service.tensors.contents import Contents
from farstep_service.tensors.contribution import Contribution, memory_of, on_device

CPU = torch.device("cpu")


def check_fit(payload_bytes: int, body_bytes: int) -> None:
    """Refuse a body that cannot carry what its header announces, before memory is allocated.

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
    """Memory for the gradients of a push; for gradients in shared memory no payload follows."""

    def __init__(
        self, contribution: Contribution, body_bytes: int, shared: MappedMemory | None = None, *, watch: bool = False
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

    def complete(self, digest: bytes) -> None:
        payload = self.contribution.payload
        if payload is not None:
            payload.digest = digest

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
    """Return the segments that have not been written yet."""
    return [index for index in indices if index not in there] if there else indices


@final
class HeldView(View):
    """All parameters of a held version, or some of them."""

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
class BytesView(View):
    """A copy of the parameters of one version that a worker knows, as bytes."""

    def __init__(self, version: int, count: int, layout: Layout, buffers: Buffers) -> None:
        known = len(layout.segments)
        super().__init__(
            version=version,
            count=count,
            segments=None if known == count else to_ranges(range(known)),
            views=[memoryview(b"".join(memory_of(buffers, buffers.layout, range(known))))],
        )

    def release(self) -> None:
        """Nothing is held: the copy goes with this object."""


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


@final
class EncodedVersion:
    """A copy of one version in CPU memory, encoded by a codec."""

    def __init__(self, held: Held, codec: Codec, indices: Sequence[int], spent: Contribution | None) -> None:
        layout = held.buffers.layout.on_wire(codec)
        self.version = held.version
        self.count = len(layout.segments)
        memory = None if spent is None else spent.spent()
        there: frozenset[int] = frozenset()
        if spent is not None and memory is not None and memory.layout is layout:
            there = spent.copied_since(held.version)
        else:
            memory = FlatBuffers(layout, zero=False)
        self.buffers = memory
        encode_(memory, held.buffers, codec, missing(indices, there))


@final
class EncodedVersions:
    """The encoded versions that are being read.

    Args:
        executor: runs large ones.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._turn = asyncio.Lock()
        self._made: WeakValueDictionary[tuple[int, int, Codec], EncodedVersion] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """Return the memory of shared copies."""
        return sum(each.buffers.nbytes for each in self._made.values()) if self._made else 0

    async def of(
        self, held: Held, codec: Codec, indices: Sequence[int], spent: Contribution | None, *, inline: bool
    ) -> EncodedVersion:
        """Encode some segments of a held version, and release it.

        Only copies of all segments are shared: others are of one worker.

        Args:
            spent: gradients whose memory may be overwritten, or was by the step that is answered.
        """
        count = len(held.buffers.layout.segments)
        if len(indices) < count:
            return await self._make(held, codec, indices, spent, inline=inline)
        key = (held.version, count, codec)
        async with self._turn:
            found = self._made.get(key)
            if found is None:
                found = self._made[key] = await self._make(held, codec, indices, spent, inline=inline)
            else:
                held.release()
            return found

    async def _make(
        self, held: Held, codec: Codec, indices: Sequence[int], spent: Contribution | None, *, inline: bool
    ) -> EncodedVersion:
        def make() -> EncodedVersion:
            with held:
                return EncodedVersion(held, codec, indices, spent)

        if inline:
            return make()
        return await asyncio.get_running_loop().run_in_executor(self._executor, make)


@final
class EncodedView(View):
    """All parameters of an encoded version, or some of them."""

    def __init__(
        self, encoded: EncodedVersion, indices: Sequence[int], ranges: list[int] | None, released: Callable[[], None]
    ) -> None:
        super().__init__(
            version=encoded.version,
            count=encoded.count,
            segments=ranges,
            views=memory_of(encoded.buffers, encoded.buffers.layout, indices),
        )
        self._encoded: EncodedVersion | None = encoded
        self._chosen = indices
        self._released = released

    def copy_to_(self, buffers: FlatBuffers, there: frozenset[int] = frozenset()) -> None:
        """Copy the parameters into other memory of the same layout, but for those that are there."""
        assert self._encoded is not None
        buffers.copy_(self._encoded.buffers, missing(self._chosen, there))

    def release(self) -> None:
        self._encoded = None
        self.views = ()
        self._released()
