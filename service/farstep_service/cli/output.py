"""Output that all verbs share: one line of JSON, tables, and errors in one or two lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from farstep.errors import FarstepError, HostNotAllowed, InvalidOption, Unauthorized

FAILED = 1
REFUSED = 2

JsonOutput = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]

_CONTROL = dict.fromkeys([*range(32), *range(127, 160)])
_WIDTH_OF_PIPES = 160


def print_json(document: object) -> None:
    """Print a document as one line of JSON."""
    typer.echo(json.dumps(document))


def printable(text: object) -> str:
    """Remove control characters from text that came from elsewhere."""
    return str(text).translate(_CONTROL)


@contextmanager
def reporting(json_output: bool) -> Iterator[None]:
    """Print an error of farstep in one or two lines, and exit.

    Raises:
        typer.Exit: 2 for a refusal (an option, a token), 1 for any other error.
    """
    try:
        yield
    except FarstepError as exc:
        if json_output:
            print_json(exc.to_problem())
        else:
            typer.echo(f"error {printable(exc.code)}: {printable(exc.detail)}", err=True)
            if exc.remedy:
                typer.echo(f"  {printable(exc.remedy)}", err=True)
        raise typer.Exit(REFUSED if isinstance(exc, (Unauthorized, HostNotAllowed, InvalidOption)) else FAILED) from exc


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under bold column names, as wide as the terminal; numbers are right-aligned."""
    import os
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_PIPES
    console = Console(width=fixed, highlight=False)
    overflow: Literal["fold", "ellipsis"] = "fold" if console.options.ascii_only else "ellipsis"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow=overflow)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {printable(value)}")


def size(nbytes: int) -> str:
    """Format a number of bytes in powers of 1000: `3.2 MB`."""
    amount, units = float(nbytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 999.5 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"
