"""The examples of docs/integrations.md, run as they stand against a server of our own instead of the one they name.

Lightning's is a script, which `tests/examples` runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integrations import test_dcp
from tests.support.service.servers import RunningServer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
FOUND = list(re.finditer(r"^```python\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL))
BEGINNING, SCRIPT, *EXAMPLES = (each[1] for each in FOUND)
TITLES = [re.findall(r"^## (.+)$", DOCUMENT[: each.start()], flags=re.MULTILINE)[-1] for each in FOUND[1:]]

pytestmark = [test_dcp.pytestmark]


def test_there_is_an_example_of_each_caller() -> None:
    """The document shows the callers that need more than an optimizer in their place."""
    assert TITLES == [
        "PyTorch Lightning",
        "Hugging Face Accelerate",
        "Hugging Face Trainer",
        "torch.distributed.checkpoint",
        "GradScaler",
    ]
    assert "import lightning\n" in SCRIPT


@pytest.mark.parametrize("example", EXAMPLES, ids=TITLES[1:])
def test_an_example_trains(
    example: str, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and while its objects live there is a session more, which has taken steps."""
    monkeypatch.chdir(tmp_path)
    before = {each["name"] for each in sessions(server)}
    names: dict[str, Any] = {"__name__": "example"}
    for code in (BEGINNING, example):
        assert "SERVER" in code
        exec(re.sub(r'SERVER = "[^"]+"', f'SERVER = "{server.url}"', code), names)
    (own,) = [each for each in sessions(server) if each["name"] not in before]
    assert own["version"] > 0


def sessions(server: RunningServer) -> list[dict[str, Any]]:
    """Return what the server says about its sessions."""
    listed: list[dict[str, Any]] = httpx.get(f"{server.url}/v1/sessions", trust_env=False).json()
    return listed
