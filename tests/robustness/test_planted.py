"""The suite can fail: bugs that are planted in the code, one by one, are each caught by the test that is named."""

from __future__ import annotations

import json
import os

import pytest

from tests.robustness.planted import BUGS
from tests.support.loaded import running_module


@pytest.mark.promise(
    "Sixteen bugs of the kind that lose steps, planted one by one, are each caught by a named test.", area="durability"
)
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    """The bug is at work, and the test that is named beside it fails."""
    with running_module("tests.robustness.planted", name.split(), os.environ) as planted:
        said = json.loads(planted.line())
    assert said["at_work"], said
    assert said["broken"] == "", said
    assert said["code"] == pytest.ExitCode.TESTS_FAILED, said


def test_there_are_as_many_as_promised() -> None:
    """No bug is left out of the table."""
    assert len(BUGS) == 16
