"""Who takes part in a session: the workers that joined, which of them are live, and whose place may be taken.

    joined, heard of          live, until its lease runs out
    a push of it waits        live, as long as it waits
    lease ran out, missed     lapsed: not waited for, and its place may be taken; live again when it is heard of
    lapsed for long           forgotten, as if it had left; so are the first of very many that lapsed
    left, displaced           not a member

A mode has room for a number of workers, or for any. Pure: no clock, no lock, no I/O; `now` is monotonic seconds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable
from itertools import islice
from math import inf

from farstep.errors import SessionFull

FORGOTTEN_AFTER_S = 3600.0
"""Seconds after which a lapsed worker is not a member any more."""
NAMED = 20
"""Workers that a message names at most."""
LAPSED_KEPT = 1024
"""Lapsed workers that are remembered at most."""


class Members:
    """The workers of one session, by name, with their epochs and leases.

    Args:
        places: how many workers there is room for, None for any number.
        lease_s: how long a lease is.
    """

    def __init__(self, places: int | None, lease_s: float) -> None:
        self.places = places
        self._lease_s = lease_s
        self._epochs: dict[str, int] = {}
        self._names: list[str] = []  # of all, ascending
        self._unnamed: set[str] = set()  # those with a random name
        self._leases: dict[str, float] = {}  # of live ones without a push that waits, first to run out first
        self._waiting: set[str] = set()
        self._lapsed: dict[str, float] = {}  # since when, ascending

    def __contains__(self, worker: str) -> bool:
        return worker in self._epochs

    def names(self) -> list[str]:
        """Return the workers in the order of their names."""
        return [*self._names]

    def names_after(self, worker: str, most: int) -> list[str]:
        """Return the first `most` of the workers whose names come after one, in their order."""
        first = bisect_right(self._names, worker)
        return self._names[first : first + most]

    def __len__(self) -> int:
        return len(self._names)

    def epoch(self, worker: str) -> int:
        """Return the epoch a worker joined with, 0 if it is not a member."""
        return self._epochs.get(worker, 0)

    def is_named(self, worker: str) -> bool:
        """Return whether a worker's name was chosen, rather than drawn at random."""
        return worker not in self._unnamed

    # -- leases -----------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Return how many are live."""
        return len(self._leases) + len(self._waiting)

    @property
    def awaited(self) -> Collection[str]:
        """Return the live ones of whom no push waits, first to lapse first."""
        return self._leases.keys()

    @property
    def next_lapse(self) -> float | None:
        """Return the time at which the next lease runs out, None if none does."""
        return next(iter(self._leases.values()), None)

    def is_live(self, worker: str) -> bool:
        """Say whether a worker is live."""
        return worker in self._leases or worker in self._waiting

    def is_live_at(self, worker: str, now: float) -> bool:
        """Say whether a worker is live at a time that nobody has been told of yet."""
        return worker in self._waiting or now < self._leases.get(worker, -inf)

    def left_s(self, worker: str, now: float) -> float:
        """Return how long a worker's lease still runs: all of it while a push of it waits, 0 for one not live."""
        return self._lease_s if worker in self._waiting else max(0.0, self._leases.get(worker, -inf) - now)

    def heard(self, worker: str, now: float) -> bool:
        """Renew the lease of a member; return whether it had lapsed."""
        if worker in self._waiting:
            return False
        lapsed = self._lapsed.pop(worker, None) is not None
        self._leases.pop(worker, None)
        self._leases[worker] = now + self._lease_s
        return lapsed

    def wait(self, worker: str) -> None:
        """Note that a push of a live member waits."""
        del self._leases[worker]
        self._waiting.add(worker)

    def answered(self, worker: str, now: float) -> None:
        """Note that the push of a member does not wait any more; its lease begins anew."""
        self._waiting.discard(worker)
        self.heard(worker, now)

    def sweep(self, now: float) -> list[str]:
        """Let the leases that have run out lapse, and return whose they were."""
        lapsed = []
        for worker, until in self._leases.items():
            if now < until:
                break
            lapsed.append(worker)
        for worker in lapsed:
            self.lapse(worker, now)
        return lapsed

    def lapse(self, worker: str, now: float) -> None:
        """Let the lease of a live member without a waiting push end."""
        del self._leases[worker]
        self._lapsed[worker] = now

    def change(self, places: int | None, lease_s: float, now: float) -> None:
        """Go on with other places and leases; those of live members begin anew."""
        self.places, self._lease_s = places, lease_s
        self._leases = dict.fromkeys(self._leases, now + lease_s)

    # -- places -----------------------------------------------------------------------------------------------------

    def surplus(self, places: int | None) -> list[str]:
        """Return the lapsed members who would have no place among so many.

        Raises:
            SessionFull: there are more live ones than that.
        """
        if places is None:
            return []
        if self.live > places:
            live = some_of(name for name in self._names if self.is_live(name))
            raise SessionFull(
                f"{self.live} workers are in this session, which would have {places} places: {live}.",
                remedy="Let workers leave first, or make more places.",
                field="workers",
                limit=places,
            )
        return sorted(self._lapsed)[: max(0, len(self._epochs) - places)]

    def make_room(self, worker: str) -> list[str]:
        """Return whom `worker` displaces so that it finds a place: nobody, or the first by name who has lapsed.

        Raises:
            SessionFull: every place is taken by a live worker.
        """
        if worker in self._epochs or self.places is None or len(self._epochs) < self.places:
            return []
        if not self._lapsed:
            raise SessionFull(
                f"All {self.places} places of this session are taken: {some_of(self._names)}.",
                remedy="Join under the name of the worker you replace, let one leave, or make more places.",
                field="worker",
                limit=self.places,
            )
        return [min(self._lapsed)]

    def forgotten(self, now: float) -> list[str]:
        """Return those who lapsed so long ago, or of so many, that they are not members any more."""
        surplus = len(self._lapsed) - LAPSED_KEPT
        found = []
        for number, (worker, since) in enumerate(self._lapsed.items()):
            if number >= surplus and now - since < FORGOTTEN_AFTER_S:
                break
            found.append(worker)
        return found

    def join(self, worker: str, epoch: int, now: float, *, named: bool = True) -> None:
        """Note that a worker joined.

        Args:
            named: its name was chosen, and orders sums; a random one would give them other bits in every run.
        """
        self.leave(worker)
        self._epochs[worker] = epoch
        if not named:
            self._unnamed.add(worker)
        insort(self._names, worker)
        self.heard(worker, now)

    def leave(self, worker: str) -> None:
        """Give a worker's place up."""
        if self._epochs.pop(worker, None) is not None:
            del self._names[bisect_left(self._names, worker)]
        self._leases.pop(worker, None)
        self._lapsed.pop(worker, None)
        self._waiting.discard(worker)
        self._unnamed.discard(worker)

    def missing(self, present: Iterable[str]) -> list[str]:
        """Return the members who are not among these."""
        return sorted(set(self._epochs) - set(present))


def some_of(names: Iterable[str]) -> str:
    """Return names for a message: the first ones, and whether there are more."""
    first = list(islice(names, NAMED + 1))
    return ", ".join(first) if len(first) <= NAMED else f"{', '.join(first[:NAMED])} and others"
