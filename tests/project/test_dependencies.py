"""What is declared, what is pinned and what is imported agree."""

import ast
import re
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# torch pins these itself, exactly, and only some of its builds have them.
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, Version]:
    """Return the pinned version of each package in deploy/constraints.txt."""
    lines = [
        line for line in (root / "deploy" / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    exact = [re.fullmatch(r"([a-z0-9-]+)==([^\s+]+)", line) for line in lines]
    assert all(exact), f"not `name==version`: {[line for line, match in zip(lines, exact, strict=True) if not match]}"
    names = [match[1] for match in exact if match]
    assert names == sorted(set(names)), "keep one line per package, in order"
    return {match[1]: Version(match[2]) for match in exact if match}


NOT_INSTALLED = "ray"
"""The extra that make does not install: a peer that the benchmarks measure where it is there."""
FOR_THE_SITE = "docs"
"""The extra that only `make docs` installs: pinned like the others, and not there while tests run."""


def declared(pyproject: dict[str, Any]) -> dict[str, list[Requirement]]:
    groups = {"": pyproject["project"]["dependencies"], **pyproject["project"]["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items() if group != NOT_INSTALLED}


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_what_make_does_not_install_is_an_extra_apart(root: Path, pyproject: dict[str, Any]):
    """The extra that is not pinned is the one that neither the Makefile nor the Dockerfile asks for."""
    assert NOT_INSTALLED in pyproject["project"]["optional-dependencies"]
    asked = re.findall(r"\[([a-z,]+)\]'", (root / "Makefile").read_text() + (root / "Dockerfile").read_text())
    assert asked
    assert not any(NOT_INSTALLED in extras.split(",") for extras in asked)


def test_every_direct_dependency_is_pinned_inside_its_range(pyproject: dict[str, Any], pins: dict[str, Version]):
    """Each range of pyproject.toml, the build backend's too, contains the version that deploy/constraints.txt pins."""
    ranges = [Requirement(line) for line in pyproject["build-system"]["requires"]]
    ranges += [each for group in declared(pyproject).values() for each in group]
    assert [each.name for each in ranges if canonicalize_name(each.name) not in pins] == []
    assert [str(each) for each in ranges if pins[canonicalize_name(each.name)] not in each.specifier] == []


def test_everything_they_bring_along_is_pinned_too(pyproject: dict[str, Any], pins: dict[str, Version]):
    """No package that the extras install, at whatever remove, is left to the day of the installation.

    The tool of the site is looked at where somebody has built it; what it brings along cannot be known elsewhere.
    """
    seen, missing = set[tuple[str, str]](), set[str]()
    groups = declared(pyproject)
    site = [each for each in groups.pop(FOR_THE_SITE) if is_installed(each.name)]
    ahead = [requirement for group in (*groups.values(), site) for requirement in group]
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(PINNED_BY_TORCH):
            continue
        if name not in pins:
            missing.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                brought = [Requirement(line) for line in metadata.requires(name) or []]
                ahead += [each for each in brought if not each.marker or each.marker.evaluate({"extra": extra})]
    assert missing == set()


def test_the_client_imports_only_what_it_needs(root: Path, pyproject: dict[str, Any]):
    """The client package runs with torch, httpx and msgpack: nothing else at run time."""
    assert {each.name for each in declared(pyproject)[""]} == {"torch", "httpx", "msgpack"}
    assert undeclared(root / "client", {"torch", "httpx", "msgpack"}) == {}


def test_the_service_imports_only_what_it_declares(root: Path, pyproject: dict[str, Any]):
    """What the service imports is declared by the project or an extra for users, not only by those for developers."""
    groups = declared(pyproject)
    del groups["dev"], groups["integrations"], groups[FOR_THE_SITE]
    allowed = {canonicalize_name(each.name) for group in groups.values() for each in group}
    assert undeclared(root / "service", allowed) == {}


def undeclared(sources: Path, allowed: Collection[str]) -> dict[str, list[str]]:
    """Return, by file, the imported top-level names that belong to no allowed distribution."""
    ours = {"farstep", "farstep_service"}
    providers = metadata.packages_distributions()
    found: dict[str, list[str]] = {}
    for path in sorted(sources.rglob("*.py")):
        imported = set[str]()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
        foreign = sorted(
            name
            for name in imported - ours - sys.stdlib_module_names
            if not any(canonicalize_name(provider) in allowed for provider in providers.get(name, []))
        )
        if foreign:
            found[str(path.relative_to(sources))] = foreign
    return found


def test_the_entry_points_lead_somewhere(pyproject: dict[str, Any]):
    """The console script and the embedded host name functions that exist."""
    project = pyproject["project"]
    wanted = {"farstep": project["scripts"]["farstep"], **project["entry-points"]["farstep.hosts"]}
    for name, value in wanted.items():
        assert callable(metadata.EntryPoint(name=name, value=value, group="").load())
