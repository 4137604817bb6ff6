"""The ways to copy an optimizer."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  # what others do with an optimizer
from collections.abc import Callable
from typing import Any

import pytest

Copy = Callable[[Any], Any]


def pickled(thing: Any) -> Any:
    """Return what comes out of a pickle."""
    return pickle.loads(pickle.dumps(thing))


WAYS = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
