"""What the tests of bad input share: a worker that all bad requests are sent as, and a look at it after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.service.bad_input.refusing import INTERNAL, PARAMETERS
from tests.service.raw import RawClient, RawWorker, gradient
from tests.service.servers import RunningServer


@pytest.fixture(scope="module")
def session(raw: RawClient) -> RawWorker:
    """Return the one worker of a session that all of these bad requests are sent to."""
    return raw.begun("bad", parameters=PARAMETERS, groups=[{"lr": 0.1}])[0]


@pytest.fixture
def worker(session: RawWorker, server: RunningServer) -> Iterator[RawWorker]:
    """Check after a test that the version and parameters are what they were, and that a good push works."""
    before, log = session.pull(), len(server.log)
    yield session
    after = session.pull()
    assert after[0] == before[0]
    assert all(map(torch.equal, after[1], before[1]))
    assert session.push(gradient(session.last, PARAMETERS)).receipt["version"] == before[0] + 1
    assert not any(word in server.log[log:] for word in INTERNAL), server.log[log:]
