"""What a session keeps on disk: its levels as arguments, documents and texts."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

import farstep
from farstep.errors import InvalidOption
from farstep.protocol import durability
from farstep.protocol.durability import Durability

FORMS: list[tuple[Durability, dict[str, Any], str]] = [
    ("none", {"level": "none"}, "none"),
    (farstep.Snapshot(), {"level": "snapshot", "every_steps": None, "every_s": 60.0}, "snapshot:every_s=60"),
    (
        farstep.Snapshot(every_steps=100),
        {"level": "snapshot", "every_steps": 100, "every_s": 60.0},
        "snapshot:every_steps=100,every_s=60",
    ),
    (
        farstep.Snapshot(every_steps=1, every_s=None),
        {"level": "snapshot", "every_steps": 1, "every_s": None},
        "snapshot:every_steps=1,every_s=none",
    ),
    (
        farstep.Snapshot(every_s=0.1 + 0.2),
        {"level": "snapshot", "every_steps": None, "every_s": 0.1 + 0.2},
        "snapshot:every_s=0.30000000000000004",
    ),
    (farstep.Journal(), {"level": "journal", "sync": "os"}, "journal:os"),
    (farstep.Journal(sync="group"), {"level": "journal", "sync": "group"}, "journal:group"),
    (farstep.Journal(sync="always"), {"level": "journal", "sync": "always"}, "journal:always"),
]


@pytest.mark.parametrize(("level", "document", "text"), FORMS, ids=[text for _, _, text in FORMS])
def test_a_level_has_three_forms(level: Durability, document: dict[str, Any], text: str) -> None:
    """A level is the same after its document, and after its text, to the last bit of its numbers."""
    assert durability.to_document(level) == document
    assert durability.to_text(level) == text
    assert durability.from_document(document) == level
    assert durability.from_text(text) == level
    assert durability.checked(level) == level


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("journal", farstep.Journal()),
        (" snapshot ", farstep.Snapshot()),
        ("snapshot:every_steps=7", farstep.Snapshot(every_steps=7)),
        ("snapshot:every_s=1e3", farstep.Snapshot(every_s=1000.0)),
    ],
)
def test_a_text_may_leave_options_out(text: str, level: Durability) -> None:
    """What a text does not name has the default that it has in Python."""
    assert durability.from_text(text) == level


def test_a_document_may_leave_options_out() -> None:
    """What a document does not name has the default that it has in Python."""
    assert durability.from_document({"level": "journal"}) == farstep.Journal()
    assert durability.from_document({"level": "snapshot", "every_steps": 3}) == farstep.Snapshot(every_steps=3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"every_steps": 0}, "every_steps"),
        ({"every_steps": 1.5}, "every_steps"),
        ({"every_steps": True}, "every_steps"),
        ({"every_steps": 2**53 + 1}, "every_steps"),
        ({"every_steps": "100"}, "every_steps"),
        ({"every_s": 0}, "every_s"),
        ({"every_s": -1.0}, "every_s"),
        ({"every_s": float("nan")}, "every_s"),
        ({"every_s": 8 * 86_400}, "every_s"),
        ({"every_s": "60"}, "every_s"),
        ({"every_s": None}, "every_s"),
    ],
)
def test_a_snapshot_checks_itself(options: dict[str, Any], field: str) -> None:
    """A value out of range is refused by the name of its option, in Python as in a document."""
    with pytest.raises(InvalidOption) as refused:
        farstep.Snapshot(**options)
    assert refused.value.field == field
    with pytest.raises(InvalidOption) as refused:
        durability.from_document({"level": "snapshot", **options})
    assert refused.value.field == field


@pytest.mark.parametrize("sync", ["", "OS", "fsync", None, 1])
def test_a_journal_checks_itself(sync: Any) -> None:
    """A word that is no way to sync is refused, and the others are listed."""
    with pytest.raises(InvalidOption, match="os, group, always") as refused:
        farstep.Journal(sync=sync)
    assert refused.value.field == "sync"


@pytest.mark.parametrize("given", ["journal", "snapshot", "None", 1, True, {"level": "none"}, farstep.Journal, b"none"])
def test_what_is_no_level_is_refused_with_the_levels(given: object) -> None:
    """An argument that is no level is refused, and the remedy lists what there is."""
    with pytest.raises(InvalidOption) as refused:
        durability.checked(given)
    assert refused.value.field == "durability"
    assert "farstep.Journal" in refused.value.remedy


@pytest.mark.parametrize(
    "text",
    [
        "", "journal:", "journal:fsync", "journal:sync=os", "none:os", "none:", "snapshot:", "snapshot:100",
        "snapshot:every=5", "snapshot:every_s=1,every_s=2", "snapshot:every_s=x", "snapshot:every_s=none", "disk",
        "Journal", "snapshot:every_steps=1.5",
    ],
)  # fmt: skip
def test_a_text_that_is_no_level_is_refused(text: str) -> None:
    """A text with an unknown level, option or value is refused."""
    with pytest.raises(InvalidOption):
        durability.from_text(text)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"level": "disk"},
        {"level": ["journal"]},
        {"level": "none", "sync": "os"},
        {"level": "journal", "every_s": 1},
    ],
)
def test_a_document_that_is_no_level_is_refused(document: dict[str, Any]) -> None:
    """A document with an unknown level or option is refused, never ignored."""
    with pytest.raises(InvalidOption):
        durability.from_document(document)


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    """Numpy's numbers travel as Python's."""
    level = farstep.Snapshot(every_steps=numpy.int64(5), every_s=numpy.float32(0.5))  # type: ignore[arg-type]
    assert level == farstep.Snapshot(every_steps=5, every_s=0.5)
    assert type(level.every_steps) is int
    assert type(level.every_s) is float
