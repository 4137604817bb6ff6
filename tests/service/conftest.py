"""What the tests of the service share: a server in a process of its own, one for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.service.raw import RawClient
from tests.support.service.servers import RunningServer, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server on loopback, without a token."""
    with running_server(loaded=True) as running:
        yield running


@pytest.fixture(scope="module")
def raw(server: RunningServer) -> Iterator[RawClient]:
    """Speak the protocol by hand with the server of this file."""
    with RawClient(server.url) as client:
        yield client
