"""The examples train, in processes of their own; pages show them as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.launch.launching import said
from tests.support.service.servers import RunningServer, farstep, running_server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = json.loads((EXAMPLES / "digits.ipynb").read_text())
LIMIT_S = 100.0


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server for the examples that are sent to one."""
    with running_server() as running:
        yield running


def run(program: Path, directory: Path, **environment: str) -> str:
    """Run a program of Python in an empty directory and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def version_of(server: RunningServer, session: str) -> int:
    """Return how many steps a session has taken."""
    return int(httpx.get(f"{server.url}/v1/sessions/{session}", trust_env=False).raise_for_status().json()["version"])


def number(pattern: str, text: str) -> float:
    """Return the number that follows, the only one of its kind."""
    (found,) = re.findall(rf"{pattern} (\d+(?:\.\d+)?)", text)
    return float(found)


def test_the_script_trains_on_a_server(server: RunningServer, tmp_path: Path) -> None:
    """The single script recognises the digits, and each of its steps was the session's."""
    printed = run(EXAMPLES / "digits.py", tmp_path, FARSTEP_SERVER=server.url, FARSTEP_SESSION="script")
    assert number("accuracy", printed) > 0.95
    assert number("after", printed) == version_of(server, "script") == 20 * 23  # epochs, and batches in each
    assert printed.splitlines()[-1].endswith(f"the optimizer was in {server.url}")


def test_the_workers_train_together_and_alone(tmp_path: Path) -> None:
    """The script for several workers runs launched or alone, embedded then, and recognises the digits."""
    script = EXAMPLES / "digits_workers.py"
    launched = farstep("launch", "-n", "2", str(script))
    assert launched.returncode == 0, launched.stderr
    for (line,), count in ((said(launched.stdout, "w0"), 2), (run(script, tmp_path).splitlines(), 1)):
        assert re.match(rf"\S+ of {count}, after 0 restarts: ", line), line
        assert number("accuracy", line) > 0.85
    assert said(launched.stdout, "w1") == []


def test_lightning_trains_on_a_server(server: RunningServer, tmp_path: Path) -> None:
    """Lightning's trainer steps the session, and leaves no file behind."""
    environment = {"FARSTEP_SERVER": server.url, "FARSTEP_SESSION": "lightning"}
    printed = run(EXAMPLES / "digits_lightning.py", tmp_path, **environment).splitlines()[-1]
    assert number("accuracy", printed) > 0.9
    assert number("after", printed) == version_of(server, "lightning") > 100
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_goes_on_after_its_kernel_was_restarted(server: RunningServer, tmp_path: Path) -> None:
    """All cells, run in one fresh process after the other, go on in the same session, and learn."""
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(cells))
    for first in (0, 22):
        printed = run(script, tmp_path, FARSTEP_SERVER=server.url)
        assert f"session digits-notebook at version {first}\n" in printed
        assert number(r"loss [\d.]+ at version", printed) == first + 22 == version_of(server, "digits-notebook")
    accuracies = re.findall(r"^accuracy ([\d.]+)", printed, re.MULTILINE)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 0.7


def test_the_notebook_is_kept_without_what_it_printed() -> None:
    """The file has no outputs and no counts, so that running it changes nothing that a reader has to review."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names) > 0
    codes = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in codes] == [([], None)] * len(codes)


@pytest.mark.parametrize(
    ("page", "script"),
    [("docs/launch.md", "digits_workers.py"), ("docs/integrations.md", "digits_lightning.py")],
)
def test_a_page_shows_a_script_as_it_is(page: str, script: str) -> None:
    """The page links to the script, and what it shows is the whole of it."""
    shown = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert (EXAMPLES / script).read_text() in shown
    assert f"[{script}](../examples/{script})" in (ROOT / page).read_text()


def test_the_list_of_examples_is_complete() -> None:
    """examples/README.md has a row for each example."""
    listed = re.findall(r"^\| \[(\S+)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
