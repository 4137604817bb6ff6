"""The training with its optimizer in a server process: the server, the workers, their reports, and the parameters.

The processes are children of the demo, started and watched as those of `farstep launch` are:

    the server prints its address    the workers start
    a worker prints a report         the display shows it
    a worker exits                   it has finished; the run ends when all have
    the server exits, of chaos       it is started again on its directory, and the workers go on
    anything else exits              the run fails, with the last line that the process wrote to its standard error
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import final

from torch import nn

from farstep.errors import FarstepError
from farstep_service.demo.chaos import Chaos
from farstep_service.demo.digits import build_model, fingerprint_of
from farstep_service.demo.display import Display
from farstep_service.demo.reports import Pace, Report
from farstep_service.demo.trainer import GONE
from farstep_service.demo.training import SESSION, Training, remote_optimizer, worker_name
from farstep_service.launch.children import Children, Event, LineWritten, ProcessExited
from farstep_service.launch.own_server import SERVER, address_of
from farstep_service.launch.restart_policy import in_words

SILENCE_S = 120.0
"""How long all processes together may be silent."""


class ProcessEnded(FarstepError):
    """A process that others need has ended, or makes no progress."""

    code = "process_ended"


@final
class RemoteRun:
    """Run the workers of a training against a server that has been started.

    Args:
        processes: the server is one of them.
        training: what the workers train.
        display: shows processes and reports.
        environment: variables of the workers, beside those that lead to the session.
        silence_s: how long all processes together may be silent.
        chaos: kills the server and starts it again; None to leave it alone.

    Attributes:
        url: the server's address, "" until it listens.
        last: the last report of each worker, by name.
        rejoins: how often a worker found its session gone and joined again.
    """

    def __init__(
        self,
        processes: Children,
        training: Training,
        display: Display,
        environment: Mapping[str, str],
        *,
        silence_s: float = SILENCE_S,
        chaos: Chaos | None = None,
    ) -> None:
        self.url = ""
        self.last: dict[str, Report] = {}
        self.rejoins = 0
        self._processes = processes
        self._training = training
        self._display = display
        self._environment = environment
        self._silence_s = silence_s
        self._chaos = chaos
        self._left = {worker_name(index) for index in range(training.workers)}

    def to_the_end(self) -> None:
        """Show every report of the workers until all have finished.

        Raises:
            ProcessEnded: the server or a worker ended too early, or all are silent.
        """
        events = self._events()
        while self._left:
            event = next(events)
            if isinstance(event, LineWritten):
                if event.stream == "stdout":
                    self._take_line(event.process, event.line)
            elif isinstance(event, ProcessExited):
                self._take_exit(event)

    def start_workers(self, *, only: Collection[str] | None = None) -> dict[str, int]:
        """Start the workers, or some of them, and return their process ids by name."""
        training = self._training
        options = ["--workers", str(training.workers), "--epochs", str(training.epochs)]
        options += ["--optimizer", training.optimizer]
        command = (sys.executable, "-P", "-m", "farstep_service.demo.worker", "--json", *options)
        session = {"FARSTEP_SERVER": self.url, "FARSTEP_SESSION": SESSION}
        common = {**self._environment, **session, "OMP_NUM_THREADS": "1"}
        names = [name for name in map(worker_name, range(training.workers)) if only is None or name in only]
        return {name: self._processes.start(name, command, {**common, "FARSTEP_WORKER": name}) for name in names}

    def fetch(self) -> nn.Sequential:
        """Return the network with the session's parameters, read as any further worker would read them.

        Raises:
            FarstepError: the session is not complete, the server does not answer, or a worker has other parameters.
        """
        training = self._training
        model = build_model(training.seed + 1)  # unlike the initial ones, so that a parameter that is missing shows
        optimizer = remote_optimizer(training, model, {"server": self.url, "session": SESSION, "worker": "reader"})
        try:
            if optimizer.version != training.steps:
                raise FarstepError(
                    f"The session is at version {optimizer.version}, not {training.steps}.", side="client"
                )
        finally:
            optimizer.close()
        own = fingerprint_of(model)
        for name, report in self.last.items():
            if report.fingerprint != own:
                raise FarstepError(f"{name} ended with other parameters than the session's.", side="client")
        return model

    def _events(self) -> Iterator[Event]:
        """Yield events for ever.

        Raises:
            ProcessEnded: no process wrote or ended for too long.
        """
        heard = time.monotonic()
        while (left_s := heard + self._silence_s - time.monotonic()) > 0:
            for event in self._processes.wait(left_s):
                heard = time.monotonic()
                yield event
        names = ", ".join(sorted(self._processes.running))
        raise ProcessEnded(f"Nothing was heard from {names} for {self._silence_s:g} s.", side="client")

    def _take_line(self, process: str, line: bytes) -> None:
        if process != SERVER:
            report = Report.from_line(line.decode(errors="replace"))
            if report is not None:
                self._take_report(process, report)
        elif self.url:
            _, pid = address_of(line)
            self._display.say(f"{SERVER} is process {pid} now, and the workers go on")
        else:
            self.url, pid = address_of(line)
            train, test, optimizer = len(self._training.train), len(self._training.test), self._training.optimizer
            self._display.say(f"{train} digits to train on, {test} to test with, {optimizer}")
            self._display.say(f"{SERVER} at {self.url} is process {pid}")
            for name, number in self.start_workers().items():
                self._display.say(f"{name} is process {number}")

    def _take_report(self, worker: str, report: Report) -> None:
        self.last[worker] = report
        self.rejoins += report.note.startswith(GONE)
        self._display.remote(report, Pace.of(self.last.values()))
        if self._chaos is not None and self._chaos.strike(report):
            self._display.say(f"{SERVER} is killed with SIGKILL at version {report.version} of {report.steps}")

    def _take_exit(self, exited: ProcessExited) -> None:
        name = exited.process
        if name == SERVER and self._chaos is not None and self._chaos.take_exit(exited):
            self._display.say(f"{SERVER} {in_words(exited.code)}; it is started again on the same directory")
            self._chaos.start(self.url)
            return
        if name not in self._left or exited.code or name not in self.last or not self.last[name].fingerprint:
            raise failure_of(exited)
        self._left.remove(name)


def failure_of(exited: ProcessExited) -> ProcessEnded:
    """Return the error for a process that ended too early, with the last line of its standard error."""
    words = exited.last_error.rstrip(".")
    how = in_words(exited.code)
    return ProcessEnded(f"{exited.process} {how}{': ' + words if words else ''}.", side="client")
