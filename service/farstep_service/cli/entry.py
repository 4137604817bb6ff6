"""The entry point of `farstep`, and its verbs.

A verb imports what it needs when it runs: torch, FastAPI and uvicorn are not loaded for `--help` or for a question to a
server. This module imports neither typer nor rich before `main` has set up signals, and can report that they are
missing. Each verb has `--json`, which prints one line of JSON on the standard output, also for an error.

    exit code   0  done
                1  failed: no answer, no such session, no compiler
                2  refused: an invalid option, a wrong token
"""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

SERVICE_ONLY = frozenset({"typer", "rich"})
"""Packages that the command line needs, and the client does not."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 refused."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # false for a background job
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # modules that are half loaded have nothing to clean up
    try:
        verbs = program()
    except ModuleNotFoundError as exc:
        if exc.name not in SERVICE_ONLY:
            raise
        sys.exit(f"error: `farstep` needs {exc.name}, which is not installed.\n  Run: pip install 'farstep[service]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks must not end a verb
    if interruptible:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        verbs(prog_name="farstep")
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the verb has ended, and its exit code stands


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt` at the first Ctrl-C; the second one ends the process at once, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def program() -> typer.Typer:
    """Return the program with all its verbs.

    Raises:
        ModuleNotFoundError: typer or rich is not installed.
    """
    import typer

    from farstep import __version__
    from farstep_service.cli.bench import bench
    from farstep_service.cli.fsck import fsck
    from farstep_service.cli.health import healthcheck, status
    from farstep_service.cli.history import fork, log, replay, rollback
    from farstep_service.cli.launch import SETTINGS, demo, launch
    from farstep_service.cli.serve import serve
    from farstep_service.cli.sessions import sessions
    from farstep_service.cli.warmup import warmup

    verbs = typer.Typer(
        name="farstep",
        help="An optimizer as a service: train as usual, while optimizer state and update steps live on a server.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"farstep {__version__}")
            raise typer.Exit

    @verbs.callback()
    def farstep(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        """Take the options that come before the verb."""

    for verb in (serve, demo, status, healthcheck, warmup, bench):
        verbs.command()(verb)
    verbs.command(context_settings=SETTINGS)(launch)
    for of_a_session in (log, rollback, fork, replay, fsck):
        sessions.command()(of_a_session)
    verbs.add_typer(sessions, name="sessions")
    return verbs
