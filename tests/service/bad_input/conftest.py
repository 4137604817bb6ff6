"""What the tests of bad input share: a worker and a session that bad requests are about, and a look after each."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from tests.support.service.bad_input.refusing import INTERNAL, PARAMETERS
from tests.support.service.raw import RawClient, RawWorker, gradient
from tests.support.service.servers import RunningServer


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


@pytest.fixture(scope="module")
def standing(raw: RawClient) -> RawWorker:
    """Return the worker of a session that stays as it is."""
    return raw.begun("standing", groups=[{"lr": 0.1}, {"lr": 0.2}])[0]


def seen(raw: RawClient) -> str:
    """Return what the server says of all sessions, but for how long leases still run, which is a matter of time."""
    pages = raw.request("GET", "/v1/sessions").document
    for worker in (worker for page in pages for worker in page["workers"].values()):
        del worker["lease_s"]
    return json.dumps(pages)


@pytest.fixture
def unchanged(raw: RawClient, standing: RawWorker, server: RunningServer) -> Iterator[None]:
    """Check after a test that sessions are as they were, and that nothing went wrong inside."""
    before, log = seen(raw), len(server.log)
    yield
    assert seen(raw) == before
    assert not any(word in server.log[log:] for word in INTERNAL), server.log[log:]
