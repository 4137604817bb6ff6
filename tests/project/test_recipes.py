"""What the recipes of CONTRIBUTING.md end with is done for everything that there is, and the files they name exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import farstep
from farstep.errors import InvalidOption
from farstep.optim import RemoteOptimizer
from farstep.protocol.codecs import Codec, codecs
from farstep.protocol.consistency import MODES, Async, Consistency, checked
from farstep.protocol.policies import default_options
from farstep.settings import RemoteOptions, options_of_copy, resolve
from farstep_service.optimizers import METHODS
from tests.support.service.servers import farstep as command

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MADE_UP = {
    f"{room}/{name}.py"
    for room, name in (
        ("client/farstep/optim", "newopt"),
        ("client/farstep/protocol/codecs", "int8"),
        ("client/farstep/protocol/consistency", "turns"),
        ("service/farstep_service/optimizers", "newopt"),
        ("service/farstep_service/coordinator/modes", "turns"),
        ("client/farstep/protocol/policies", "sign"),
    )
}
"""The files that a reader of the recipes makes."""
OPTIMIZERS = sorted(set(farstep.optim.__all__) - {RemoteOptimizer.__name__})
KINDS = [kind.__name__ for kind in MODES.values()]
POLICIES = list(default_options())


def rows(page: str) -> list[str]:
    """Return the rows of a page's tables."""
    return [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]


def test_the_files_that_recipes_name_exist() -> None:
    """Each path below client, service, tests or docs is there, but for those that a reader makes."""
    named = set(re.findall(r"\b((?:client|service|tests|docs)/[\w/.-]*\w/?)(?=[`\s)#:])", CONTRIBUTING))
    assert len(named) > 30
    assert named >= MADE_UP
    assert [path for path in sorted(named - MADE_UP) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", re.findall(r"`(\w+)` of\s+`(\S+\.py)`", CONTRIBUTING), ids=lambda found: found[0])
def test_the_names_that_recipes_use_are_in_their_files(name: tuple[str, str]) -> None:
    """What a recipe says to look for in a file is defined there."""
    wanted, path = name
    assert re.search(rf"^\s*(?:def |class )?{wanted}\b", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_on_both_sides_and_in_the_tables(name: str) -> None:
    """The server has a rule of that name, and README.md and docs/optimizers.md have a row for it."""
    assert name in METHODS
    for page in ("README.md", "docs/optimizers.md"):
        assert any(f"`{name}`" in row.split("|")[1] for row in rows(page)), page


def test_every_rule_has_an_optimizer() -> None:
    """What a server can do, a client can ask for."""
    assert sorted(METHODS) == OPTIMIZERS


@pytest.mark.parametrize("name", KINDS)
def test_a_mode_is_public_and_in_the_tables(name: str) -> None:
    """Users find a mode in the package, README.md, docs/workers.md, and what they are told when they give none."""
    assert name in farstep.__all__
    assert any(row.startswith(f"| `farstep.{name}(") for row in rows("README.md"))
    assert any(row.startswith(f"| `{name}(") for row in rows("docs/workers.md"))
    with pytest.raises(InvalidOption, match=rf"farstep\.{name}\("):
        checked("a word")


@pytest.mark.parametrize("kind", MODES.values(), ids=KINDS)
def test_a_mode_with_a_deadline_says_that_workers_wait(kind: type[Consistency]) -> None:
    """Retries, locks and loss scales ask a mode whether a push can wait for others, and for how long."""
    has_deadline = "deadline_s" in {each.name for each in fields(kind)}
    assert ("longest_wait_s" in vars(kind), "waits_for_others" in vars(kind)) == (has_deadline, has_deadline)


def test_the_command_line_names_every_mode() -> None:
    """`farstep sessions mode --help` says which modes there are."""
    shown = command("sessions", "mode", "--help", env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    assert [mode for mode in MODES if not re.search(rf"\b{mode}\b", shown)] == []


@pytest.mark.parametrize("codec", codecs(), ids=lambda codec: codec.name)
def test_a_codec_is_in_the_protocol_and_in_the_table(codec: Codec) -> None:
    """PROTOCOL.md has its name and format, and docs/optimizers.md the option that chooses it."""
    assert f"`{codec.name}`" in (ROOT / "client" / "farstep" / "protocol" / "PROTOCOL.md").read_text()
    assert any(f'`"{codec.option}"`' in row.split("|")[1] for row in rows("docs/optimizers.md"))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_an_argument_and_in_the_table(name: str) -> None:
    """Users give it to an optimizer, copies of that have it, and docs/policies.md says what it does."""
    assert name in RemoteOptions.__annotations__
    assert f"\n    {name}: " in (RemoteOptions.__doc__ or "")
    assert name in options_of_copy(resolve({"consistency": Async()}, {}))
    assert re.search(rf"`{name}=", (ROOT / "docs" / "policies.md").read_text())
