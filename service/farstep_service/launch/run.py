"""One run: start a server, if none is named, and the workers; hand on what they say; obey the `RestartPolicy`.

The launch's own server listens at a socket in a directory that only its user may enter.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

from farstep.errors import InvalidOption
from farstep.protocol.unix import MAX_PATH_BYTES, url_of_path
from farstep.settings import resolve
from farstep_service.launch.children import Children, Ended, Event, Said, Signalled, children
from farstep_service.launch.plan import Plan
from farstep_service.launch.progress import EVERY_S, Asking
from farstep_service.launch.restart_policy import RestartPolicy, Start, Stop, in_words
from farstep_service.launch.terminal import Terminal

SERVER = "server"
PLACES = ("HOST", "PORT", "UNIX", "NO_TCP")
"""Variables of `farstep serve` that say where; this server is where its workers look for it."""


@contextmanager
def place_for_socket() -> Iterator[str]:
    """Yield a path for the socket; it is gone afterwards, with its directory."""
    with tempfile.TemporaryDirectory(prefix="farstep-", dir=_short_enough()) as directory:
        yield f"{directory}/s"


def _short_enough() -> str:
    """Return the usual directory for temporary files, or /tmp if paths in that are too long for a socket."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) + len("/farstep-12345678/s") <= MAX_PATH_BYTES else "/tmp"


def command_of(path: str) -> tuple[str, ...]:
    """Return the command of a server at a path and nowhere else."""
    serve = ("-m", "farstep_service", "serve", "--unix", path, "--no-tcp", "--log-level", "warning")
    return (sys.executable, "-P", *serve)


def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of that server: the user's, but for those that say where it is."""
    own = {f"FARSTEP_SERVE_{each}" for each in PLACES}
    return {name: value for name, value in inherited.items() if name not in own}


LAUNCH = "launch"
"""Under which name the launcher speaks."""
SERVER_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """State how a run went.

    Attributes:
        server: URL of the server; "" for the run's own, which is gone.
        session: its name.
        code: the exit code of the run.
        restarts, codes: of each worker, by name.
    """

    server: str
    session: str
    code: int
    restarts: Mapping[str, int]
    codes: Mapping[str, int]


def launch(plan: Plan, *, server: str | None, session: str | None, environment: Mapping[str, str]) -> Summary:
    """Run the workers of a plan to their end, and return how that went. Nobody of them is left.

    Args:
        plan: which workers.
        server: URL of the server; None for one of the run's own.
        session: its name; None for a fresh one.
        environment: what workers and server are told beside their own.

    Raises:
        InvalidOption: a URL or a name that cannot be, or several machines without a server and a session in common.
    """
    place = resolve({"server": server, "session": session}, environment={})
    if plan.nodes > 1 and (place.server is None or place.private):
        raise InvalidOption(
            f"Workers on {plan.nodes} machines need a server and a session that all of them name.",
            remedy="Add --server and --session.",
            field="session" if place.server else "server",
            side="client",
        )
    name = session or f"launch-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        path = None if place.server else stack.enter_context(place_for_socket())
        running = stack.enter_context(children("" if path is None else os.path.dirname(path)))
        run = _Run(plan, running, place.server or url_of_path(path or ""), name, environment)
        if path is not None:
            running.start(SERVER, command_of(path), environment_of(environment))
        return run.to_the_end(own=path is not None)


@final
class _Run:
    """A run under way."""

    def __init__(
        self, plan: Plan, running: Children, server: str, session: str, environment: Mapping[str, str]
    ) -> None:
        self._plan = plan
        self._running = running
        self._place = (server, session)
        self._environment = environment
        self._locals = {plan.name(local): local for local in range(plan.workers)}
        self._course = RestartPolicy(list(self._locals), plan.max_restarts)
        self._terminal = Terminal([*self._locals, LAUNCH, SERVER])
        self._kill_at = float("inf")

    def to_the_end(self, *, own: bool) -> Summary:
        """Run until nobody runs any more."""
        server, session = self._place
        self._say(f"{self._plan.workers} of {self._plan.world} workers, session {session} at {server}")
        for worker in self._locals:
            self._start(worker, 0)
        with self._asking() as asking:
            while not self._course.over:
                for event in self._running.wait(self._patience_s()):
                    self._take(event)
                if time.monotonic() >= self._kill_at:
                    self._kill()
                if asking is not None:
                    self._terminal.progress(asking.text(self._course))
        self._terminal.progress("")
        if own:
            self._end_server()
        course = self._course
        return Summary(
            server="" if own else server,
            session=session,
            code=course.failure,
            restarts=course.restarts,
            codes=course.codes,
        )

    @contextmanager
    def _asking(self) -> Iterator[Asking | None]:
        if not self._terminal.live:
            yield None
            return
        asking = Asking(*self._place, self._environment.get("FARSTEP_TOKEN"))
        asking.start()
        try:
            yield asking
        finally:
            asking.stop()

    def _patience_s(self) -> float | None:
        """Return how long nothing may happen until something has to be done."""
        left_s = max(0.0, self._kill_at - time.monotonic())
        if self._terminal.live:
            return min(left_s, EVERY_S)
        return left_s if left_s < float("inf") else None

    def _take(self, event: Event) -> None:
        course = self._course
        if isinstance(event, Said):
            if event.process != SERVER or event.stream == "stderr":
                self._terminal.line(event.process, event.stream, event.line)
        elif isinstance(event, Signalled):
            handed_on = course.signalled(event.number)
            verb = "goes to" if handed_on.number == event.number else "kills"
            self._say(f"got {event.number.name}, which {verb} all workers")
            self._do(handed_on)
        elif event.process == SERVER:
            if (stop := course.server_ended()) is not None:
                self._say(f"the server {in_words(event.code)}; its sessions are gone, so all workers are ended")
                self._do(stop)
        else:
            self._follow(event, course.ended(event.process, event.code))

    def _follow(self, event: Ended, decided: Start | Stop | None) -> None:
        how, limit = f"{event.process} {in_words(event.code)}", self._plan.max_restarts
        if isinstance(decided, Start):
            self._say(f"{how}; restart {decided.restarts} of {limit}")
            self._start(decided.worker, decided.restarts)
        elif decided is not None:
            self._say(f"{how}, after {limit} restart{'' if limit == 1 else 's'}; all others are ended")
            self._do(decided)
        elif event.code:
            self._say(how)

    def _start(self, worker: str, restarts: int) -> None:
        local = self._locals[worker]
        environment = self._plan.environment(local, restarts, *self._place, self._environment)
        self._running.start(worker, self._plan.command, environment)

    def _do(self, stop: Stop) -> None:
        for worker in self._course.running:
            self._running.signal(worker, stop.number)
        self._kill_at = min(self._kill_at, time.monotonic() + self._plan.stop_s)

    def _kill(self) -> None:
        names = ", ".join(sorted(self._course.running))
        if names:
            self._say(f"{names}: still there after {self._plan.stop_s:g} s, killed")
        for worker in self._course.running:
            self._running.signal(worker, signal.SIGKILL)
        self._kill_at = float("inf")

    def _end_server(self) -> None:
        """Let the server end by itself, or not."""
        self._running.signal(SERVER, signal.SIGTERM)
        give_up = time.monotonic() + SERVER_STOP_S
        while SERVER in self._running.running and (left_s := give_up - time.monotonic()) > 0:
            for event in self._running.wait(left_s):
                if isinstance(event, Said) and event.stream == "stderr":
                    self._terminal.line(event.process, event.stream, event.line)

    def _say(self, text: str) -> None:
        self._terminal.line(LAUNCH, "stderr", text.encode())
