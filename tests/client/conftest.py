"""What the tests of the client share: one server process for all of them, and the two places an optimizer can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farstep.conversation import Conversation
from farstep.settings import RemoteOptions
from tests.support.client.carrying import UNEQUAL, Counting
from tests.support.client.overlapping import Both
from tests.support.client.twins import Twins, drawn
from tests.support.faults import Network, faulty
from tests.support.service.plain import plain_server
from tests.support.service.servers import RunningServer, running_server, sessions_at


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """Run a server on loopback, without a token; tests keep apart by their sessions' names."""
    with running_server(loaded=True) as running:
        yield running


@pytest.fixture(scope="session")
def plain() -> Iterator[str]:
    """Run the application on a server that is not ours, and say where."""
    with plain_server() as url:
        yield url


@pytest.fixture
def talk(server: RunningServer) -> Iterator[Conversation]:
    """Speak with that server beside any optimizer."""
    conversation = Conversation(server.url, None)
    yield conversation
    conversation.close()


@pytest.fixture(params=["embedded", "server"])
def place(request: pytest.FixtureRequest) -> RemoteOptions:
    """Name a place for a private session: in this process, or on the server."""
    if request.param == "embedded":
        return {"kernel": "reference"}
    running: RunningServer = request.getfixturevalue("server")
    return {"kernel": "reference", "server": running.url}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, as the server does: how a product is cut decides how it is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FRESH = itertools.count()


@pytest.fixture
def shared(server: RunningServer, talk: Conversation) -> Iterator[RemoteOptions]:
    """Name a session of our own on the server, and remove it afterwards."""
    name = f"shared-{next(FRESH)}"
    yield {"server": server.url, "session": name, "kernel": "reference"}
    if name in sessions_at(server.url):
        talk.control("DELETE", f"/v1/sessions/{name}")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Run what blocks beside the test."""
    with ThreadPoolExecutor(max_workers=8) as executor:
        yield executor


@pytest.fixture
def network(server: RunningServer) -> Iterator[Network]:
    """Put a network of our own in front of the server."""
    with faulty(server.port) as between:
        yield between


@pytest.fixture
def both(server: RunningServer) -> Iterator[Both]:
    both = Both(server.url)
    yield both
    both.ours.close()


@pytest.fixture
def transport() -> Counting:
    """Carry and count what an optimizer sends and receives."""
    return Counting()


@pytest.fixture
def counted(server: RunningServer, transport: Counting) -> Twins:
    """Return an Adamax on the server whose bytes are counted, and torch's, after two steps."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "transport": transport}
    twins = Twins("Adamax", {}, place, start=drawn(0, UNEQUAL))
    twins.train(2)
    return twins
