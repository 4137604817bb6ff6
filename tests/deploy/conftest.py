"""What the tests of the container share: the files, as text and as what they mean."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's root."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def project(root: Path) -> dict[str, Any]:
    """Return what pyproject.toml says about the project."""
    declared: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return declared


@pytest.fixture(scope="session")
def dockerfile(root: Path) -> str:
    """Return the text of the Dockerfile."""
    return (root / "Dockerfile").read_text()


@pytest.fixture(scope="session")
def compose(root: Path) -> dict[str, Any]:
    """Return the compose file, its anchors resolved and its variables not."""
    loaded: dict[str, Any] = yaml.safe_load((root / "deploy" / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="session")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the services of the compose file by name."""
    found: dict[str, dict[str, Any]] = compose["services"]
    return found
