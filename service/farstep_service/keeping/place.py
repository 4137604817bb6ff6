"""Where one session is kept: its snapshots, of which there are two, and what its journal has to keep for them."""

from __future__ import annotations

from dataclasses import dataclass

from farstep_service.durability.journal import Journal
from farstep_service.durability.snapshots import KEPT, Saved, first_segment, forget_snapshots, write_snapshot
from farstep_service.durability.storage import Storage


@dataclass(slots=True)
class Place:
    """Where a session is kept.

    Attributes:
        storage: the files.
        folder: the session's.
        snapshots: the number of each snapshot, and the first segment of the journal that it needs; ascending.
        last: the highest number that a snapshot had.
    """

    storage: Storage
    folder: str
    snapshots: list[tuple[int, int | None]]
    last: int

    def write(self, saved: Saved, journal: Journal | None, *, only: bool = False) -> None:
        """Write a snapshot, and let go of what is not needed any more.

        Args:
            journal: of the session; None for a level without one.
            only: the snapshots before it are not kept.

        Raises:
            OSError: the disk has no room for it, or failed.
        """
        if saved.waiting and journal is not None and saved.position is not None:
            journal.sync(saved.position.number)  # the manifest names what waiting pushes brought
        self.last += 1
        write_snapshot(self.storage, self.folder, self.last, saved)
        first = None if saved.position is None else first_segment(saved.position.segment, saved.waiting)
        self.snapshots[:] = [*([] if only else self.snapshots), (self.last, first)][-KEPT:]
        forget_snapshots(self.storage, self.folder, self.snapshots[0][0])
        needed = [each for _, each in self.snapshots if each is not None]
        if journal is not None and needed:
            journal.forget(min(needed))
