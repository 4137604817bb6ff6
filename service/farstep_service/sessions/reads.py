"""Views of the versions of one session. A step never waits for them: `farstep_service.sessions.readers` says how many
there may be.

A view of a version keeps it until the view is released. A copy, in a codec or from a device, does not: it gives the
version back when it has been made, and is shared by all who read that version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final, final

from farstep.codecs import codec_named
from farstep.wire import to_ranges
from farstep_service.layout import Layout
from farstep_service.sessions.answers import Intake, View
from farstep_service.sessions.narrowed import NarrowedView, Narrowings
from farstep_service.sessions.views import HeldView, PushIntake
from farstep_service.store import Held

NARROW_INLINE_BYTES: Final = 4 * 1024 * 1024
"""Parameters of fewer bytes than this are copied on the event loop; it takes a fraction of a millisecond."""


@final
class Views:
    """Make views of versions.

    Args:
        executor: runs large copies.
    """

    def __init__(self, executor: Executor) -> None:
        self._narrowings = Narrowings(executor)

    @property
    def nbytes(self) -> int:
        """Return the memory of copies that others may share."""
        return self._narrowings.nbytes

    async def of(
        self,
        held: Held,
        half: str | None,
        chosen: Sequence[int],
        spent: Intake | None,
        released: Callable[[], None],
    ) -> View:
        """Return the view of some segments.

        Args:
            held, half, chosen: the version, the name of a codec if one is wanted, and the segments.
            spent: see `Actor.parameters`.
            released: called when the view is.
        """
        layout = held.buffers.layout
        whole = len(chosen) == len(layout.segments)
        ranges = None if whole else to_ranges(chosen)
        if half is None and held.buffers.device.type == "cpu":
            return HeldView(held, None if whole else chosen, ranges, released)
        gradients = spent.contribution if isinstance(spent, PushIntake) and half is not None else None
        inline = layout.nbytes <= NARROW_INLINE_BYTES
        narrowed = await self._narrowings.of(held, codec_named(half), chosen, gradients, inline=inline)
        return NarrowedView(narrowed, chosen, ranges, released)


def cost_of(held: Held, half: str | None, chosen: Sequence[int], spent: Intake | None) -> tuple[object, int]:
    """Return what equals for readers who need the same memory, and the bytes of that memory.

    For the arguments see `Views.of`. Gradients that are written over are counted as the push that they came with.
    """
    layout = held.buffers.layout
    if half is None:
        return id(held.buffers) if held.buffers.device.type == "cpu" else held.version, layout.nbytes
    if isinstance(spent, PushIntake) and spent.contribution.spent() is not None:
        return object(), 0
    if len(chosen) < len(layout.segments):
        return object(), layout.on_wire(codec_named(half)).bytes_of(chosen)
    return (held.version, half), layout.on_wire(codec_named(half)).nbytes


def chosen_of(held: Held, layout: Layout, since: int | None) -> Sequence[int]:
    """Return those segments of a version that a reader knows, and that changed after a version if one is given."""
    known = len(layout.segments)
    if since is None:
        return range(known)
    changed = held.changed_since(since)
    if known < len(held.buffers.layout.segments):
        return [index for index in changed if index < known]
    return changed
