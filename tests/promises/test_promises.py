"""The page of promises is what the markers on the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.promises.__main__ import main
from tests.promises.page import AREAS, GAPS, MARKER, MOST_TESTS, PAGE, Marked, collect, complaints, render


def test_the_page_is_what_the_command_would_write() -> None:
    """docs/promises.md is up to date; otherwise `make promises` writes it."""
    assert PAGE.read_text() == render(collect()), "run `make promises`"


def test_markers_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Each promise is one sentence of one known area with a few tests, each area has a promise, and none is a gap."""
    marked = collect()
    assert complaints(marked) == []
    assert {each.area for each in marked} == set(AREAS)
    assert {what for what, _ in GAPS}.isdisjoint(each.promise for each in marked)
    assert main([]) == 0
    assert capsys.readouterr().out == render(marked)


def test_wrong_markers_are_named() -> None:
    """No sentence, an unknown area, two areas, too many tests and one test twice are told apart."""
    good = Marked("It works.", "reads", "tests/test_a.py", "test_a")
    assert complaints([good]) == []
    no_sentence, elsewhere = Marked("It works", "reads", "t", "a"), Marked("It works.", "memory", "t", "a")
    (complaint,) = complaints([no_sentence])
    assert complaint == "'It works' is no sentence"
    (complaint,) = complaints([good, elsewhere])
    assert "several areas: ['memory', 'reads']" in complaint
    (complaint,) = complaints([Marked("It works.", "attic", "t", "a")])
    assert "no area 'attic'" in complaint
    (complaint,) = complaints([good, good])
    assert "twice on one test" in complaint
    crowd = [Marked("It works.", "reads", "t", f"test_{number}") for number in range(MOST_TESTS + 1)]
    (complaint,) = complaints(crowd)
    assert f"has {MOST_TESTS + 1} tests" in complaint


def test_markers_are_found_wherever_a_test_is(tmp_path: Path) -> None:
    """In classes, below other decorators, several on one test; and on tests only, with an area."""
    file = tmp_path / "tests" / "test_it.py"
    file.parent.mkdir()
    file.write_text(
        f'@{MARKER}("A.", area="reads")\n'
        f'@{MARKER}("B.", area="limits")\n'
        "@pytest.mark.parametrize('a', [1])\n"
        "def test_one(a): ...\n"
        "class TestIt:\n"
        f'    @{MARKER}("A.", area="reads")\n'
        "    def test_two(self): ...\n"
    )
    place = "tests/test_it.py"
    assert collect(file.parent) == [
        Marked("A.", "reads", place, "test_one"),
        Marked("B.", "limits", place, "test_one"),
        Marked("A.", "reads", place, "test_two"),
    ]
    file.write_text(f'@{MARKER}("A.", area="reads")\ndef helper(): ...\n')
    with pytest.raises(ValueError, match=r"tests/test_it.py:1: only a test"):
        collect(file.parent)
    file.write_text(f'@{MARKER}("A.")\ndef test_it(): ...\n')
    with pytest.raises(ValueError, match="an area"):
        collect(file.parent)
