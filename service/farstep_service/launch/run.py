"""One run: start a server, if the user names none, and the workers; pass on their lines; obey the `RestartPolicy`."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import final

from farstep.errors import invalid_option
from farstep.protocol.unix import url_of_path
from farstep.settings import resolve
from farstep_service.launch.children import Children, Event, LineWritten, ProcessExited, SignalReceived, children
from farstep_service.launch.own_server import SERVER, command_at_socket, environment_of, socket_path
from farstep_service.launch.plan import LaunchPlan
from farstep_service.launch.progress import EVERY_S, polling
from farstep_service.launch.restart_policy import Restart, RestartPolicy, Stop, in_words
from farstep_service.launch.terminal import Terminal

LAUNCH = "launch"
"""The name before the launcher's own lines."""
SERVER_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Record how a run went.

    Attributes:
        server: URL of the server; "" for the run's own, which has ended.
        session: its name.
        code: the exit code of the run.
        restarts, codes: of each worker, by name.
    """

    server: str
    session: str
    code: int
    restarts: Mapping[str, int]
    codes: Mapping[str, int]


def launch(plan: LaunchPlan, *, server: str | None, session: str | None, environment: Mapping[str, str]) -> Summary:
    """Run the workers of a plan until all have ended, and return how the run went. No process is left.

    Args:
        plan: which workers.
        server: URL of the server; None for one of the run's own.
        session: its name; None for a fresh one.
        environment: variables of the workers and the server, beside the run's own.

    Raises:
        InvalidOption: an invalid URL or name, or several machines without a common server and session.
    """
    given = resolve({"server": server, "session": session}, environment={})
    if plan.nodes > 1 and (given.server is None or given.private):
        raise invalid_option(
            f"Workers on {plan.nodes} machines need a server and a session that all of them name.",
            remedy="Add --server and --session.",
            field="session" if given.server else "server",
        )
    name = session or f"launch-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        path = None if given.server else stack.enter_context(socket_path())
        processes = stack.enter_context(children("" if path is None else os.path.dirname(path)))
        run = _Run(plan, processes, given.server or url_of_path(path or ""), name, environment)
        if path is not None:
            processes.start(SERVER, command_at_socket(path), environment_of(environment))
        return run.to_the_end(own_server=path is not None)


@final
class _Run:
    """A run under way."""

    def __init__(
        self, plan: LaunchPlan, processes: Children, server: str, session: str, environment: Mapping[str, str]
    ) -> None:
        self._plan = plan
        self._processes = processes
        self._server = server
        self._session = session
        self._environment = environment
        self._local_ranks = {plan.name(local): local for local in range(plan.workers)}
        self._policy = RestartPolicy(list(self._local_ranks), plan.max_restarts)
        self._terminal = Terminal([*self._local_ranks, LAUNCH, SERVER])
        self._kill_at = float("inf")

    def to_the_end(self, *, own_server: bool) -> Summary:
        """Run until all workers have ended."""
        self._say(f"{self._plan.workers} of {self._plan.world} workers, session {self._session} at {self._server}")
        for worker in self._local_ranks:
            self._start(worker, 0)
        try:
            if self._terminal.live:
                with polling(self._server, self._session, self._environment.get("FARSTEP_TOKEN")) as poller:
                    while not self._policy.over:
                        self._turn()
                        self._terminal.progress(poller.text(self._policy))
            else:
                while not self._policy.over:
                    self._turn()
        finally:
            self._terminal.progress("")
        if own_server:
            for event in self._processes.stop(SERVER, within_s=SERVER_STOP_S):
                self._take(event)
        policy = self._policy
        return Summary(
            server="" if own_server else self._server,
            session=self._session,
            code=policy.failure,
            restarts=policy.restarts,
            codes=policy.codes,
        )

    def _turn(self) -> None:
        """Wait for events and act on them; kill the workers when their time to end is up."""
        for event in self._processes.wait(self._timeout_s()):
            self._take(event)
        if time.monotonic() >= self._kill_at:
            self._kill()

    def _timeout_s(self) -> float | None:
        """Return how long to wait for an event: until the kill, and until the next line of progress."""
        left_s = max(0.0, self._kill_at - time.monotonic())
        if self._terminal.live:
            return min(left_s, EVERY_S)
        return left_s if left_s < float("inf") else None

    def _take(self, event: Event) -> None:
        policy = self._policy
        if isinstance(event, LineWritten):
            if event.process != SERVER or event.stream == "stderr":
                self._terminal.line(event.process, event.stream, event.line)
        elif isinstance(event, SignalReceived):
            stop = policy.signalled(event.number)
            verb = "goes to" if stop.number == event.number else "kills"
            self._say(f"got {event.number.name}, which {verb} all workers")
            self._stop(stop)
        elif event.process == SERVER:
            if not policy.over and (lost := policy.server_ended()) is not None:
                self._say(f"the server {in_words(event.code)}; its sessions are gone, so all workers are ended")
                self._stop(lost)
        else:
            self._follow(event, policy.ended(event.process, event.code))

    def _follow(self, exited: ProcessExited, decision: Restart | Stop | None) -> None:
        how, limit = f"{exited.process} {in_words(exited.code)}", self._plan.max_restarts
        if isinstance(decision, Restart):
            self._say(f"{how}; restart {decision.restarts} of {limit}")
            self._start(decision.worker, decision.restarts)
        elif decision is not None:
            self._say(f"{how}, after {limit} restart{'' if limit == 1 else 's'}; all others are ended")
            self._stop(decision)
        elif exited.code:
            self._say(how)

    def _start(self, worker: str, restarts: int) -> None:
        local = self._local_ranks[worker]
        environment = self._plan.environment(local, restarts, self._server, self._session, self._environment)
        self._processes.start(worker, self._plan.command, environment)

    def _stop(self, stop: Stop) -> None:
        for worker in self._policy.running:
            self._processes.signal(worker, stop.number)
        self._kill_at = min(self._kill_at, time.monotonic() + self._plan.stop_s)

    def _kill(self) -> None:
        names = ", ".join(sorted(self._policy.running))
        if names:
            self._say(f"{names}: still there after {self._plan.stop_s:g} s, killed")
        for worker in self._policy.running:
            self._processes.signal(worker, signal.SIGKILL)
        self._kill_at = float("inf")

    def _say(self, text: str) -> None:
        self._terminal.line(LAUNCH, "stderr", text.encode())
