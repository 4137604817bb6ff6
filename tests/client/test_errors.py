"""The error tree and its document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from farstep.errors import (
    BY_CODE,
    Busy,
    FarstepError,
    InvalidOption,
    SequenceGap,
    TensorMismatch,
    Unavailable,
    from_problem,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.mark.promise("Every error has a documented code and class, and says what to do.", area="client errors")
def test_every_code_is_documented_with_its_class_and_status() -> None:
    """The table in docs/errors.md has every code the tree has, with its class and status, and no other."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`[^|]*\| (\d+) \|", DOCUMENT.read_text(), flags=re.M)
    listed = {code: (name, int(status)) for code, name, status in rows}
    assert listed == {code: (kind.__name__, kind.status) for code, kind in BY_CODE.items()}


def test_codes_are_unique() -> None:
    """No two classes share a code."""

    def family(root: type[FarstepError]) -> list[type[FarstepError]]:
        return [root, *(each for child in root.__subclasses__() for each in family(child))]

    codes = [kind.code for kind in family(FarstepError)]
    assert len(codes) == len(set(codes))


def test_an_error_survives_the_wire() -> None:
    """A problem document becomes an error of the same class with the same facts."""
    error = SequenceGap("Expected 3.", remedy="Send 3.", field="seq", limit=3, expected=3)
    back = from_problem(error.to_problem(), error.status)
    assert type(back) is SequenceGap
    assert (back.detail, back.remedy, back.field, back.limit, back.side, back.extra) == (
        "Expected 3.",
        "Send 3.",
        "seq",
        3,
        "server",
        {"expected": 3},
    )


@pytest.mark.promise(
    "What a later server adds to an answer is passed over; another protocol version is refused.",
    area="wire",
)
@pytest.mark.parametrize("problem", [{}, {"code": "of_a_newer_server", "detail": "Something."}])
def test_an_unknown_code_is_understood_by_its_status(problem: dict[str, object]) -> None:
    """A code of a newer server falls back to a class of the same status."""
    assert isinstance(from_problem(problem, 503), Unavailable)
    assert type(from_problem(problem, 418)) is FarstepError


def test_what_torch_refuses_is_caught_as_torchs() -> None:
    """Code that catches torch's ValueError for a bad option, or its RuntimeError for a bad tensor, catches ours."""
    assert issubclass(InvalidOption, ValueError)
    assert issubclass(TensorMismatch, RuntimeError)
    assert issubclass(Busy, Unavailable)
