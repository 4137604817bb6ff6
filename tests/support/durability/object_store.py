"""A real object store in a process of its own: `moto_server`, which answers S3's requests over HTTP.

    with running_store() as store:
        ...                     # store.url is that of a bucket, store.environment tells a client where it is
        store.kill()            # what asks it from now on is refused at once

Its log goes to a file. Like the servers of tests it says when it answers, so nothing sleeps.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import httpx

READY_WITHIN_S: Final = 60.0
BUCKET: Final = "farstep"
REGION: Final = "us-east-1"
_SAYS: Final = re.compile(rb"Running on (http://[0-9.]+:(\d+))")


class ObjectStore:
    """A store that runs, with one bucket.

    Args:
        port: its port; 0 for any free one.

    Attributes:
        url: of the bucket, for `--archive`.
        environment: variables for those who use it.
    """

    def __init__(self, port: int = 0) -> None:
        self._http = httpx.Client(trust_env=False, timeout=READY_WITHIN_S)
        self.url = f"s3://{BUCKET}/sessions"
        self.port = port
        self.start()

    @property
    def environment(self) -> Mapping[str, str]:
        """Return what a client of the store has in its environment."""
        return {
            "AWS_ENDPOINT_URL": self._address,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "of-a-test",
            "AWS_SECRET_ACCESS_KEY": "of-a-test",
        }

    def start(self) -> None:
        """Start it, with an empty bucket, on the port it had before."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "MOTO_ALLOW_NONEXISTENT_REGION": "true"},
        )
        found = self._announced()
        self._address, self.port = found[1].decode(), int(found[2])
        self._http.put(f"{self._address}/{BUCKET}").raise_for_status()

    def kill(self) -> None:
        """End it at once; what it held is gone."""
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def close(self) -> None:
        """End it."""
        self.kill()
        self._http.close()

    def names(self) -> list[str]:
        """Return the names of all objects, below the path of the URL."""
        answer = self._http.get(f"{self._address}/{BUCKET}", params={"list-type": "2", "prefix": "sessions/"})
        return sorted(re.findall(r"<Key>sessions/([^<]+)</Key>", answer.raise_for_status().text))

    def read(self, name: str) -> bytes:
        """Return an object."""
        return self._http.get(f"{self._address}/{BUCKET}/sessions/{name}").raise_for_status().content

    def write(self, name: str, content: bytes) -> None:
        """Replace an object."""
        self._http.put(f"{self._address}/{BUCKET}/sessions/{name}", content=content).raise_for_status()

    def unfinished(self) -> str:
        """Return what the store says of uploads that have begun and not ended."""
        return self._http.get(f"{self._address}/{BUCKET}?uploads").raise_for_status().text

    def _announced(self) -> re.Match[bytes]:
        assert self._process.stderr is not None
        output, until, said = self._process.stderr.fileno(), time.monotonic() + READY_WITHIN_S, b""
        while (found := _SAYS.search(said)) is None:
            ready, _, _ = select.select([output], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(output, 65536) if ready else b""
            if not chunk:
                self.kill()
                raise RuntimeError(f"The object store did not start. It wrote:\n{said.decode(errors='replace')}")
            said += chunk
        return found


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """Run a store until the end of the block."""
    store = ObjectStore()
    try:
        yield store
    finally:
        store.close()
