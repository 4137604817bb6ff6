"""What the tests of histories share: a server with a data directory, one for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.service.raw import RawClient
from tests.support.service.servers import RunningServer, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server that keeps sessions in a journal."""
    with running_server("--data-dir", str(tmp_path_factory.mktemp("data")), loaded=True) as running:
        yield running


@pytest.fixture(scope="module")
def raw(server: RunningServer) -> Iterator[RawClient]:
    """Speak the protocol by hand with it."""
    with RawClient(server.url) as client:
        yield client
