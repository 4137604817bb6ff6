"""Environment variables: whatever the code reads is written down for its users."""

from __future__ import annotations

import re
from pathlib import Path

from farstep.variables import KNOWN

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"FARSTEP_[A-Z]+(?:_[A-Z]+)*_?")


def test_every_variable_is_in_the_documents() -> None:
    """Users find each name in the README or the documents; those of `serve` follow from its options by one rule."""
    code = [path for room in ("client", "service") for path in (ROOT / room).rglob("*.py")]
    documents = [ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")]
    read, told = ({name for path in paths for name in NAME.findall(path.read_text())} for paths in (code, documents))
    assert {"FARSTEP_SERVER", "FARSTEP_WIRE", "FARSTEP_KERNEL_CACHE"} <= read
    assert {name for name in read - told if not name.startswith("FARSTEP_SERVE_")} == set()


def test_every_variable_that_is_read_is_known() -> None:
    """What the code reads is what a misspelt name is compared with, so that no new variable is taken for a mistake."""
    code = [path for room in ("client", "service") for path in (ROOT / room).rglob("*.py")]
    read = {name for path in code for name in NAME.findall(path.read_text())}
    others = {"FARSTEP_PORT", "FARSTEP_HTTP_PORT"}  # Kubernetes' and the compose file's
    assert {name for name in read if not name.startswith("FARSTEP_SERVE_") and not name.endswith("_")} - others == KNOWN
