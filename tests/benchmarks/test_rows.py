"""Rows judge what they show, survive the way between processes, and go into documents where their markers are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.rows import (
    BEGIN,
    END,
    Row,
    absent,
    amount,
    fact,
    faster,
    from_json,
    gained,
    markdown,
    plain,
    put_between_markers,
    shown,
    summary,
    to_json,
    within,
    write_markdown,
)

ROWS = [
    within("step", 60.0, "ms", "raw", 50.0, 1.2),
    faster("step", 60.0, "ms", "a peer", 120.0, 2.8),
    shown("taking over", 12.5, "s", "after 7 steps"),
    absent("on a GPU", "no GPU here"),
    fact("replay", 0, "different", "9 steps", "none", True),
]


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (within("w", 60.0, "ms", "raw", 50.0, 1.2), 1.2, True),
        (within("w", 61.0, "ms", "raw", 50.0, 1.2), 1.22, False),
        (faster("w", 10.0, "ms", "peer", 28.0, 2.8), 2.8, True),
        (faster("w", 28.0, "ms", "peer", 10.0, 2.8), 0.36, False),
        (gained("w", 3.0, "GB/s", "copy", 2.0, 1.4), 1.5, True),
        (gained("w", 2.0, "GB/s", "copy", 3.0, 1.4), 0.67, False),
    ],
)
def test_a_ratio_is_compared_with_its_target(row: Row, ratio: float, met: bool):
    """Times are to be at most a limit, speeds and throughputs at least one."""
    assert (row.ratio, row.met) == (ratio, met)
    assert row.verdict == ("met" if met else "missed")


def test_a_row_is_judged_by_what_it_shows():
    """A ratio of 1.203, shown as 1.20, meets a limit of 1.2; one that is shown as 1.21 does not."""
    assert within("w", 1.203, "ms", "raw", 1.0, 1.2).met
    assert not within("w", 1.206, "ms", "raw", 1.0, 1.2).met
    assert faster("w", 1.0, "ms", "peer", 0.996, 1.0).met


def test_a_row_without_a_target_has_no_verdict():
    """What is only shown, or was not measured, is neither met nor missed."""
    assert [row.verdict for row in (within("w", 2.0, "ms", "raw", 1.0, None), ROWS[2], ROWS[3])] == ["", "", ""]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234 ms"), (64.72, "64.7 ms"), (1.5, "1.50 ms"), (0.4444, "0.444 ms"), (0, "0 ms"), (7, "7 ms")],
)
def test_an_amount_has_three_digits_that_count(value: float, text: str):
    """Large numbers lose what comes after the point, small ones keep it."""
    assert amount(value, "ms") == text


def test_the_plain_table_is_aligned_and_counts():
    """Each line begins its columns where the heads do, and the last line counts what has a target."""
    lines = plain(ROWS).splitlines()
    place = lines[0].index("against")
    assert [line[place:].split("  ")[0] for line in lines[1:4]] == ["raw 50 ms", "a peer 120 ms", "after 7 steps"]
    assert lines[2].endswith("at least 2.8 x faster  missed")
    assert lines[-1] == summary(ROWS) == "2 of 3 targets met."


def test_the_markdown_table_has_a_line_for_each_row():
    """Title, heads and rows; a bar inside a cell does not end it."""
    text = markdown([*ROWS, shown("a|b", 1, "s")], "here, today")
    assert text.startswith("here, today\n\n| work | measured |")
    assert "| step | 60 ms | raw 50 ms | 1.20 x | at most 1.2 x | met |" in text
    assert "| on a GPU |  | no GPU here |  |  |  |" in text
    assert r"| a\|b | 1 s |" in text


def test_rows_survive_their_way_between_processes():
    """What comes out of the JSON is equal to what went in."""
    assert from_json(to_json(ROWS)) == ROWS


def test_a_table_replaces_the_one_before(tmp_path: Path):
    """Only what stands between the markers changes, however often it is done."""
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_markdown(file, ROWS, "first")
    write_markdown(file, ROWS[:1], "second")
    assert file.read_text() == f"before\n{BEGIN}\n\n{markdown(ROWS[:1], 'second')}\n\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_document_without_one_place_for_the_table_is_refused(text: str):
    """Nothing is written into a document whose markers are missing, swapped or doubled."""
    with pytest.raises(ValueError, match="no single place"):
        put_between_markers(text, "table")
