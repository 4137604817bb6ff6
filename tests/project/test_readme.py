"""The README's code runs and prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+\.\d+|\d+")


@pytest.mark.promise("The first example of the README prints what the README shows.", area="launch")
def test_the_first_example_prints_what_the_readme_shows() -> None:
    """The embedded example, run as it stands, gives the printed lines; losses may differ in the last digits."""
    found = re.search(r"```python\n(import torch\nimport farstep\n.*?)```\n\n```\n(.*?)```", README, flags=re.S)
    assert found
    code, shown = found.groups()
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    ).stdout
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    numbers = [[float(each) for each in NUMBER.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=5e-4)
