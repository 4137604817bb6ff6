"""The console script answers quickly, because help needs no torch."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["sessions", "--help"]], ids=" ".join)
def test_help_does_not_import_torch(arguments: list[str], tmp_path: Path):
    """`farstep --help` and the help of its verbs print usage without loading torch, fastapi or uvicorn."""
    done = subprocess.run(
        [str(Path(sysconfig.get_path("scripts")) / "farstep"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "farstep_service.cli" in imported
    assert imported & {"torch", "fastapi", "uvicorn"} == set()
