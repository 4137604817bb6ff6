"""A small training that fails: steps that are not taken here, whatever became of them there."""

from __future__ import annotations

import pytest

from farstep.errors import Unavailable
from farstep.settings import RemoteOptions
from tests.support.client.twins import Twins, check_parameters, drawn

SHAPES = [(3, 4), (5,)]
SHORT_S = 1.0
"""Long enough for a busy machine to answer, short enough to wait for."""


def twins_at(url: str, **remote: object) -> Twins:
    """Return an Adagrad on a server and torch's, over two small parameters."""
    place: RemoteOptions = {"kernel": "reference", "server": url, **remote}  # type: ignore[typeddict-item]
    return Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, SHAPES))


def step(twins: Twins, seed: int) -> None:
    twins.step(drawn(seed, SHAPES))


def fail(twins: Twins, seed: int, kind: type[BaseException] = Unavailable) -> pytest.ExceptionInfo[BaseException]:
    """Let our step fail with nothing changed on this side; torch does not take it."""
    before = [p.detach().clone() for p in twins.here]
    version = twins.ours.version
    twins.give(drawn(seed, SHAPES))
    with pytest.raises(kind) as failed:
        twins.ours.step()
    check_parameters(twins.here, before)
    assert twins.ours.version == version
    return failed
