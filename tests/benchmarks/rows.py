"""What a benchmark found, one comparison in a row, and how a table of them is printed.

A row is judged by the ratio that it shows, rounded as it is shown: what a reader sees is what counts.

    within    ours / theirs is to be at most a limit              a time, memory, CPU
    faster    theirs / ours is to be at least a limit             how many times as fast
    gained    ours / theirs is to be at least a limit             throughput
    fact      true or not                                         "no compile inside it"
    shown     for the reader's information, without a target
    absent    not measured here, and why
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DIGITS = 2
"""Of a ratio, after the point."""
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADS = ("work", "measured", "against", "ratio", "target", "")


@dataclass(frozen=True, slots=True)
class Row:
    """State one comparison.

    Attributes:
        work: what was done, and by which side of ours.
        measured: how long it took, or what else was measured; None if it was not.
        unit: of `measured`.
        against: the other side, with what it came to; or why nothing was measured.
        ratio: of the two; None where there is none.
        target: what the ratio is to be, as text; "" if there is no target.
        met: whether it is; None without a target, or where nothing was measured.
    """

    work: str
    measured: float | None
    unit: str
    against: str
    ratio: float | None = None
    target: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """Return the last column."""
        return "" if self.met is None else "met" if self.met else "missed"

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the columns as they are printed."""
        measured = "" if self.measured is None else amount(self.measured, self.unit)
        ratio = "" if self.ratio is None else f"{self.ratio:.{DIGITS}f} x"
        return self.work, measured, self.against, ratio, self.target, self.verdict


def within(work: str, ours: float, unit: str, name: str, theirs: float, limit: float | None) -> Row:
    """Return a row in which ours is to be at most `limit` times theirs."""
    return _compared(work, ours, unit, name, theirs, ours / theirs, limit, "at most {} x", least=False)


def faster(work: str, ours: float, unit: str, name: str, theirs: float, limit: float | None) -> Row:
    """Return a row in which theirs is to take at least `limit` times as long as ours."""
    return _compared(work, ours, unit, name, theirs, theirs / ours, limit, "at least {} x faster", least=True)


def gained(work: str, ours: float, unit: str, name: str, theirs: float, limit: float | None) -> Row:
    """Return a row in which ours is to be at least `limit` times theirs."""
    return _compared(work, ours, unit, name, theirs, ours / theirs, limit, "at least {} x", least=True)


def fact(work: str, measured: float, unit: str, against: str, target: str, met: bool) -> Row:
    """Return a row about something that holds or does not."""
    return Row(work, measured, unit, against, None, target, met)


def shown(work: str, measured: float, unit: str, against: str = "") -> Row:
    """Return a row without a comparison."""
    return Row(work, measured, unit, against)


def absent(work: str, why: str) -> Row:
    """Return the row of what was not measured."""
    return Row(work, None, "", why)


def amount(value: float, unit: str) -> str:
    """Return a number with three digits that count, and its unit."""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()


def plain(rows: Sequence[Row]) -> str:
    """Return a table for a terminal."""
    cells = [HEADS, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    right = (1, 3)
    lines = [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([*lines, "", summary(rows)])


def markdown(rows: Sequence[Row], title: str) -> str:
    """Return the same as Markdown, under a line that says where and when."""
    lines = [_line(HEADS), "|---|---:|---|---:|---|---|", *(_line(row.cells) for row in rows)]
    return "\n".join([title, "", *lines, "", summary(rows)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def summary(rows: Iterable[Row]) -> str:
    """Return how many targets were met, and how many rows were not measured."""
    counted = [row.met for row in rows if row.met is not None]
    return f"{counted.count(True)} of {len(counted)} targets met."


def put_between_markers(text: str, table: str) -> str:
    """Return a document with the table in the place of what stood between its markers.

    Raises:
        ValueError: the document does not have both markers, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after or END in before:
        raise ValueError(f"The document has no single place for the table: {BEGIN} … {END}.")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def write_markdown(file: Path, rows: Sequence[Row], title: str) -> None:
    """Put the table into a document."""
    file.write_text(put_between_markers(file.read_text(), markdown(rows, title)))


def to_json(rows: Iterable[Row]) -> str:
    """Return rows as one line."""
    return json.dumps([asdict(row) for row in rows])


def from_json(text: str) -> list[Row]:
    """Return the rows of such a line."""
    return [Row(**each) for each in json.loads(text)]


def _compared(
    work: str, ours: float, unit: str, name: str, theirs: float, ratio: float, limit: float | None, form: str, *,
    least: bool,
) -> Row:  # fmt: skip
    against, ratio = f"{name} {amount(theirs, unit)}", round(ratio, DIGITS)
    if limit is None:
        return Row(work, ours, unit, against, ratio)
    met = ratio >= limit if least else ratio <= limit
    return Row(work, ours, unit, against, ratio, form.format(f"{limit:g}"), met)
