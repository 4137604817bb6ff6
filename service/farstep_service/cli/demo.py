"""`farstep demo`: watch a training whose optimizer lives in a server process."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from farstep_service.cli.output import JsonOutput, reporting


def demo(
    json_output: JsonOutput = False,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Worker processes.")] = 2,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Passes over the data; enough of them otherwise.")
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="Which optimizer.")] = "Adagrad",
) -> None:
    """Train on handwritten digits with the optimizer in a server process, and compare with torch.optim."""
    with reporting(json_output):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
        from farstep_service.demo import run

        raise typer.Exit(run(json_output=json_output, workers=workers, epochs=epochs, optimizer=optimizer))
