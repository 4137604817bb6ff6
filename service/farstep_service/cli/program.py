"""The verbs of `farstep`, collected.

A verb imports what it needs when it runs: torch, FastAPI and uvicorn are not loaded for `--help` or for a question to a
server. Each has `--json`, which prints one line of JSON on the standard output, also for an error.

    exit code   0  done
                1  it did not work out: no answer, no such session, no compiler
                2  refused: an option that cannot be, a token that is wrong
"""

from __future__ import annotations

from typing import Annotated

import typer

from farstep import __version__
from farstep_service.cli.bench import bench
from farstep_service.cli.health import healthcheck, status
from farstep_service.cli.launch import SETTINGS, demo, launch
from farstep_service.cli.serve import serve
from farstep_service.cli.sessions import sessions
from farstep_service.cli.warmup import warmup

program = typer.Typer(
    name="farstep",
    help="An optimizer as a service: train as usual, while optimizer state and update steps live on a server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    """Print the version and leave, if it was asked for."""
    if asked:
        typer.echo(f"farstep {__version__}")
        raise typer.Exit


@program.callback()
def farstep(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that come before the verb."""


for verb in (serve, demo, status, healthcheck, warmup, bench):
    program.command()(verb)
program.command(context_settings=SETTINGS)(launch)
program.add_typer(sessions, name="sessions")
