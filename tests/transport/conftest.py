"""Servers on real sockets: a scripted one for what a good server never does, and uvicorn for what it does."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator

import httpx
import pytest
import trustme

from farstep.transport import SocketTransport
from tests.support.transport.scripted import PATIENCE_S, Script, Stage
from tests.support.transport.wellbehaved import running


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    """Start servers that play a script for each connection; a script's own failure fails the test."""
    stages: list[Stage] = []

    def start(*scripts: Script, context: ssl.SSLContext | None = None) -> Stage:
        stages.append(Stage(scripts, context))
        return stages[-1]

    yield start
    for each in stages:
        each.end()


@pytest.fixture
def transport() -> Iterator[SocketTransport]:
    with SocketTransport() as made:
        yield made


@pytest.fixture
def client(transport: SocketTransport) -> Iterator[httpx.Client]:
    with httpx.Client(transport=transport, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture(scope="module")
def uvicorn_url() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def certificate(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("127.0.0.1", "localhost")


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """What a client is configured with that trusts the test's authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context
