"""Where `farstep` begins."""

from __future__ import annotations

import sys

SERVICE_ONLY = frozenset({"typer", "rich"})


def main() -> None:
    """Run the command line and exit: 0 done, 1 it did not work out, 2 what was asked for is refused."""
    try:
        from farstep_service.cli.program import program
    except ModuleNotFoundError as exc:
        if exc.name not in SERVICE_ONLY:
            raise
        sys.exit(f"error: `farstep` needs {exc.name}, which is not installed.\n  Run: pip install 'farstep[service]'")
    program(prog_name="farstep")
