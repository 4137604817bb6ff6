"""The floors of service and client: the contracts in pyproject.toml hold, and they would notice if one did not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {"floors": "service/farstep_service", "client-floors": "client/farstep"}
"""The contracts that are drawn, and the packages whose floors they are."""


def floors(pyproject: dict[str, Any], contract_id: str) -> list[list[str]]:
    (contract,) = (each for each in pyproject["tool"]["importlinter"]["contracts"] if each["id"] == contract_id)
    return [re.findall(r"\w+", layer) for layer in contract["layers"]]


def lint_imports(directory: Path, sources: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": f"{sources / 'client'}:{sources / 'service'}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sketch(root: Path, pyproject: dict[str, Any], tmp_path: Path) -> Path:
    """Return a project with our contracts whose rooms are all there, and empty."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    for contract_id, package in PACKAGES.items():
        (tmp_path / package).mkdir(parents=True)
        for module in ("__init__", *(room for floor in floors(pyproject, contract_id) for room in floor)):
            (tmp_path / package / f"{module}.py").touch()
    return tmp_path


def test_every_room_imports_only_from_floors_below(root: Path):
    """The contracts of pyproject.toml hold for the sources."""
    done = lint_imports(root, root)
    assert done.returncode == 0, done.stdout


def test_rooms_may_import_from_floors_below(sketch: Path):
    """The contracts allow what they are meant to allow, so that the refusals below mean something."""
    service = sketch / "service" / "farstep_service"
    (service / "cli.py").write_text("from farstep_service import app\nimport httpx\n")
    (service / "app.py").write_text("from farstep_service import routes, sessions\nimport farstep.transport, fastapi\n")
    (service / "session.py").write_text("from farstep_service import layout, store\nimport farstep.protocol, torch\n")
    client = sketch / "client" / "farstep"
    (client / "transport.py").write_text("import httpx\n")
    (client / "optim.py").write_text("from farstep import http_link, link, errors\n")
    done = lint_imports(sketch, sketch)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "complaint"),
    [
        ("service/farstep_service/layout", "from farstep_service import store", "layout -> farstep_service.store"),
        ("service/farstep_service/session", "import farstep_service.sessions", "session -> farstep_service.sessions"),
        (
            "service/farstep_service/durability",
            "import farstep_service.session",
            "durability -> farstep_service.",
        ),
        ("service/farstep_service/store", "import fastapi", "farstep_service.store -> fastapi"),
        ("service/farstep_service/optimizers", "import uvicorn.config", "farstep_service.optimizers -> uvicorn"),
        ("service/farstep_service/coordinator", "from farstep import transport", "farstep.transport -> httpx"),
        ("service/farstep_service/session", "from starlette import requests", "farstep_service.session -> starlette"),
        ("service/farstep_service/attic", "", "- farstep_service.attic"),
        ("client/farstep/protocol", "from farstep_service import layout", "farstep.protocol -> farstep_service.layout"),
        ("client/farstep/link", "from farstep import http_link", "farstep.link -> farstep.http_link"),
        ("client/farstep/protocol", "import farstep.transport", "farstep.protocol -> farstep.transport"),
        ("client/farstep/attic", "", "- farstep.attic"),
    ],
)
def test_a_wrong_import_is_refused(sketch: Path, module: str, statement: str, complaint: str):
    """An import upwards, sideways, from client to service, or of HTTP below the routes is found, and named."""
    (sketch / "client" / "farstep" / "transport.py").write_text("import httpx\n")
    (sketch / module).with_suffix(".py").write_text(statement)
    done = lint_imports(sketch, sketch)
    assert done.returncode != 0
    assert complaint in done.stdout


def test_a_circle_inside_a_room_is_refused(sketch: Path):
    """Modules of one room that import each other are found, and the room is named."""
    room = sketch / "client" / "farstep" / "http_link"
    room.with_suffix(".py").unlink()
    room.mkdir()
    for module, statement in (
        ("__init__", ""),
        ("link", "from farstep.http_link import writer"),
        ("writer", "from farstep.http_link import standing"),
        ("standing", "from farstep.http_link import link"),
    ):
        (room / f"{module}.py").write_text(statement)
    done = lint_imports(sketch, sketch)
    assert done.returncode != 0
    assert "No cycles are allowed in farstep.http_link" in done.stdout


@pytest.mark.parametrize("contract_id", PACKAGES)
def test_the_drawing_shows_the_floors(root: Path, pyproject: dict[str, Any], contract_id: str):
    """The README beside the package draws the floors that pyproject.toml enforces, in the same order."""
    _, drawing, *_ = (root / PACKAGES[contract_id]).with_name("README.md").read_text().split("```")
    rows = [re.match(r"\s*\d\w* +(.+?)(?:   |$)", line) for line in drawing.splitlines()]
    drawn = [re.findall(r"\w+", row[1]) for row in rows if row]
    assert drawn == floors(pyproject, contract_id)
