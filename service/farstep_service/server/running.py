"""Run one server in this process, from its settings to the last answer.

bind          port and path are taken and listened on: of two servers started at once, one is refused
threads       chosen before torch is loaded, which reads them from the environment once
load          torch and the application; a client that has connected meanwhile waits
serve         `announce` is called when requests are answered
leave         on SIGTERM or SIGINT: no new connections, pushes that wait for others are answered, GRACE_S for other
              requests in flight, then every session is closed

SIGHUP, from a closed terminal, is ignored: it would end all sessions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypedDict, cast

import uvicorn

from farstep.protocol.unix import url_of_path
from farstep_service.limits import CONNECTION
from farstep_service.server.descriptors import Evictable, accept
from farstep_service.server.process import (
    check_device,
    check_device_name,
    keep_freed_memory,
    kernels_at_hand,
    loaded_for_good,
    open_many_files,
    take_turns,
    tune_,
)
from farstep_service.server.socket_file import BACKLOG, bind, url_of
from farstep_service.server.socket_file import listening as listening_at
from farstep_service.settings import Settings

log = logging.getLogger("farstep.server")

GRACE_S = 8
"""Seconds for requests in flight; container runtimes send SIGKILL ten seconds after SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The facts about a started server.

    Attributes:
        url: its URL for a client on this machine.
        address: the address it listens on, "" without TCP.
        port: its TCP port, 0 without TCP.
        unix: the URL of its socket, "" without one.
        device: of the sessions.
        steps: the number of large steps that may run at once.
        threads: CPU threads within one step.
        kernels: the kernels of the first steps, in words.
    """

    url: str
    address: str
    port: int
    device: str
    steps: int
    threads: int
    kernels: str
    unix: str = ""


def run(settings: Settings, announce: Callable[[Listening], None], *, log_level: str = "info") -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in flight and return.

    Raises:
        InvalidOption: the address, the port, the path or the device is not available.
        SystemExit: a signal arrived while the server was loading.
    """
    server: uvicorn.Server | None = None

    def leave(_number: int, _frame: FrameType | None) -> None:
        if server is None:
            raise SystemExit(0)
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)  # uvicorn installs its own, and re-raises signals to these
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _stay)
    _log_to_stderr(log_level)
    check_device_name(settings.device)
    with _sockets(settings) as sockets:
        tune_(os.environ, settings.threads)
        keep_freed_memory()
        take_turns()
        if settings.data_dir:
            open_many_files()

        with loaded_for_good():
            check_device(settings.device)

            import torch

            from farstep_service.app import create_app
            from farstep_service.server.protocol import Protocol

            torch.set_grad_enabled(False)  # of this thread, which takes the small steps: nothing here is differentiated
            service = create_app(settings)

        listening = Listening(
            **_addresses(settings, sockets[0]),
            device=settings.device,
            steps=settings.threads,
            threads=torch.get_num_threads(),
            kernels=kernels_at_hand(settings.device),
        )
        config = uvicorn.Config(
            service,
            http=Protocol,
            interface="asgi3",
            lifespan="on",
            ws="none",
            workers=1,
            backlog=BACKLOG,
            timeout_keep_alive=int(CONNECTION.idle.within_s),
            timeout_graceful_shutdown=GRACE_S,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,
            log_config=None,
        )
        server = _Server(config, lambda: announce(listening), service.interrupt)
        server.run(sockets=sockets)


@contextmanager
def _sockets(settings: Settings) -> Iterator[list[socket.socket]]:
    """Yield the listening sockets, TCP first."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(bind(settings.host, settings.port))] if settings.tcp else []
        if settings.unix:
            sockets.append(stack.enter_context(listening_at(settings.unix)))
        yield sockets


def _addresses(settings: Settings, first: socket.socket) -> _Addresses:
    unix = url_of_path(settings.unix) if settings.unix else ""
    if not settings.tcp:
        return {"url": unix, "address": "", "port": 0, "unix": unix}
    address, port = first.getsockname()[:2]
    return {"url": url_of(first), "address": address, "port": port, "unix": unix}


class _Addresses(TypedDict):
    url: str
    address: str
    port: int
    unix: str


class _Server(uvicorn.Server):
    """A uvicorn server that calls `announce` when it answers requests, and `interrupt` before it stops."""

    def __init__(
        self, config: uvicorn.Config, announce: Callable[[], None], interrupt: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._accepting: list[asyncio.Task[None]] = []
        self._announce = announce
        self._interrupt = interrupt

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # requests cut off by a second Ctrl-C need no traceback
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # it would accept all pending connections at once

        def protocol() -> asyncio.Protocol:
            made: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
            return made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        connections = cast("set[Evictable]", self.server_state.connections)
        self._accepting = [asyncio.create_task(accept(sock, protocol, connections)) for sock in sockets or ()]
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._interrupt()
        finally:
            for each in self._accepting:
                each.cancel()
            await asyncio.gather(*self._accepting, return_exceptions=True)
            await super().shutdown(sockets=sockets)


def _stay(_number: int, _frame: FrameType | None) -> None:
    log.info("SIGHUP: the server goes on; SIGTERM ends it")


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("farstep").setLevel(level.upper())
    if level == "debug":
        logging.getLogger("uvicorn").setLevel(logging.INFO)
