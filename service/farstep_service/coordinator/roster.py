"""Who takes part in a session: one record for each worker, and what follows from all of them.

    joined, heard of          live, until its lease runs out
    a push of it waits        live, as long as it waits
    lease ran out, missed     lapsed: not waited for, and its place may be taken; live again when it is heard of
    lapsed for long           forgotten, as if it had left; so are the first of very many that lapsed
    left, displaced           not a member

**Exactly once.** A write is named by (worker, epoch, sequence):

    incoming                                  answer                       state
    next in sequence                          it is new                    +1 when it is committed
    seen before, same content                 the original receipt         unchanged
    seen before, other content                IdempotencyMismatch          unchanged
    seen before, its receipt is not kept      ReceiptExpired               unchanged
    a gap                                     SequenceGap with the next    unchanged
    older epoch, or not a member              Fenced                       unchanged

A write that is refused later (validation, a barrier that times out) is never committed, so its sequence is not
consumed. The last 64 receipts of a worker are kept: of an older write it is known that it was committed, but neither
what it held nor what became of it, so no repetition of it is answered as if that were known. Of all records of workers
that are not members any more one number is kept, their highest epoch: a worker without a record begins above it. So a
write of a forgotten epoch is fenced for ever, and nothing is applied twice.

**Param groups.** When worker X adds group i, every other worker knows groups 0 to i-1 only, until it adds the same one
or joins again. What a worker knew when it made a write decides how large that write is, also when it arrives once more
much later.

A mode has room for a number of workers, or for any. `now` is seconds of a clock that never goes back.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable
from typing import final

from farstep.errors import Fenced, ReceiptExpired, SequenceGap, SessionFull
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator.member import Entry, Member, RosterState, mismatch, some_of

FORGOTTEN_AFTER_S = 3600.0
"""Seconds after which a lapsed worker is not a member any more."""
LAPSED_KEPT = 1024
"""Lapsed workers that are remembered at most."""
RECEIPTS_KEPT = 64
"""Receipts of each worker's last writes that are kept."""


@final
class Roster:
    """The workers of one session.

    Args:
        places: how many workers there is room for, None for any number.
        lease_s: how long a lease is.
        state: what another roster was.
    """

    def __init__(self, places: int | None, lease_s: float, state: RosterState | None = None) -> None:
        self.places = places
        self._lease_s = lease_s
        state = state or RosterState()
        self._members = state.members
        self._forgotten = state.forgotten
        self._added_by = state.added_by
        self._names = sorted(self._members)
        self._leases = {name: each for name, each in self._members.items() if each.until is not None}
        self._lapsed = {name: self._members[name] for name in state.lapsed}
        self._bases = {name: each for name, each in self._members.items() if each.base is not None}
        self._waiting = sum(each.waits for each in self._members.values())

    @property
    def state(self) -> RosterState:
        """Return all that the roster is."""
        others = sorted(self._members.keys() - self._leases.keys())
        members = {**self._leases, **{name: self._members[name] for name in others}}
        return RosterState(members, [*self._lapsed], self._forgotten, self._added_by)

    def __contains__(self, worker: str) -> bool:
        return worker in self._members

    def __len__(self) -> int:
        return len(self._members)

    def names(self) -> list[str]:
        """Return the workers in the order of their names."""
        return [*self._names]

    def names_after(self, worker: str, most: int) -> list[str]:
        """Return the first `most` of the workers whose names come after one, in their order."""
        first = bisect_right(self._names, worker)
        return self._names[first : first + most]

    def missing(self, present: Iterable[str]) -> list[str]:
        """Return the members who are not among these."""
        return sorted(self._members.keys() - set(present))

    def epoch(self, worker: str) -> int:
        """Return the current epoch of a worker, 0 if it is not a member."""
        member = self._members.get(worker)
        return member.epoch if member else 0

    def sequence(self, worker: str) -> int:
        """Return the sequence of the last committed write in the current epoch, 0 if there is none."""
        member = self._members.get(worker)
        return member.sequence if member else 0

    def is_named(self, worker: str) -> bool:
        """Return whether a worker's name was chosen, rather than drawn at random."""
        member = self._members.get(worker)
        return member is None or member.named

    # -- joining and leaving ----------------------------------------------------------------------------------------

    def join(self, worker: str, now: float, *, named: bool = True) -> int:
        """Open a new epoch of a worker that knows all groups, fencing its older ones, and return it."""
        old = self._members.get(worker)
        epoch = old.epoch + 1 if old else self._forgotten + 1
        forgotten = self._forgotten
        self.leave(worker)
        self._forgotten = forgotten  # for the worker itself its record says it
        self._members[worker] = Member(epoch, named)
        insort(self._names, worker)
        self.heard(worker, now)
        return epoch

    def leave(self, worker: str) -> None:
        """Give a worker's place up: its epochs are over."""
        member = self._members.pop(worker, None)
        if member is None:
            return
        self._forgotten = max(self._forgotten, member.epoch)
        self._waiting -= member.waits
        del self._names[bisect_left(self._names, worker)]
        self._leases.pop(worker, None)
        self._lapsed.pop(worker, None)
        self._bases.pop(worker, None)

    def make_room(self, worker: str, now: float) -> list[str]:
        """Return the workers that `worker` displaces: none, or the first by name that has lapsed.

        Raises:
            SessionFull: every place is taken by a live worker.
        """
        if worker in self._members or self.places is None or len(self._members) < self.places:
            return []
        if not (lapsed := self._lapsed_at(now)):
            raise SessionFull(
                f"All {self.places} places of this session are taken: {some_of(self._names)}.",
                remedy="Join under the name of the worker you replace, let one leave, or make more places.",
                field="worker",
                limit=self.places,
            )
        return [min(lapsed)]

    def surplus(self, places: int | None, now: float) -> list[str]:
        """Return the lapsed members who would have no place among so many.

        Raises:
            SessionFull: there are more live ones than that.
        """
        if places is None:
            return []
        lapsed = self._lapsed_at(now)
        if (live := len(self._members) - len(lapsed)) > places:
            those = some_of(name for name in self._names if name not in lapsed)
            raise SessionFull(
                f"{live} workers are in this session, which would have {places} places: {those}.",
                remedy="Let workers leave first, or make more places.",
                field="workers",
                limit=places,
            )
        return sorted(lapsed)[: max(0, len(self._members) - places)]

    def forgotten(self, now: float) -> list[str]:
        """Return those who lapsed so long ago, or of so many, that they are not members any more."""
        surplus = len(self._lapsed) - LAPSED_KEPT
        found = []
        for number, (worker, member) in enumerate(self._lapsed.items()):
            if number >= surplus and member.lapsed is not None and now - member.lapsed < FORGOTTEN_AFTER_S:
                break
            found.append(worker)
        return found

    # -- leases -----------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Return how many are live."""
        return len(self._leases) + self._waiting

    @property
    def awaited(self) -> Collection[str]:
        """Return the live ones of whom no push waits, first to lapse first."""
        return self._leases.keys()

    @property
    def next_lapse(self) -> float | None:
        """Return the time at which the next lease runs out, None if none does."""
        first = next(iter(self._leases.values()), None)
        return None if first is None else first.until

    def is_live(self, worker: str) -> bool:
        """Return whether a worker is live, as of the last `sweep`."""
        member = self._members.get(worker)
        return member is not None and member.live

    def is_live_at(self, worker: str, now: float) -> bool:
        """Return whether a worker is live at a time for which there was no `sweep` yet."""
        member = self._members.get(worker)
        return member is not None and (member.waits or (member.until is not None and now < member.until))

    def left_s(self, worker: str, now: float) -> float:
        """Return how long a worker's lease still runs: all of it while a push of it waits, 0 for one not live."""
        member = self._members.get(worker)
        if member is None or (member.until is None and not member.waits):
            return 0.0
        return self._lease_s if member.until is None else max(0.0, member.until - now)

    def is_fresh(self, worker: str, now: float) -> bool:
        """Return whether a lease has run for less than a hundredth of its time."""
        return self.left_s(worker, now) > 0.99 * self._lease_s

    def heard(self, worker: str, now: float) -> bool:
        """Renew the lease of a member; return whether it had lapsed."""
        member = self._members[worker]
        if member.waits:
            return False
        lapsed = member.lapsed is not None
        if lapsed:
            del self._lapsed[worker]
            member.lapsed = None
        else:
            self._leases.pop(worker, None)
        member.until = now + self._lease_s
        self._leases[worker] = member
        return lapsed

    def wait(self, worker: str) -> None:
        """Note that a push of a live member waits."""
        member = self._leases.pop(worker)
        member.until, member.waits = None, True
        self._waiting += 1

    def answered(self, worker: str, now: float) -> None:
        """Note that the push of a member does not wait any more; its lease begins anew."""
        member = self._members[worker]
        self._waiting -= member.waits
        member.waits = False
        self.heard(worker, now)

    def sweep(self, now: float) -> list[str]:
        """Let the leases that have run out lapse, and return whose they were."""
        lapsed = []
        for worker, member in self._leases.items():
            if member.until is None or now < member.until:
                break
            lapsed.append(worker)
        for worker in lapsed:
            self.lapse(worker, now)
        return lapsed

    def lapse(self, worker: str, now: float) -> None:
        """Let the lease of a live member without a waiting push end."""
        member = self._leases.pop(worker)
        member.until, member.lapsed = None, now
        self._lapsed[worker] = member

    def change(self, places: int | None, lease_s: float, now: float) -> None:
        """Go on with other places and leases; those of live members begin anew."""
        self.places, self._lease_s = places, lease_s
        for member in self._leases.values():
            member.until = now + lease_s

    def _lapsed_at(self, now: float) -> set[str]:
        """Return who is not live at a time, whether there was a `sweep` for it or not."""
        lapsed = set(self._lapsed)
        for worker, member in self._leases.items():
            if member.until is None or now < member.until:
                break
            lapsed.add(worker)
        return lapsed

    # -- exactly once -----------------------------------------------------------------------------------------------

    def judge(self, name: WriteName, fingerprint: str | None) -> Receipt | None:
        """Return None for a write that is next in sequence, or the receipt of one that was committed before.

        Args:
            fingerprint: what identifies the content; None while it is not known yet (before the body).

        Raises:
            Fenced: the epoch is not the worker's current one.
            SequenceGap: a write before this one is missing (`extra["expected"]`).
            IdempotencyMismatch: another content was committed under this name.
            ReceiptExpired: something was committed under it so long ago that its receipt is not kept any more.
        """
        member = self.check(name.worker, name.epoch)
        if name.sequence == member.sequence + 1:
            return None
        if name.sequence > member.sequence:
            raise SequenceGap(
                f"Worker {name.worker!r} wrote sequence {name.sequence}, expected {member.sequence + 1}.",
                remedy="Send the missing write first.",
                field="seq",
                expected=member.sequence + 1,
            )
        entry = member.receipts.get(name.sequence)
        if entry is None:
            raise ReceiptExpired(
                f"Sequence {name.sequence} of worker {name.worker!r} was committed, and writes up to {member.sequence} "
                f"after it; its receipt is gone, since only those of the last {RECEIPTS_KEPT} writes are kept.",
                remedy="Do not send it again: nothing is applied twice. Go on with the next sequence.",
                field="seq",
                limit=RECEIPTS_KEPT,
                last=member.sequence,
            )
        if fingerprint is not None and fingerprint != entry.fingerprint:
            raise mismatch(name)
        return entry.receipt

    def check(self, worker: str, epoch: int) -> Member:
        """Return the record of a worker whose current epoch this is.

        Raises:
            Fenced: it is another one.
        """
        member = self._members.get(worker)
        if member is None or epoch != member.epoch:
            current = f"epoch {member.epoch} is current" if member else "it is not a member"
            raise Fenced(
                f"Worker {worker!r} comes as epoch {epoch}, but {current}.",
                remedy="Another process joined under the same name, or the worker was away so long that its place went "
                "to another: give each worker its own name, or join again.",
                field="epoch",
                limit=member.epoch if member else 0,
            )
        return member

    def commit(self, name: WriteName, fingerprint: str, receipt: Receipt) -> None:
        """Record a write that `judge` called new, with its receipt."""
        member = self._members[name.worker]
        member.sequence = name.sequence
        member.receipts[name.sequence] = Entry(fingerprint, receipt)
        if len(member.receipts) > RECEIPTS_KEPT:
            member.receipts.popitem(last=False)

    # -- param groups -----------------------------------------------------------------------------------------------

    def lag(self, worker: str) -> tuple[int, str] | None:
        """Return how many groups a worker knows and who added the next one; None for one that knows all."""
        member = self._members.get(worker)
        if member is None or member.groups is None:
            return None
        return member.groups, self._added_by[member.groups]

    def groups_at(self, name: WriteName) -> int | None:
        """Return how many groups a worker knew when it made a write of its present epoch; None for all there are."""
        member = self._members.get(name.worker)
        if member is None:
            return None
        later = bisect_right(member.learned, name.sequence, key=lambda each: each[0])
        return member.learned[later][1] if later < len(member.learned) else member.groups

    def added(self, group: int, by: WriteName) -> None:
        """Note that a worker added a group: the others do not know it."""
        self._added_by[group] = by.worker
        for worker, member in self._members.items():
            if worker == by.worker:
                member.learned.append((by.sequence, group))
            elif member.groups is None:
                member.groups = group

    def learned(self, group: int, name: WriteName) -> None:
        """Note that a worker added a group that is there already; nothing happens if it knew it."""
        member = self._members[name.worker]
        if member.groups == group:
            member.learned.append((name.sequence, group))
            member.groups = group + 1 if group + 1 in self._added_by else None

    # -- versions that are kept -------------------------------------------------------------------------------------

    def base(self, worker: str) -> int | None:
        """Return the version that is kept for a worker, None for none."""
        member = self._members.get(worker)
        return member.base if member else None

    def keep_base(self, worker: str, version: int | None) -> None:
        """Note which version is kept for a worker, None for none."""
        member = self._members[worker]
        member.base = version
        self._bases.pop(worker, None)
        if version is not None:
            self._bases[worker] = member

    def bases(self) -> dict[str, int]:
        """Return the versions that are kept, by worker, the first to be kept first."""
        return {name: each.base for name, each in self._bases.items() if each.base is not None}
