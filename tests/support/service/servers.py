"""Real server processes for tests and benchmarks: started, watched, killed, started again.

    with running_server(token=TOKEN) as server:
        ...                      # server.url answers
        server.kill()            # SIGKILL: what a power cut would leave
        server.restart()         # the same options on the same port

With `loaded=True` the process does not begin with an interpreter that imports torch, but is forked from one that has
(`tests/support/loaded.py`): a tenth of a second in place of several. Tests of how a server starts, of its memory or its
environment, and benchmarks, do without.

Nothing here sleeps. A server says on its standard output when it answers, and a process that ends wakes who waits.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import IO, Any

import httpx

from tests.support.loaded import LOADED, Forked

READY_WITHIN_S = 90.0
GONE_WITHIN_S = 30.0
TOKEN = "0123456789abcdef0123456789abcdef"  # long enough for a server, and no secret


def sessions_at(url: str, token: str | None = None) -> list[str]:
    """Return the names of all sessions of a server, from every page of its listing."""
    found: list[str] = []
    path, query = f"{url}/v1/sessions", ""
    with httpx.Client(trust_env=False, headers={} if token is None else {"authorization": f"Bearer {token}"}) as client:
        while True:
            page = client.get(path + query).raise_for_status()
            found += [each["name"] for each in page.json()]
            if "next" not in page.links:
                return found
            query = page.links["next"]["url"]


class RunningServer:
    """One `farstep serve` process, and those that follow it on its port.

    Args:
        arguments: options of `serve`, beside `--json` and `--port`.
        port: the port to ask for; None leaves it to the environment and the default.
        environment: the whole environment of the process.
        log: takes its standard error.
        loaded: whether it is forked from a process that has its modules.

    Attributes:
        said: the line of JSON with which it announced itself.
    """

    def __init__(
        self,
        arguments: tuple[str, ...],
        port: int | None,
        environment: Mapping[str, str],
        log: IO[bytes],
        *,
        loaded: bool = False,
    ) -> None:
        self._loaded = loaded
        self._arguments = arguments
        self._port = port
        self._environment = dict(environment)
        self._log = log
        self._start()

    @property
    def url(self) -> str:
        """Return where it is."""
        return str(self.said["url"])

    @property
    def port(self) -> int:
        """Return its TCP port."""
        return int(self.said["port"])

    @property
    def unix(self) -> str:
        """Return the URL of its socket, "" if it has none."""
        return str(self.said["unix"])

    @property
    def pid(self) -> int:
        """Return the process that serves now."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Return what it and its predecessors wrote to their standard error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self) -> int:
        """Ask it to end, as a container runtime does, and return its exit status; kill it if it does not."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(GONE_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close()
        return self.process.wait()

    def kill(self) -> None:
        """End it without a chance to do anything more."""
        self.process.kill()
        self.process.wait(GONE_WITHIN_S)
        self._close()

    def restart(self, variables: Mapping[str, str] | None = None) -> None:
        """End it if it runs, and start it anew with the same options on the same port.

        Args:
            variables: what its environment has beside that of its predecessors, for this start.
        """
        self.stop()
        self._port = self.port
        self._start(variables or {})

    def _start(self, variables: Mapping[str, str] = MappingProxyType({})) -> None:
        port = [] if self._port is None else ["--port", str(self._port)]
        environment = {**self._environment, **variables}
        self.process = self._begun(environment, "serve", "--json", *port, *self._arguments)
        try:
            self.said: dict[str, Any] = json.loads(self._first_line())
        except BaseException:
            self.kill()
            raise

    def _begun(self, environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[bytes] | Forked:
        if self._loaded:
            return forked(arguments, environment, self._log)
        return subprocess.Popen(
            [sys.executable, "-m", "farstep_service", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
        )

    def _first_line(self) -> bytes:
        assert self.process.stdout is not None
        output, until, line = self.process.stdout.fileno(), time.monotonic() + READY_WITHIN_S, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(output, 65536) if ready else b""
            if not chunk:
                what = "ended" if ready else f"said nothing for {READY_WITHIN_S:g} s"
                raise RuntimeError(f"The server {what}. It wrote:\n{self.log}")
            line += chunk
        return line

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


def forked(arguments: tuple[str, ...], environment: Mapping[str, str], log: IO[bytes]) -> Forked:
    """Fork a process of the command line whose standard output can be read."""
    output, theirs = os.pipe()
    try:
        with open(os.devnull, "rb") as nothing:
            process = LOADED.start(
                "farstep_service",
                arguments,
                environment,
                stdin=nothing.fileno(),
                stdout=theirs,
                stderr=log.fileno(),
            )
    finally:
        os.close(theirs)
    process.stdout = os.fdopen(output, "rb", buffering=0)
    return process


@contextmanager
def running_server(
    *arguments: str,
    token: str | None = None,
    port: int | None = 0,
    env: Mapping[str, str] | None = None,
    loaded: bool = False,
) -> Iterator[RunningServer]:
    """Run a server until the end of the block.

    Args:
        arguments: options of `farstep serve`.
        token: the token it accepts; none leaves it open, on loopback.
        port: 0 for any free one.
        env: further variables of its environment.
        loaded: whether it is forked from a process that has its modules.
    """
    environment = {**os.environ, **({"FARSTEP_TOKEN": token} if token else {}), **(env or {})}
    with tempfile.TemporaryFile() as log:
        server = RunningServer(arguments, port, environment, log, loaded=loaded)
        try:
            yield server
        finally:
            server.stop()


def farstep(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    answer: str = "",
    python: tuple[str, ...] = (),
    loaded: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end and return what it printed.

    Args:
        arguments: a verb and its options.
        env: further variables of its environment.
        answer: what it reads on its standard input.
        python: options of the interpreter.
        loaded: whether its process is forked from one that has its modules.
    """
    ours = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # of the terminal of the tests
    environment = {**ours, **(env or {})}
    if loaded:
        return _answered(arguments, environment, answer)
    return subprocess.run(
        [sys.executable, *python, "-m", "farstep_service", *arguments],
        env=environment,
        input=answer,
        capture_output=True,
        text=True,
        check=False,
        timeout=READY_WITHIN_S,
    )


def _answered(
    arguments: tuple[str, ...], environment: Mapping[str, str], answer: str
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(answer)
        given.seek(0)
        process = LOADED.start(
            "farstep_service",
            arguments,
            environment,
            stdin=given.fileno(),
            stdout=output.fileno(),
            stderr=errors.fileno(),
        )
        try:
            code = process.wait(READY_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        for stream in (output, errors):
            stream.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read().decode(), errors.read().decode())
