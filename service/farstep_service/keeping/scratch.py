"""Versions of a session that happen again in a session of its own, looked at closely.

For each version: the gradient of each worker, its norm and its largest element; and how far the parameters moved. The
version at which the norm of a gradient grows most, against the version before, is marked: where training went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from farstep.errors import InvalidOption
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import Push
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.recorder import Happened, read_events
from farstep_service.keeping.history import History, is_past
from farstep_service.keeping.recovery import arrive
from farstep_service.kernels import Kernels
from farstep_service.session import Outcomes, Session
from farstep_service.store import Buffers, FlatBuffers
from farstep_service.tensors.contribution import Contribution

MOST_VERSIONS: Final = 10_000
"""The most versions of one replay."""


@final
@dataclass(frozen=True, slots=True)
class Brought:
    """The gradient of one worker.

    Attributes:
        worker: its name.
        norm: the norm of all its elements.
        largest: the largest absolute value of one, and `parameter` the name of where it is; "" without elements.
    """

    worker: str
    norm: float
    largest: float
    parameter: str


@final
@dataclass(frozen=True, slots=True)
class Replayed:
    """One version that happened again.

    Attributes:
        version: its number.
        at: the time of day of the first time, in seconds since 1970.
        gradients: that of each push that counted in it, in the order of their arrival.
        change: the norm of the change of the parameters; 0 for the first ones.
        growth: what the largest norm of its gradients is of that of the step before; 0 without one.
        jump: whether this is the version with the largest growth.
    """

    version: int
    at: float
    gradients: tuple[Brought, ...]
    change: float
    growth: float = 0.0
    jump: bool = False

    @property
    def norm(self) -> float:
        """Return the largest norm of its gradients."""
        return max((each.norm for each in self.gradients), key=_size, default=0.0)


def replay(history: History, first: int, last: int, kernels: Callable[[str], Kernels], device: str) -> list[Replayed]:
    """Let the versions from `first` to `last` happen again.

    Raises:
        InvalidOption: they are too many, in the wrong order, or not kept.
        DamagedJournal: what led to them cannot be read.
        Unavailable: a kernel that ran cannot run here.
    """
    if not first <= last < first + MOST_VERSIONS:
        raise InvalidOption(
            f"Versions {first} to {last} cannot be replayed: at most {MOST_VERSIONS} can, in their order.",
            field="version",
            limit=MOST_VERSIONS,
        )
    starts = [each for each in (first - 2, first - 1) if history.reaches(each)]  # two: for the growth of the first one
    session, reader = history.before(starts[0] if starts else first - 1, kernels, device)
    if reader is None:
        raise history.no_journal()
    scratch = _Scratch(session, first - 1, last)
    for each in read_events(reader, upto=history.upto):
        if is_past(session, last):
            break
        scratch.happen(each, reader)
    if session.version != last or first not in scratch.changes:
        raise history.not_kept(last if session.version != last else first)
    return [each for each in _grown(scratch.versions()) if each.version >= first]


@final
class _Scratch:
    """A session in which events happen again, and what was seen of them.

    Args:
        session: the session.
        first, last: the versions that are looked at.

    Attributes:
        changes: by version, the norm of the change of the parameters.
    """

    def __init__(self, session: Session, first: int, last: int) -> None:
        self.changes: dict[int, float] = {}
        self._session, self._first, self._last = session, first, last
        self._gradients: dict[int, list[Brought]] = {}
        self._at: dict[int, float] = {}
        self._waiting: dict[WriteName, Brought] = {
            head.name: brought(gradients, head.name.worker)
            for head, _ in session.waiting()
            if (gradients := session.gradients(head.name)) is not None
        }
        self._accumulated: list[Brought] = []
        self._seen = session.version if session.initialised else None
        self._before = self._parameters()

    def happen(self, happened: Happened, reader: JournalReader) -> None:
        """Let an event happen again."""
        arrive(self._session, happened, reader)
        event = happened.event
        if isinstance(event, Push) and (gradients := self._session.gradients(event.head.name)) is not None:
            self._waiting[event.head.name] = brought(gradients, event.head.name.worker)
        made = len(self.changes)
        outcomes = self._session.replay(event, happened.now, happened.results, self._until)
        self._look()
        for version in [*self.changes][made:]:
            self._at[version] = happened.at
        self._note(outcomes)

    def versions(self) -> list[Replayed]:
        """Return what was seen, by version."""
        return [
            Replayed(version, self._at[version], tuple(self._gradients.get(version, ())), change)
            for version, change in sorted(self.changes.items())
        ]

    def _until(self, version: int) -> bool:
        self._look()
        return is_past(self._session, self._last)

    def _look(self) -> None:
        """Note how far the parameters have moved, if there is another version."""
        session = self._session
        if not session.initialised or session.version == self._seen:
            return
        self._seen = session.version
        before, now = self._before, self._parameters()
        self._before = now
        if now is not None:
            self.changes[session.version] = 0.0 if before is None else _distance(before, now)

    def _parameters(self) -> FlatBuffers | None:
        """Return a copy of the parameters, None before the first version that is looked at."""
        if not is_past(self._session, self._first):
            return None
        buffers = self._session.present()
        return FlatBuffers(buffers.layout, zero=False).copy_(buffers)

    def _note(self, outcomes: Outcomes) -> None:
        """Note in which version each gradient counted."""
        for name, outcome in outcomes.items():
            gradient, receipt = self._waiting.pop(name, None), outcome.result
            if gradient is None or not isinstance(receipt, Receipt):
                continue
            if receipt.applied:
                self._gradients.setdefault(receipt.version, []).extend([*self._accumulated, gradient])
                self._accumulated = []
            elif receipt.reason == "accumulated":
                self._accumulated.append(gradient)


def brought(gradients: Contribution, worker: str) -> Brought:
    """Return what is seen of the gradient of a worker, as it came."""
    layout, squares, largest, where = gradients.layout, 0.0, 0.0, ""
    dense: Buffers | None = gradients.half_precision() or gradients.buffers
    for index in gradients.indices:
        segment = layout.segments[index]
        if index in gradients.sparse:
            rows, values = gradients.widened(index)
            values = torch.sparse_coo_tensor(rows, values, segment.shape, device=values.device).coalesce().values()
        elif dense is not None:
            values = dense.segment(index)
        else:
            continue
        if not values.numel():
            continue
        sizes = values.detach().abs().double()
        squares += float(sizes.square().sum())
        most = float(sizes.max())
        if not where or _size(most) > _size(largest):
            largest, where = most, segment.name
    return Brought(worker, math.sqrt(squares) if squares == squares else squares, largest, where)


def _distance(before: FlatBuffers, now: FlatBuffers) -> float:
    """Return the norm of the change of parameters, of those that were there before."""
    total = 0.0
    for index in range(len(before.layout.segments)):
        one, other = before.segment(index), now.segment(index)
        total += float((_wide(other) - _wide(one)).abs().square().sum())
    return math.sqrt(total) if total == total else total


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _size(value: float) -> float:
    """Return a number to compare by: NaN is larger than all others."""
    return math.inf if value != value else value


def _grown(versions: Sequence[Replayed]) -> Iterator[Replayed]:
    """Yield versions with their growth, the one with the largest marked."""
    grown, before = [], 0.0
    for each in versions:
        growth = 0.0
        if each.gradients:
            now = _size(each.norm)
            growth = now / before if before and math.isfinite(before) else 0.0
            before = now
        grown.append(replace(each, growth=growth))
    most = max((each.growth for each in grown), default=0.0)
    marked = next((each.version for each in grown if most > 1.0 and each.growth == most), None)
    for each in grown:
        yield replace(each, jump=each.version == marked)
