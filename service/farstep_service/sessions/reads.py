"""Reads of one session: views of its versions, for which steps never wait (limits: `farstep_service.sessions.readers`).

A view of a version holds it until the view is released. A copy, in a codec or from a device, does not: it releases the
version when it is made, and is shared by all readers of that version.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Final, final

from farstep.protocol import to_ranges
from farstep.protocol.codecs import codec_named
from farstep.protocol.messages import WriteName
from farstep_service.layout import Layout
from farstep_service.session import Session, SessionRecord
from farstep_service.sessions.answers import Intake, Reader, View
from farstep_service.sessions.readers import Outgoing, Readers, ReadersPage, ReadKind, ReadSlot
from farstep_service.sessions.turns import Turns
from farstep_service.sessions.views import BytesView, CopiedView, EncodedVersions, EncodedView, HeldView, PushIntake
from farstep_service.store import Held
from farstep_service.tensors import Snapshot

COPIED_BYTES: Final = 64 * 1024
"""Parameters of so few bytes are copied for an answer: that costs less than to keep their version for it."""
ENCODE_INLINE_BYTES: Final = 4 * 1024 * 1024
"""Parameters of fewer bytes than this are copied on the event loop; it takes a fraction of a millisecond."""


@final
class Views:
    """Make views of versions.

    Args:
        executor: runs large copies.
    """

    def __init__(self, executor: Executor) -> None:
        self._encoded = EncodedVersions(executor)

    @property
    def nbytes(self) -> int:
        """Return the memory of shared copies."""
        return self._encoded.nbytes

    async def of(
        self,
        held: Held,
        codec: str | None,
        chosen: Sequence[int],
        spent: Intake | None,
        released: Callable[[], None],
    ) -> View:
        """Return the view of some segments.

        Args:
            held, codec, chosen: the version, the name of a codec if one is wanted, and the segments.
            spent: see `Actor.parameters`.
            released: called when the view is released.
        """
        layout = held.buffers.layout
        whole = len(chosen) == len(layout.segments)
        ranges = None if whole else to_ranges(chosen)
        if codec is None and held.buffers.device.type == "cpu":
            return HeldView(held, None if whole else chosen, ranges, released)
        gradients = spent.contribution if isinstance(spent, PushIntake) and codec is not None else None
        inline = layout.nbytes <= ENCODE_INLINE_BYTES
        encoded = await self._encoded.of(held, codec_named(codec), chosen, gradients, inline=inline)
        return EncodedView(encoded, chosen, ranges, released)


def cost_of(held: Held, codec: str | None, chosen: Sequence[int], spent: Intake | None) -> tuple[object, int]:
    """Return a key, equal for readers of the same memory, and the bytes of that memory.

    For the arguments see `Views.of`. Gradients that are overwritten are counted with their push.
    """
    layout = held.buffers.layout
    if codec is None:
        return id(held.buffers) if held.buffers.device.type == "cpu" else held.version, layout.nbytes
    if isinstance(spent, PushIntake) and spent.contribution.spent() is not None:
        return object(), 0
    if len(chosen) < len(layout.segments):
        return object(), layout.on_wire(codec_named(codec)).bytes_of(chosen)
    return (held.version, codec), layout.on_wire(codec_named(codec)).nbytes


def chosen_of(held: Held, layout: Layout, since: int | None) -> Sequence[int]:
    """Return the segments of a version that a reader knows, or those of them that changed after version `since`."""
    known = len(layout.segments)
    if since is None:
        return range(known)
    changed = held.changed_since(since)
    if known < len(held.buffers.layout.segments):
        return [index for index in changed if index < known]
    return changed


@final
class Reads:
    """Give readers versions of one session, within a memory budget.

    Args:
        session: the session.
        turns: who may call it.
        executor: converts large versions.
        versions: the number of versions that readers of one kind may hold; see `farstep_service.sessions.readers`.
        kept: returns when the disk has what led to the present version, as far as the session asks for that.
    """

    def __init__(
        self, session: Session, turns: Turns, executor: Executor, versions: int, kept: Callable[[], Awaitable[object]]
    ) -> None:
        self._session = session
        self._turns = turns
        self._kept = kept
        self._views = Views(executor)
        self._versions = versions
        self._readers = Readers(self._read_bytes, self._make_room)

    @property
    def nbytes(self) -> int:
        """Return the memory of versions that were encoded for readers."""
        return self._views.nbytes

    @property
    def page(self) -> ReadersPage:
        """Return the present readers."""
        return self._readers.page

    def close(self) -> None:
        """End all waiting; the session was removed."""
        self._readers.close(self._turns.gone)

    async def parameters(
        self,
        since: int | None = None,
        write: WriteName | None = None,
        codec: str | None = None,
        spent: Intake | None = None,
        reader: Reader | None = None,
        outgoing: Outgoing | None = None,
    ) -> View:
        """Hold the parameters of the current version: all, or those that changed after version `since`.

        Args:
            write: the write that is answered; groups that its worker did not know are left out.
            codec: the name of their codec; None for unchanged.
            spent: the intake of a push that has its outcome: its memory may be overwritten.
            reader: the reader, if it is not the worker of a write; its lease is renewed.
            outgoing: the answer that they go into, if known; a slow one is cut while others wait for it.

        Raises:
            Busy: others read for too long.
        """
        kind: ReadKind = "pull" if write is None else "answer"
        if write is not None and since is None and codec is None and spent is None and self._turns.small:
            async with self._turns:
                copied = self._copied(write)
            if copied is not None:
                await self._kept()
                return copied

        def take() -> tuple[Held, Sequence[int], ReadSlot] | None:
            self._turns.check_open()
            held, outcomes = self._session.hold()
            if outcomes:
                self._turns.resolve(outcomes)
            layout = self._session.plan.layout if write is None else self._session.layout_at(write)
            chosen = chosen_of(held, layout, since)
            slot = self._readers.enter(kind, *cost_of(held, codec, chosen, spent), outgoing)
            if slot is None:
                held.release()
                return None
            if (who := reader or write) is not None:
                self._session.received(who.worker, who.epoch, self._turns.clock())
            return held, chosen, slot

        def give_back(taken: tuple[Held, Sequence[int], ReadSlot]) -> None:
            taken[0].release()
            taken[2].release()

        async with self._turns:
            taken = take()
        if taken is None:
            taken = await self._readers.wait(kind, take, give_back)
        held, chosen, slot = taken
        try:
            await self._kept()
            return await self._views.of(held, codec, chosen, spent, slot.release)
        except BaseException:
            slot.release()
            raise

    def _copied(self, write: WriteName) -> View | None:
        """Return a copy of a few parameters, which keeps no version; None where they are more, or have to be kept."""
        self._turns.check_open()
        session = self._session
        layout = session.layout_at(write)
        if layout.nbytes > COPIED_BYTES or session.keeps_bases:
            return None
        buffers, outcomes = session.parameters()
        if outcomes:
            self._turns.resolve(outcomes)
        if buffers.device.type != "cpu":
            return None
        session.received(write.worker, write.epoch, self._turns.clock())
        count = len(buffers.layout.segments)
        return BytesView(session.version, count, layout, buffers)

    @asynccontextmanager
    async def copying(self, nbytes: int, outgoing: Outgoing | None) -> AsyncIterator[None]:
        """Wait until `nbytes` of the session may be copied, and count them while the copy is sent.

        Raises:
            Busy: others read for too long.
        """

        def take() -> ReadSlot | None:
            self._turns.check_open()
            return self._readers.enter("copy", object(), nbytes, outgoing)

        slot = take()
        if slot is None:
            slot = await self._readers.wait("copy", take, ReadSlot.release)
        try:
            yield
        finally:
            slot.release()

    def _read_bytes(self, kind: ReadKind) -> int:
        """Return the bytes that readers of a kind may hold."""
        fields = 1 + len(self._session.plan.rule.tensor_fields) if kind == "copy" else 1
        return self._versions * self._session.plan.layout.nbytes * fields

    async def _make_room(self, kind: ReadKind) -> None:
        """Admit readers that waited for those that have just left."""
        async with self._turns:
            self._readers.admit(kind)

    async def contents(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> View:
        """Copy fields of the current version, of some segments or of all."""
        async with self._turns:
            self._turns.check_open()
            contents, outcomes = await self._turns.run(
                lambda: self._session.copy(fields, indices),
                lambda unasked: self._turns.resolve(unasked[1]),
                inline=self._turns.small,
            )
            self._turns.resolve(outcomes)
            count = len(self._session.plan.layout.segments)
            view = CopiedView(contents, self._session.version, count, None if indices is None else to_ranges(indices))
        await self._kept()
        return view

    async def record(self) -> SessionRecord:
        """Copy all that the session is, without the gradients that wait."""
        async with self._turns:
            self._turns.check_open()
            record = await self._turns.run(
                lambda: self._session.record(pushes=False), lambda _: None, inline=self._turns.small
            )
        await self._kept()
        return record

    async def snapshot(self) -> Snapshot:
        """Copy all of the current version, with the options in force at it."""
        async with self._turns:
            self._turns.check_open()
            snapshot, outcomes = await self._turns.run(
                self._session.snapshot, lambda unasked: self._turns.resolve(unasked[1]), inline=self._turns.small
            )
            self._turns.resolve(outcomes)
        await self._kept()
        return snapshot
