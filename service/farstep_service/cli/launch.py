"""`farstep launch`: run a training script as several workers of a session, as torchrun does.

`farstep demo`: train handwritten digits with the optimizer in a server process.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from farstep_service.cli.output import JsonOutput, print_json, reporting
from farstep_service.cli.serve import check_variables

SETTINGS = {"allow_interspersed_args": False}
"""Arguments after the script are the script's own."""
BROKEN_PIPE = 141
"""The exit code of a program when the reader of its output has ended, as shells give it."""


def launch(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="The program of each worker.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Its arguments.")] = None,
    nproc_per_node: Annotated[
        int,
        typer.Option("-n", "--nproc-per-node", "--nproc_per_node", metavar="N", min=1, help="Workers on this machine."),
    ] = 1,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            "--max_restarts",
            "--restarts",
            metavar="N",
            min=0,
            help="How often each worker that failed is restarted.",
        ),
    ] = 3,
    server: Annotated[
        str | None,
        typer.Option(envvar="FARSTEP_SERVER", metavar="URL", help="The server; by default the launch starts one."),
    ] = None,
    session: Annotated[
        str | None, typer.Option(envvar="FARSTEP_SESSION", metavar="NAME", help="The session; a fresh one by default.")
    ] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module, as with python -m.")] = False,
    no_python: Annotated[
        bool, typer.Option("--no-python", "--no_python", help="SCRIPT is a program, not Python code.")
    ] = False,
    nnodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines, each with N workers.")] = 1,
    node_rank: Annotated[
        int, typer.Option("--node-rank", "--node_rank", metavar="N", min=0, help="Number of this machine, from 0.")
    ] = 0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            "--shutdown-timeout",
            "--shutdown_timeout",
            metavar="S",
            min=0,
            help="Seconds to end after a signal.",
        ),
    ] = 30.0,
    json_output: JsonOutput = False,
) -> None:
    """Start N workers, and restart those that fail. Options come before SCRIPT, its own arguments after it.

    Each worker gets FARSTEP_SERVER, FARSTEP_SESSION and FARSTEP_WORKER, and torchrun's RANK, WORLD_SIZE and LOCAL_RANK.

    Exits with 0 when all have finished, else with the exit code of the first that failed for good.
    """
    with reporting(json_output):
        check_variables(os.environ)
        from farstep_service.launch import LaunchPlan
        from farstep_service.launch import launch as run
        from farstep_service.launch.plan import command_of

        plan = LaunchPlan(
            command=command_of(script, arguments or [], module=module, python=not no_python),
            workers=nproc_per_node,
            nodes=nnodes,
            node=node_rank,
            max_restarts=max_restarts,
            stop_s=shutdown_timeout,
        )
        try:
            summary = run(plan, server=server, session=session, environment=os.environ)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more when it exits
            raise typer.Exit(BROKEN_PIPE) from None
        if json_output:
            print_json(asdict(summary))
        raise typer.Exit(summary.code)


def demo(
    json_output: JsonOutput = False,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Worker processes.")] = 2,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Passes over the data; enough to learn the digits by default."),
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="The optimizer.")] = "Adagrad",
    chaos: Annotated[
        bool, typer.Option("--chaos", help="Kill the server in the middle with SIGKILL, and start it again.")
    ] = False,
) -> None:
    """Train on handwritten digits with the optimizer in a server process, and compare with torch.optim."""
    with reporting(json_output):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
        from farstep_service.demo import run

        raise typer.Exit(
            run(json_output=json_output, workers=workers, epochs=epochs, optimizer=optimizer, disturbed=chaos)
        )
