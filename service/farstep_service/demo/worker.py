"""One worker of the demo: `python -m farstep_service.demo.worker`, started by `farstep demo` and by docker compose.

    FARSTEP_SERVER   the server's URL                          FARSTEP_SESSION   the session, `digits` if not named
    FARSTEP_WORKER   this worker's name, ending in its number  FARSTEP_TOKEN     the server's token, if it asks for one

A worker's step is the session's version, and its batch is a pure function of that number. So a worker that joins late,
or again, continues at the session's version. A server with a data directory may be killed and started again: its
sessions come back. One without takes them along; then each worker still has its last checkpoint, and the first one to
come back recreates the session from it; the others join. From there all take the same steps again, and the training
ends as it would have without the restart.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

import torch

from farstep.errors import FarstepError, invalid_option
from farstep.settings import RemoteOptions
from farstep_service.demo.digits import build_model
from farstep_service.demo.reports import Report
from farstep_service.demo.trainer import REPORT_EVERY_S, Trainer
from farstep_service.demo.training import (
    EPOCHS,
    KERNEL,
    OPTIMIZER,
    SESSION,
    WORKERS,
    Training,
    remote_optimizer,
    worker_name,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one worker and return its exit code: 0 when the training is complete."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        options = _options(arguments)
        torch.set_num_threads(1)
        training = Training(workers=options.workers, epochs=options.epochs, optimizer=options.optimizer)
        name, index = _identity(options.worker, training.workers)
        model = build_model(training.seed)
        remote: RemoteOptions = {
            "server": options.server,
            "session": options.session,
            "worker": name,
            "kernel": options.kernel,
        }
        optimizer = remote_optimizer(training, model, remote)
        try:
            every_s = REPORT_EVERY_S if options.json else float("inf")
            Trainer(training, index, optimizer, model, _print_json if options.json else _print, every_s=every_s).run()
        finally:
            optimizer.close()
    except FarstepError as exc:
        print(f"{os.environ.get('FARSTEP_WORKER', 'worker')}  {exc}", file=sys.stderr, flush=True)
        return 1
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(
        prog="python -m farstep_service.demo.worker", description="Train a shard of the digits."
    )
    parser.add_argument("--server", default=environment("FARSTEP_SERVER"), help="URL of the server")
    parser.add_argument("--session", default=environment("FARSTEP_SESSION") or SESSION, help="the session to join")
    parser.add_argument(
        "--worker", default=environment("FARSTEP_WORKER") or worker_name(0), help="name that ends in a number"
    )
    parser.add_argument("--workers", type=int, default=environment("DEMO_WORKERS") or WORKERS, help="number of workers")
    parser.add_argument("--epochs", type=int, default=environment("DEMO_EPOCHS") or EPOCHS, help="passes over the data")
    parser.add_argument("--optimizer", default=environment("DEMO_OPTIMIZER") or OPTIMIZER, help="such as Adagrad")
    parser.add_argument("--kernel", default=environment("DEMO_KERNEL") or KERNEL, help="auto, reference or fused")
    parser.add_argument("--json", action="store_true", help="report in JSON, also within an epoch")
    options = parser.parse_args(arguments)
    if not options.server:
        parser.error("name the server: --server URL, or FARSTEP_SERVER")
    return options


def _identity(name: str, workers: int) -> tuple[str, int]:
    """Return a worker's name and its number, which is what its name ends with."""
    number = re.search(r"\d+$", name)
    if number is None or int(number[0]) >= workers:
        raise invalid_option(
            f"Invalid worker: {name!r}.",
            remedy=f"A worker's name ends in its number, 0 to {workers - 1}.",
            field="worker",
        )
    return name, int(number[0])


def _leave(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


def _print(report: Report) -> None:
    print(report, flush=True)


def _print_json(report: Report) -> None:
    print(report.to_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
