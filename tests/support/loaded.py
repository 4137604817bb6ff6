"""Processes of Python modules that are forked from one that has torch and the server's code loaded.

Most of what a server takes to start, and a verb that needs torch, is the import of torch: seconds of a core, hundreds
of times in a run of the tests. A test that is not about the start of a process, or what is imported, takes one from
here. It is a process of its own all the same: with its own number, environment and streams, killed and
stopped like any other.

    this process ──socket──► the loaded process ──fork──► a keeper ──fork──► `python -m ...`
                 ◄─────────────── its number, then its exit code ──┘

The loaded process has one thread. It ends when the one that started it closes the socket, or ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
MODULES = (
    "torch",
    "torch._dynamo",
    "farstep.http_link",
    "farstep.optim",
    "farstep_service.app",
    "farstep_service.bench",
    "farstep_service.cli.bench",
    "farstep_service.cli.health",
    "farstep_service.cli.launch",
    "farstep_service.cli.sessions",
    "farstep_service.cli.warmup",
    "farstep_service.kernels.compiled_kernels",
    "farstep_service.server",
    "farstep_service.server.protocol",
    "httpx",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
)
MOST_BYTES = 1 << 20
READY_S = 60.0


class Forked:
    """One process; it is used as a `subprocess.Popen`.

    Args:
        status: where its number and then its exit code arrive.

    Attributes:
        stdout: what reads its standard output, for a caller that made a pipe of it.
        pid: its number.
        returncode: its exit code, None while it runs.
    """

    def __init__(self, status: int) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self.stdout: IO[bytes] | None = None
        self.returncode: int | None = None
        self.pid = int(self._line())

    def _line(self) -> bytes:
        if not (line := self._status.readline()):
            raise RuntimeError("the loaded process has ended")
        return line

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit code.

        Raises:
            TimeoutExpired: it has not ended within the time.
        """
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = int(self._line())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Loaded:
    """Hold the process that has everything loaded; it starts with the first that is asked for."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        path: str = "",
        stdin: int,
        stdout: int,
        stderr: int,
    ) -> Forked:
        """Fork a process that runs a module, as `python -m` does.

        Args:
            module: its name.
            arguments: what follows it on the command line.
            environment: the whole environment.
            path: where the module is, beside the usual places.
            stdin, stdout, stderr: descriptors of its streams.
        """
        message = json.dumps([module, *arguments, dict(environment), os.getcwd(), path]).encode()
        assert len(message) < MOST_BYTES
        ours, theirs = os.pipe()
        try:
            socket.send_fds(self._connected(), [message], [stdin, stdout, stderr, theirs])
        finally:
            os.close(theirs)
        return Forked(ours)

    def _connected(self) -> socket.socket:
        if self._socket is None or self._owner != os.getpid():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
            command = [sys.executable, "-m", "tests.support.loaded", str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            self._socket, self._owner = ours, os.getpid()
        return self._socket

    def end(self) -> None:
        """End the loaded process; those that were forked from it go on."""
        if self._socket is not None and self._process is not None and self._owner == os.getpid():
            self._socket.close()
            self._process.wait(30)
            self._socket = None


class Script:
    """A script in a process of its own, and lines to and from it."""

    def __init__(self, process: Forked, given: int, said: int) -> None:
        self.process = process
        self._given, self._said = os.fdopen(given, "w"), os.fdopen(said)

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        self._given.write(f"{line}\n")
        self._given.flush()

    def line(self, within_s: float = READY_S) -> str:
        """Return the next line of its standard output, for which it has so many seconds."""
        ready, _, _ = select.select([self._said], [], [], within_s)
        assert ready, f"it said nothing for {within_s:g} s"
        return self._said.readline().strip()

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self._given.close()
        self._said.close()


@contextmanager
def running_script(source: str, environment: Mapping[str, str]) -> Iterator[Script]:
    """Run a script in a loaded process until the end of the block; what it complains of is written where we write."""
    with tempfile.TemporaryDirectory(prefix="script_") as place:
        name = os.path.basename(place)
        (Path(place) / f"{name}.py").write_text(source)
        with running_module(name, (), environment, path=place) as script:
            yield script


@contextmanager
def running_module(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], *, path: str = ""
) -> Iterator[Script]:
    """Run a module, as `python -m` does, in a loaded process until the end of the block."""
    (given, to_it), (from_it, said) = os.pipe(), os.pipe()
    try:
        process = LOADED.start(module, arguments, environment, path=path, stdin=given, stdout=said, stderr=2)
    finally:
        os.close(given)
        os.close(said)
    script = Script(process, to_it, from_it)
    try:
        yield script
    finally:
        script.end()


LOADED = Loaded()
atexit.register(LOADED.end)


# -- in the loaded process


def _load() -> None:
    """Import what a server imports, as it does."""
    from farstep_service.server.process import tune_
    from farstep_service.settings import Settings

    gc.disable()
    tune_(os.environ, Settings().threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which begin when it is imported and would be lost in a fork
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def _fork(asked: socket.socket) -> list[str]:
    """Fork processes until no more are asked for; return what to run in those that are forked, and nothing in this."""
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: those of a fork would be lost"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's to wait for
    while True:
        message, descriptors, *_ = socket.recv_fds(asked, MOST_BYTES, 4)
        if not message:
            return []
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked.close()
            *command, environment, place, path = json.loads(message)
            _keep(*descriptors)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(place)
            sys.path[:0] = [path] if path else []
            return [*command]
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(stdin: int, stdout: int, stderr: int, status: int) -> None:
    """Fork the process itself, tell its number and its end, and return in it only."""
    if pid := os.fork():
        os.write(status, b"%d\n" % pid)
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a signal to the whole group is its process's to answer
        _, ended = os.waitpid(pid, 0)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
        os._exit(0)
    os.close(status)
    for place, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115


if __name__ == "__main__":
    _load()
    if command := _fork(socket.socket(fileno=int(sys.argv[1]))):
        sys.argv[1:] = command[1:]
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
