"""The memory of a server process, and messages that are sent without keeping what comes back."""

from __future__ import annotations

from pathlib import Path

import torch

from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, half_sent, read_head
from tests.support.service.raw import RawClient, payload_of
from tests.support.service.servers import RunningServer

MIB = 1 << 20
SLACK = 12 * MIB
"""What the interpreter and the allocator may take or keep beside tensors."""


class Process:
    """The memory of a server's process, counted from a moment on."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._base = self._resident()

    def _resident(self) -> int:
        """Return the bytes in memory."""
        rollup = Path(f"/proc/{self._server.pid}/smaps_rollup").read_text()
        fields = {line.split(":")[0]: line.split() for line in rollup.splitlines()[1:]}
        return 1024 * int(fields["Rss"][1])

    @property
    def taken(self) -> int:
        """Return the bytes taken since the beginning."""
        return self._resident() - self._base

    def settle(self, at_most: int) -> int:
        """Wait until no more than so many bytes are taken, for a while, and return what is."""
        with RawClient(self._server.url) as raw:
            for _ in range(2000):
                if self.taken <= at_most:
                    break
                raw.request("GET", "/healthz")  # what was let go of is given back in the server's next moments
        return self.taken


def sent(url: str, method: str, path: str, head: dict[str, object], tensors: tuple[torch.Tensor, ...]) -> int:
    """Send a message and return the status of the answer, whose body is read and forgotten."""
    pieces = encode(head, payload_of(tensors))
    size = sum(memoryview(each).nbytes for each in pieces)
    with half_sent(url, method, path, {"Content-Type": MSGPACK, "Content-Length": str(size)}, pieces) as sock:
        status, missing = read_head(sock)
        while missing > 0:
            missing -= len(sock.recv(MIB))
    return status
