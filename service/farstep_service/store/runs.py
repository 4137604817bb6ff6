"""Runs: neighbouring segments that one kernel call can update.

    segments   w0  b0  w1  b1  w2  b2         group 0: w, lr 0.1      group 1: b, lr 0.2      w1 has no gradient
    runs       ──  ──      ──  ──  ──         one each, since the numbers of neighbours differ
    with lr 0.1 everywhere: two runs, [w0 b0] and [b1 w2 b2], interrupted by w1

Neighbours belong to one run if the step's numbers and the state in use are equal for both, and they are adjacent in
every memory. The usual step is one run per group. A rule for whole tensors has a run for each segment, and one that
distinguishes complex numbers from pairs of reals has no run of both. No tensor is touched here.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

from farstep.errors import InvalidOption
from farstep.protocol.hyper import Hyper
from farstep_service.layout import Layout
from farstep_service.optimizers.rule import AnyRule, ElementwiseRule, Fields, SegmentCounters
from farstep_service.store.gradients import Gradients


@dataclass(frozen=True, slots=True)
class Run:
    """Segments that one call updates.

    Attributes:
        members: the segments, in order and of one dtype; segments of others may lie between them.
        length: elements of all of them.
    """

    members: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The runs of a step.

    Attributes:
        dense: the segments with a dense gradient.
        touched: the segments that the step changes.
        runs: those with a dense gradient, joined.
    """

    dense: list[int]
    touched: list[int]
    runs: list[Run]


class Numbers(NamedTuple):
    """What a step needs of a segment's options and counts.

    Attributes:
        scalars: the rule's numbers.
        optional: the optional state fields in use.
    """

    scalars: tuple[float, ...]
    optional: Fields


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision of a step, in numbers.

    Attributes:
        cut: its runs.
        runs: the numbers of each run.
        rows: the numbers of each sparse gradient, in its order.
        after: every segment's counts after the step.
    """

    cut: Cut
    runs: list[Numbers]
    rows: list[Numbers]
    after: list[SegmentCounters | None]


@final
class Planner:
    """Decide steps, with a cache of how the last one was cut.

    The same segments with the same pattern of equal groups are cut in the same way, as long as the members of each run
    have equal counts. Then a step costs a few Python calls, independent of the number of segments.
    """

    def __init__(self, layout: Layout, rule: AnyRule) -> None:
        self._layout = layout
        self._rule = rule
        self._apart: Container[int] = range(len(layout.segments))
        if isinstance(rule, ElementwiseRule):
            self._apart = _changes(layout) if rule.complex_numbers else ()
        # Segments of these shapes have the same fields, independent of their counts.
        self._shapes = [segment.shape if rule.special else () for segment in layout.segments]
        self._key: tuple[object, ...] | None = None
        self._cut = Cut([], [], [])

    def forget(self) -> None:
        """Cut the next step anew, because counts have been replaced."""
        self._key = None

    def decide(
        self,
        groups: Sequence[Hyper],
        gradients: Gradients,
        counts: Sequence[SegmentCounters | None],
        borders: frozenset[int],
    ) -> Decision:
        """Decide a step.

        Args:
            groups: options of each param group.
            gradients: of the step.
            counts: of each segment.
            borders: segments that begin a new piece of the parameters' memory.

        Raises:
            InvalidOption: the options lead to undefined numbers, such as a division by zero.
        """
        classes: dict[Hyper, int] = {}
        pattern = [classes.setdefault(hyper, number) for number, hyper in enumerate(groups)]
        present = None if gradients.present is None else tuple(gradients.present)
        key = (pattern, present, tuple(gradients.sparse), gradients.buffers.borders, borders)
        known: dict[tuple[int, int, tuple[int, ...]], tuple[Numbers, SegmentCounters | None]] = {}
        after = list(counts)

        def advance(segment: int) -> Numbers:
            group = self._layout.segments[segment].group
            # Equal SegmentCounters are mostly one object; comparing identities is several times faster.
            where = (pattern[group], id(counts[segment]), self._shapes[segment])
            found = known.get(where)
            if found is None:
                found = known[where] = self._numbers(counts[segment], groups[group], self._shapes[segment])
            after[segment] = found[1]
            return found[0]

        if key == self._key:
            cut = self._cut
            numbers = [advance(run.members[0]) for run in cut.runs]
            for run in cut.runs:
                last = after[run.members[0]]
                for member in run.members:
                    after[member] = last
        else:
            self._key = None
            dense = gradients.dense()
            each = [advance(segment) for segment in dense]
            runs = runs_of(self._layout, dense, each, (gradients.buffers.borders, borders, self._apart))
            cut = Cut(dense, sorted([*dense, *gradients.sparse]), runs)
            by_segment = dict(zip(dense, each, strict=True))
            numbers = [by_segment[run.members[0]] for run in runs]
            if all(self._is_steady(run, pattern, after) for run in runs):
                self._key, self._cut = key, cut
        return Decision(cut, numbers, [advance(segment) for segment in gradients.sparse], after)

    def _numbers(
        self, counts: SegmentCounters | None, hyper: Hyper, shape: tuple[int, ...]
    ) -> tuple[Numbers, SegmentCounters | None]:
        rule = self._rule
        scalars, after = next_step(rule, counts, hyper)
        optional = rule.optional(hyper)
        fields = rule.fields((*(counts.fields if counts else ()), *optional), shape)
        if not fields and not rule.segment_fields:
            return Numbers(scalars, optional), None
        return Numbers(scalars, optional), after if after.fields == fields else replace(after, fields=fields)

    def _is_steady(self, run: Run, pattern: Sequence[int], after: Sequence[SegmentCounters | None]) -> bool:
        """Return whether the members of a run will also have equal numbers in the next step."""
        first, *others = run.members
        group = pattern[self._layout.segments[first].group]
        return all(
            pattern[self._layout.segments[other].group] == group and after[other] == after[first] for other in others
        )


def next_step(rule: AnyRule, counts: SegmentCounters | None, hyper: Hyper) -> tuple[tuple[float, ...], SegmentCounters]:
    """Return the numbers of the step that follows `counts`, None for the first one, and the counts after it.

    Raises:
        InvalidOption: the step is undefined.
    """
    try:
        now = counts or rule.first(hyper)
        return rule.scalars(now, hyper), rule.advance(now, hyper)
    except ArithmeticError as exc:
        raise InvalidOption(
            f"{rule.name} cannot step with {hyper.to_options()}: {exc}.",
            remedy="Change the options of the group.",
        ) from exc


def runs_of(
    layout: Layout,
    segments: Sequence[int],
    numbers: Sequence[Hashable],
    borders: Sequence[Container[int]],
) -> list[Run]:
    """Join segments into runs.

    Args:
        layout: the session's.
        segments: those with a dense gradient, ascending.
        numbers: for each of them a value that must be equal for joining.
        borders: segments that begin a new piece of memory, for each kind of memory.
    """
    open_runs: dict[str, tuple[list[int], Hashable, int]] = {}
    joined: list[list[int]] = []
    for index, its in zip(segments, numbers, strict=True):
        segment = layout.segments[index]
        members, before, stop = open_runs.get(segment.buffer, ([], None, -1))
        if stop != segment.offset or before != its or any(index in each for each in borders):
            members = []
            joined.append(members)
        members.append(index)
        open_runs[segment.buffer] = (members, its, segment.stop)
    return [Run(tuple(members), sum(layout.segments[index].length for index in members)) for members in joined]


def _changes(layout: Layout) -> frozenset[int]:
    """Return the segments that are complex while the one before them in memory is not, or vice versa."""
    before: dict[str, bool] = {}
    changes = set()
    for index, segment in enumerate(layout.segments):
        if before.get(segment.buffer, segment.is_complex) != segment.is_complex:
            changes.add(index)
        before[segment.buffer] = segment.is_complex
    return frozenset(changes)
