"""The demo: train digits against a server, repeat it with `torch.optim`, and compare.

    server process ◄── HTTP ──► worker processes, each with its shard of the images       (remote)
    one process, torch.optim on the average of the same gradients                          (local)

Both start from the same parameters and see the same batches in the same order, and a sync session adds gradients in the
order of the workers; so the two must end at the same parameters, whatever the order in which pushes arrived.

The server process of the demo. This module is light: the server loads torch while the demo does.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from farstep.errors import FarstepError
from farstep_service.demo.processes import Processes, started
from farstep_service.demo.reports import Result

if TYPE_CHECKING:
    from farstep_service.demo.display import Display
    from farstep_service.demo.training import Training


def run(*, json_output: bool = False, workers: int = 2, epochs: int | None = None, optimizer: str = "Adagrad") -> int:
    """Run the demo and return its exit code: 0 when every target was met, 1 when not.

    Args:
        json_output: print one line of JSON and nothing else.
        workers: how many worker processes train.
        epochs: passes over the data; None for as many as the target needs.
        optimizer: a name of `farstep_service.demo.training.OPTIONS`.

    Raises:
        FarstepError: a process ended too early, an option cannot be, or scikit-learn is missing. No process is left.
    """
    began = time.monotonic()
    with started() as processes:
        server = start_server(processes)
        # What follows imports torch, while the server does.
        from farstep_service.demo.display import display
        from farstep_service.demo.training import EPOCHS, Training

        training = Training(workers=workers, epochs=EPOCHS if epochs is None else epochs, optimizer=optimizer)
        with display(silent=json_output) as shown:
            result = _compare(processes, server, training, shown, began)
    print(result.to_json() if json_output else result, flush=True)
    return 0 if result.ok else 1


def _compare(processes: Processes, server: int, training: Training, shown: Display, began: float) -> Result:
    from farstep_service.demo.digits import accuracy_of, largest_difference
    from farstep_service.demo.remote import check_agreement, fetch, follow, start_workers
    from farstep_service.demo.reports import Pace
    from farstep_service.demo.training import train_locally

    url = server_url(processes)
    shown.say(f"{len(training.train)} digits to train on, {len(training.test)} to test with, {training.optimizer}")
    shown.say(f"{SERVER} at {url} is process {server}")
    for name, pid in start_workers(processes, training, url).items():
        shown.say(f"{name} is process {pid}")
    last = follow(processes, training, shown.remote)
    remote = fetch(training, url)
    check_agreement(remote, last)
    processes.stop()
    local = train_locally(training, lambda step, loss: shown.local(step, training.steps, loss))
    pace = Pace.of(last.values())
    accuracies = accuracy_of(remote, training.test), accuracy_of(local, training.test)
    difference = largest_difference(remote, local)
    return Result(
        accuracy_remote=accuracies[0],
        accuracy_local=accuracies[1],
        max_parameter_difference=difference,
        steps=training.steps,
        workers=training.workers,
        steps_per_s=round(pace.steps_per_s, 1),
        mb_per_s=round(pace.mb_per_s, 1),
        seconds=round(time.monotonic() - began, 1),
        optimizer=training.optimizer,
        kernel="+".join(sorted({kernel for report in last.values() for kernel in report.kernels})),
    )


SERVER = "server"
START_S = 120.0
"""How long the server may take to listen: it imports torch."""


def start_server(processes: Processes, *, port: int = 0) -> int:
    """Start a server on loopback and return its process id; `server_url` waits until it listens."""
    serve = ("-m", "farstep_service", "serve", "--host", "127.0.0.1", "--port", str(port), "--json")
    return processes.start(SERVER, *serve)


def server_url(processes: Processes) -> str:
    """Return the URL of the server, when it listens.

    Raises:
        ProcessEnded: it did not start.
    """
    line = processes.line_of(SERVER, START_S)
    try:
        return str(json.loads(line)["url"])
    except (ValueError, TypeError, KeyError) as exc:
        raise FarstepError(f"The server's first line is not its address: {line:.200}", side="client") from exc
