"""Failpoints: named places where a process ends at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from farstep_service.failpoints import KILLED, NAMES, VARIABLE, Failpoint

SOURCES = Path(__file__).parents[2] / "service" / "farstep_service"
SCRIPT = """
from farstep_service.failpoints import reached
for number in range(3):
    reached("journal.append.before")
    print(number, flush=True)
"""


def test_each_name_is_one_place_in_the_sources() -> None:
    """Every name of the list is passed to `reached` somewhere, so that a campaign over the list visits them all."""
    calls = Counter(
        ast.literal_eval(node.args[0])
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "reached"
    )
    assert sorted(calls) == sorted(NAMES)


@pytest.mark.parametrize("text", ["journal.append", "journal.append.before:0", "journal.append.before:x", ":2"])
def test_a_place_that_is_not_there_is_refused(text: str) -> None:
    """A misspelt place or visit is an error: a test that waits for a death there would otherwise show nothing."""
    with pytest.raises(ValueError, match="NAME is one of"):
        Failpoint.of({VARIABLE: text})


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "printed", "status"), [("", 3, 0), (":1", 0, KILLED), (":3", 2, KILLED), (":4", 3, 0)]
)
def test_the_process_ends_at_the_named_visit(text: str, printed: int, status: int) -> None:
    """The process ends at once at the k-th visit of its place, and not at all without the variable or before."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={VARIABLE: f"journal.append.before{text}"} if text else {},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (status, [b"0", b"1", b"2"][:printed], b"")
