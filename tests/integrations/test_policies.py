"""The examples of docs/policies.md, run as they stand against a server of our own instead of the one they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from farstep.protocol.policies import unregister
from tests.support.service.servers import RunningServer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
FIRST, SCALED, OWN = re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


def test_the_examples_run(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Every second push makes a step, which says the norm; the average is evaluated; a scaled training steps."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(re.sub(r'SERVER = "[^"]+"', f'SERVER = "{server.url}"', FIRST), names)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:4]] == [["0", "False"], ["1", "True"], ["1", "False"], ["2", "True"]]
    assert said[0].split()[2:] == ["accumulated", "None"]
    assert float(said[1].split()[-1]) > 0
    assert said[4].startswith("tensor(")
    exec(SCALED, names)
    assert names["optimizer"].version == 4


def test_the_example_of_a_policy_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that is written into a script is an argument there, and does what it says."""
    names: dict[str, Any] = {"__name__": "example"}
    try:
        exec(compile(OWN, "docs/policies.md", "exec", dont_inherit=True), names)
    finally:
        unregister(names["Shrink"])
    assert "0.5000, 0.5000, 0.5000" in capsys.readouterr().out
