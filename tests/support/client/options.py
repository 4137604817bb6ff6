"""Which optimizers there are, with which options and groups the tests try them."""

from __future__ import annotations

import inspect

import pytest
from torch import Tensor

from tests.parity.cases import STEPPED, usual_options
from tests.support.client.twins import Group, theirs

NAMES = list(STEPPED)
"""The optimizers there are."""
REAL = ("Adafactor", "Muon", "SparseAdam")
"""Those that take no complex parameters."""


def has(name: str, option: str) -> bool:
    """Return whether torch's class takes an option."""
    return option in inspect.signature(theirs(name)).parameters


BY_OPTIONS = [
    pytest.param(name, options, id=f"{name}-{'-'.join(options) or 'defaults'}")
    for name in NAMES
    for options in usual_options(name)
]


def three_groups(ps: list[Tensor]) -> list[Group]:
    return [
        {"params": ps[:2], "lr": 0.3, "weight_decay": 0.1},
        {"params": ps[2:3]},
        {"params": ps[3:], "lr": 0.05, "maximize": True},
    ]
