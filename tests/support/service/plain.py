"""The application on a server that is not ours: uvicorn as it comes, in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from farstep_service.app import create_app
from farstep_service.settings import Settings

GONE_WITHIN_S = 30.0


@contextmanager
def plain_server(clock: Callable[[], float] = time.monotonic) -> Iterator[str]:
    """Run a server until the end of the block; yield its URL."""
    config = uvicorn.Config(create_app(Settings(), clock=clock), http="httptools", ws="none", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(GONE_WITHIN_S)
            assert not thread.is_alive()
