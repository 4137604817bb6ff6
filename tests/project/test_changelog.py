"""The changelog has a section for each version, and the project's version is the one that it leads to."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from packaging.version import Version

CHANGELOG = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
OPEN, *RELEASED = re.findall(r"^## .*$", CHANGELOG, re.MULTILINE)
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
"""The headings of Keep a Changelog, in its order."""


def released() -> list[tuple[Version, date]]:
    """Return every released version with its day, as they stand in the file."""
    found = [re.fullmatch(r"## \[(\S+)\] - (\d{4}-\d\d-\d\d)", line) for line in RELEASED]
    assert all(found), RELEASED
    return [(Version(each[1]), date.fromisoformat(each[2])) for each in found if each]


def test_the_next_version_is_open_and_the_others_are_in_order() -> None:
    """What is not released comes first; below it are versions with their days, the latest first."""
    assert OPEN == "## [Unreleased]"
    versions = released()
    assert versions == sorted(versions, reverse=True)
    assert len({version for version, _ in versions}) == len(versions) > 0
    assert all(day >= date(2026, 11, 20) for _, day in versions), "the day of the first commit"


def test_the_projects_version_is_the_open_one_or_the_latest(pyproject: dict[str, Any]) -> None:
    """The project is a development version of the next release, which the changelog names, or is just released."""
    version = Version(pyproject["project"]["version"])
    latest, _ = released()[0]
    if version == latest:
        return
    assert version.is_devrelease
    assert version > latest
    assert f"\nWhat will be {version.base_version}.\n" in CHANGELOG.partition(RELEASED[0])[0]


def test_the_readme_shows_the_version_that_it_is_about(root: Path, pyproject: dict[str, Any]) -> None:
    """The banner of a server in README.md has the version that this one becomes."""
    (shown,) = re.findall(r"^farstep (\S+) serves at", (root / "README.md").read_text(), re.MULTILINE)
    assert shown == Version(pyproject["project"]["version"]).base_version


def test_each_section_has_the_headings_of_the_format_once() -> None:
    """A second `### Fixed` in a version would hide what is below it."""
    for section in CHANGELOG.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds], section.splitlines()[0]
