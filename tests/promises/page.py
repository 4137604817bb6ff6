"""Promises to users, each with the tests that show it, as `docs/promises.md`.

A test carries the promises that it shows:

    @pytest.mark.promise("A push is applied once, wherever its request or its answer is cut.", area="exactly once")

The same sentence on several tests is one promise. Tests are found in their syntax trees, so nothing is imported and no
test has to run. What is not promised, or has no test, stands in `GAPS`, so that the page shows both sides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "promises.md"
MARKER = "pytest.mark.promise"
MOST_TESTS = 3
"""How many tests a promise may name; a reader looks at few."""
WIDTH = 140

AREAS: Mapping[str, str] = {
    "bits of torch": "farstep trains as `torch.optim` does.",
    "exactly once": "Whatever the network and the processes do, a push counts once.",
    "durability": "What survives the death of a server, and a loss of power.",
    "consistency modes": "How the gradients of several workers become steps, and what happens when workers die.",
    "reads": "What a worker sees of a session.",
    "bad input": "What is wrong is refused by name and changes nothing.",
    "NaN, clipping and averages": "What a session does around a step.",
    "limits": "What one client may cost the others.",
    "memory": "What a session takes, and what happens when there is none left.",
    "security": "Who may do what.",
    "start and shutdown": "The life of a server.",
    "sessions and files": "Sessions outlive their workers, and move as files.",
    "client errors": "What a training script sees when something breaks.",
    "wire": "What goes over the network.",
    "launch": "Workers and demos that are started for you.",
}
"""The areas in the order of the page, each with what it is about."""

GAPS: Sequence[tuple[str, str]] = (
    (
        "Not promised: a disk that lies.",
        "A loss of power is tried on a storage in memory that keeps what was synced and may lose or tear the rest. A "
        "disk that says it has kept what it has not, or that is gone, is outside of it: copy snapshots elsewhere.",
    ),
    (
        "No test: monotonic reads.",
        "Within one life of a session a client does not see an older version after a newer one. Tests show that an "
        "answer is of one version, and not that answers to one client ascend.",
    ),
    (
        "No test: jumps of the wall clock.",
        "Leases and deadlines are measured on the monotonic clock, so a clock that is set by years changes nothing.",
    ),
    (
        "No test: releases beside each other.",
        "A client and a server one minor release apart work together. There is one release so far.",
    ),
    (
        "No test: GPUs.",
        "`make test` runs on the CPU. Promises about bits are for the CPU; on a GPU torch's own tolerance is meant.",
    ),
    (
        "Outside `make test`: long runs.",
        "Attacks of ten minutes (`make attack`), 1,000 kills of servers (`make torture`) and 10,000 examples of the "
        "models (`make model`) run before a release; a day under random faults has not been tried.",
    ),
)
"""What a reader might expect to find above and does not."""


@dataclass(frozen=True, slots=True)
class Marked:
    """One test that shows one promise.

    Attributes:
        promise: the sentence.
        area: the area that it belongs to.
        path: the test's file, from the root of the project.
        test: the test's name.
    """

    promise: str
    area: str
    path: str
    test: str


def collect(tests: Path = TESTS) -> list[Marked]:
    """Return all marked tests below a directory, in the order of their files and lines.

    Raises:
        ValueError: a marker has other arguments than a sentence and an area, or is not on a test.
    """
    return [each for path in sorted(tests.rglob("*.py")) for each in _marked(path, tests.parent)]


def _marked(path: Path, root: Path) -> Iterator[Marked]:
    source = path.read_text()
    if f"@{MARKER}(" not in source:
        return
    where = path.relative_to(root).as_posix()
    found = [
        (decorator, node)
        for node in ast.walk(ast.parse(source))
        for decorator in getattr(node, "decorator_list", ())
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == MARKER
    ]
    for decorator, node in sorted(found, key=lambda pair: pair[0].lineno):
        yield _read(decorator, node, where)


def _read(marker: ast.Call, node: ast.AST, where: str) -> Marked:
    at = f"{where}:{marker.lineno}"
    test = getattr(node, "name", "")
    if not (isinstance(node, ast.FunctionDef) and test.startswith("test_") and Path(where).name.startswith("test_")):
        raise ValueError(f"{at}: only a test shows a promise")
    match marker:
        case ast.Call(
            args=[ast.Constant(value=str(promise))],
            keywords=[ast.keyword(arg="area", value=ast.Constant(value=str(area)))],
        ):
            return Marked(promise, area, where, test)
    raise ValueError(f"{at}: write @{MARKER}('One sentence.', area='an area')")


def complaints(marked: Iterable[Marked]) -> list[str]:
    """Return what is wrong with the markers: each promise is one sentence of a known area, with a few tests."""
    areas: dict[str, set[str]] = {}
    tests: dict[str, list[str]] = {}
    for each in marked:
        areas.setdefault(each.promise, set()).add(each.area)
        tests.setdefault(each.promise, []).append(f"{each.path}::{each.test}")
    wrong = [f"{promise!r} is no sentence" for promise in areas if not promise.endswith(".")]
    wrong += [f"{promise!r} is in several areas: {sorted(found)}" for promise, found in areas.items() if len(found) > 1]
    unknown = sorted({area for found in areas.values() for area in found} - AREAS.keys())
    wrong += [f"there is no area {area!r}; there are: {', '.join(AREAS)}" for area in unknown]
    for promise, found in tests.items():
        if len(found) > MOST_TESTS:
            wrong.append(f"{promise!r} has {len(found)} tests, where {MOST_TESTS} are enough: {', '.join(found)}")
        if len(found) != len(set(found)):
            wrong.append(f"{promise!r} is twice on one test: {', '.join(found)}")
    return wrong


def render(marked: Sequence[Marked]) -> str:
    """Return the page."""
    promises = {each.promise for each in marked}
    tests = {(each.path, each.test) for each in marked}
    lines = [
        "# Promises",
        "",
        f"{len(promises)} promises to users, and {len(tests)} tests that show them; `make test` runs all of these.",
        "`make promises` writes this page from the markers on the tests (`pytest.mark.promise`); a test compares both.",
    ]
    for area, about in AREAS.items():
        lines += ["", f"## {area[0].upper()}{area[1:]}", "", about, ""]
        of_area = [each for each in marked if each.area == area]
        for promise in sorted({each.promise for each in of_area}, key=lambda sentence: sentence.strip("`").lower()):
            shown = [each for each in of_area if each.promise == promise]
            lines += [f"- {promise}", *(f"  - [`{each.path}`](../{each.path}) `{each.test}`" for each in shown)]
    lines += ["", "## Without a test, or not promised", ""]
    lines += [_wrapped(f"- **{what}** {why}") for what, why in GAPS]
    return "\n".join(lines) + "\n"


def _wrapped(item: str) -> str:
    return fill(item, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
