"""The demo: train digits against a server, repeat it with `torch.optim`, and compare.

    server process ◄── HTTP ──► worker processes, each with its shard of the images       (remote)
    one process, torch.optim on the average of the same gradients                          (local)

Both start from the same parameters and see the same batches in the same order, and a sync session adds gradients in the
order of the workers. So the two must end at the same parameters, whatever the order in which pushes arrived.

This module is light: the server loads torch while the demo does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from farstep_service.demo.chaos import Chaos, data_directory
from farstep_service.demo.reports import Pace, Result
from farstep_service.launch.children import Children, children
from farstep_service.launch.own_server import SERVER, command_on_loopback
from farstep_service.machine import answered

if TYPE_CHECKING:
    from farstep_service.demo.display import Display
    from farstep_service.demo.training import Training

STOP_S = 2.0
"""How long the demo's processes get to end by themselves; none of them has anything to save."""
KEPT = frozenset({"FARSTEP_KERNEL_CACHE"})
"""The user's settings that the demo's processes take over: the demo's server is not the user's."""


def run(
    *,
    json_output: bool = False,
    workers: int = 2,
    epochs: int | None = None,
    optimizer: str = "Adagrad",
    disturbed: bool = False,
) -> int:
    """Run the demo and return its exit code: 0 when every target was met, 1 when not.

    Args:
        json_output: print one line of JSON and nothing else.
        workers: how many worker processes train.
        epochs: passes over the data; None for as many as the target needs.
        optimizer: a name of `farstep_service.demo.training.OPTIONS`.
        disturbed: kill the server in the middle of the training, and start it again.

    Raises:
        FarstepError: a process ended too early, an option is invalid, or scikit-learn is missing. No process is left.
    """
    began = time.monotonic()
    environment = environment_of(os.environ)
    with ExitStack() as stack:
        directory = stack.enter_context(data_directory()) if disturbed else ""
        started = stack.enter_context(processes())
        chaos = Chaos(started, directory, environment) if directory else None
        if chaos is None:
            started.start(SERVER, command_on_loopback(), environment)
        else:
            chaos.start()
        # What follows imports torch, while the server does.
        from farstep_service.demo.display import display
        from farstep_service.demo.training import EPOCHS, Training

        training = Training(workers=workers, epochs=EPOCHS if epochs is None else epochs, optimizer=optimizer)
        with display(silent=json_output) as shown:
            result = _compare(started, training, shown, began, chaos)
    print(result.to_json() if json_output else result, flush=True)
    return 0 if result.ok else 1


def _compare(started: Children, training: Training, shown: Display, began: float, chaos: Chaos | None = None) -> Result:
    from farstep_service.demo.digits import accuracy_of, largest_difference
    from farstep_service.demo.remote import RemoteRun
    from farstep_service.demo.training import train_locally

    run = RemoteRun(started, training, shown, environment_of(os.environ), chaos=chaos)
    run.to_the_end()
    remote = run.fetch()
    started.stop(SERVER, within_s=STOP_S)
    local = train_locally(training, lambda step, loss: shown.local(step, training.steps, loss))
    pace = Pace.of(run.last.values())
    return Result(
        accuracy_remote=accuracy_of(remote, training.test),
        accuracy_local=accuracy_of(local, training.test),
        max_parameter_difference=largest_difference(remote, local),
        steps=training.steps,
        workers=training.workers,
        steps_per_s=round(pace.steps_per_s, 1),
        mb_per_s=round(pace.mb_per_s, 1),
        seconds=round(time.monotonic() - began, 1),
        optimizer=training.optimizer,
        kernel="+".join(sorted({kernel for report in run.last.values() for kernel in report.kernels})),
        server_kills=None if chaos is None else chaos.kills,
        rejoins=run.rejoins,
    )


@contextmanager
def processes() -> Iterator[Children]:
    """Yield `Children`, and end those that still run on the way out, by SIGTERM first.

    SIGTERM and SIGHUP take this way out as Ctrl-C does, with the exit codes that shells give them.
    """
    with answered(_exit, signal.SIGTERM, signal.SIGHUP), children(signals=()) as started:
        try:
            yield started
        finally:
            with answered(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                started.stop(*started.running, within_s=STOP_S)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the demo's processes."""
    user = {name: value for name, value in inherited.items() if not name.startswith("FARSTEP_") or name in KEPT}
    return {**user, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
