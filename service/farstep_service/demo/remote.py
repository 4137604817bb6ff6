"""The training with the optimizer in a server process: the workers, their reports, and what they trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from farstep.errors import FarstepError
from farstep_service.demo.digits import build_model, fingerprint_of
from farstep_service.demo.processes import Line, Processes
from farstep_service.demo.reports import Pace, Report
from farstep_service.demo.training import SESSION, Training, remote_optimizer, worker_name

SILENCE_S = 120.0
"""How long nobody may say anything."""


def start_workers(
    processes: Processes, training: Training, url: str, *, only: Collection[str] | None = None
) -> dict[str, int]:
    """Start the workers, or only some of them, and return their process ids by name."""
    worker = ["-m", "farstep_service.demo.worker", "--json"]
    worker += ["--workers", str(training.workers), "--epochs", str(training.epochs), "--optimizer", training.optimizer]
    environment = {"FARSTEP_SERVER": url, "FARSTEP_SESSION": SESSION, "OMP_NUM_THREADS": "1"}
    return {
        name: processes.start(name, *worker, environment={**environment, "FARSTEP_WORKER": name})
        for name in map(worker_name, range(training.workers))
        if only is None or name in only
    }


def follow(processes: Processes, training: Training, show: Callable[[Report, Pace], None]) -> dict[str, Report]:
    """Show every report of the workers until all have finished, and return the last ones by name.

    Raises:
        ProcessEnded: the server or a worker ended too early, or nobody says anything any more.
    """
    last: dict[str, Report] = {}
    running = {worker_name(index) for index in range(training.workers)}
    while running:
        event = processes.next(SILENCE_S)
        if isinstance(event, Line):
            report = Report.from_line(event.text)
            if report is not None:
                last[event.process] = report
                show(report, Pace.of(last.values()))
        elif event.process in running and event.code == 0 and last[event.process].fingerprint:
            running.remove(event.process)
        else:
            raise processes.failure(event)
    return last


def fetch(training: Training, url: str) -> nn.Sequential:
    """Return the network with the parameters that the session holds, read as any further worker would read them.

    Raises:
        FarstepError: the session is not complete, or the server does not answer.
    """
    model = build_model(training.seed + 1)  # other parameters than those trained, so that all of them have to arrive
    optimizer = remote_optimizer(training, model, {"server": url, "session": SESSION, "worker": "reader"})
    try:
        if optimizer.version != training.steps:
            raise FarstepError(f"The session is at version {optimizer.version}, not {training.steps}.", side="client")
    finally:
        optimizer.close()
    return model


def check_agreement(model: nn.Module, last: Mapping[str, Report]) -> None:
    """Check that every worker ended with exactly the session's parameters.

    Raises:
        FarstepError: naming a worker that did not.
    """
    own = fingerprint_of(model)
    for name, report in last.items():
        if report.fingerprint != own:
            raise FarstepError(f"{name} ended with other parameters than the session's.", side="client")
