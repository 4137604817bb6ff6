"""Parameters on their way out in a codec, or from a device: one conversion for all who ask for a version while one
still reads it.

A step whose gradients came in the same 16 bits has mostly written them already, over those gradients, in its own pass.

A conversion is a copy, so the version it was made of is given back at once, and the next step may write over it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import final
from weakref import WeakValueDictionary

from farstep.codecs import Codec
from farstep_service.gradients import Contribution, memory_of
from farstep_service.sessions.answers import View
from farstep_service.sessions.views import missing
from farstep_service.store import FlatBuffers, Held, encode_


@final
class Narrowed:
    """A copy of one version in memory of the CPU, as it travels in a codec."""

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
class Narrowings:
    """The conversions that are being read.

    Args:
        executor: runs large ones.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._turn = asyncio.Lock()
        self._made: WeakValueDictionary[tuple[int, int, Codec], Narrowed] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """Return the memory of conversions that others may share."""
        return sum(each.buffers.nbytes for each in self._made.values())

    async def of(
        self, held: Held, codec: Codec, indices: Sequence[int], spent: Contribution | None, *, inline: bool
    ) -> Narrowed:
        """Return some segments of a held version, which is given back, as they travel in a codec.

        Only a conversion of all segments is shared: others are of one worker's own.

        Args:
            spent: gradients whose memory may be written over, or was by the step that this answers.
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
    ) -> Narrowed:
        def make() -> Narrowed:
            with held:
                return Narrowed(held, codec, indices, spent)

        if inline:
            return make()
        return await asyncio.get_running_loop().run_in_executor(self._executor, make)


@final
class NarrowedView(View):
    """Parameters of a version in a copy, or some of them."""

    def __init__(
        self, narrowed: Narrowed, indices: Sequence[int], ranges: list[int] | None, released: Callable[[], None]
    ) -> None:
        super().__init__(
            version=narrowed.version,
            count=narrowed.count,
            segments=ranges,
            views=memory_of(narrowed.buffers, narrowed.buffers.layout, indices),
        )
        self._narrowed: Narrowed | None = narrowed
        self._chosen = indices
        self._released = released

    def copy_to_(self, buffers: FlatBuffers, there: frozenset[int] = frozenset()) -> None:
        """Copy the parameters into other memory of the same layout, but for those that are there."""
        assert self._narrowed is not None
        buffers.copy_(self._narrowed.buffers, missing(self._chosen, there))

    def release(self) -> None:
        self._narrowed = None
        self.views = ()
        self._released()
