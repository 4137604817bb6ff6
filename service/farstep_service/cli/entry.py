"""Where `farstep` begins."""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper
from types import FrameType

SERVICE_ONLY = frozenset({"typer", "rich"})


def main() -> None:
    """Run the command line and exit: 0 done, 1 it did not work out, 2 what was asked for is refused."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not of a shell's background job
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are loaded there is nothing to leave in order
    try:
        from farstep_service.cli.program import program
    except ModuleNotFoundError as exc:
        if exc.name not in SERVICE_ONLY:
            raise
        sys.exit(f"error: `farstep` needs {exc.name}, which is not installed.\n  Run: pip install 'farstep[service]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end a verb
    if interruptible:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        program(prog_name="farstep")
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done, and the exit code is known


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Leave in order at the first Ctrl-C, and at once at the second, which would end in a traceback of the first."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
