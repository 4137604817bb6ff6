"""`farstep sessions log`, `rollback`, `fork` and `replay`: the history of a session, as far as its journal goes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from farstep.errors import invalid_option
from farstep_service.cli.output import JsonOutput, print_json, print_table, reporting
from farstep_service.cli.remote import LISTING_BYTES, Server, Token, document_of, not_a_server, open_conversation
from farstep_service.cli.sessions import Name, path_of

LOG_PAGE = 1000
"""Versions of one request: as many as a server gives at once."""
FEW_WORKERS = 4
"""Workers of a version that are named in a table."""
WITHIN_S = 3600.0
"""How long a server may be silent while it replays."""

Version = Annotated[int, typer.Option("--to", metavar="VERSION", min=0, help="The version to go back to.")]


def log(name: Name, server: Server, token: Token = None, json_output: JsonOutput = False) -> None:
    """List the versions of a session, as far back as its journal goes: when, who, how stale, and which kernel."""
    with reporting(json_output), open_conversation(server, token, WITHIN_S) as conversation:
        found: list[dict[str, Any]] = []
        query: dict[str, int] = {"limit": LOG_PAGE}
        while True:
            path = f"{path_of(name)}/log?{urlencode(query)}"
            page: object = conversation.control("GET", path, largest=LISTING_BYTES)
            if not isinstance(page, list) or not all(isinstance(each, dict) and "version" in each for each in page):
                raise not_a_server(conversation.server)
            found += page
            if len(page) < LOG_PAGE:
                break
            query["after"] = page[-1]["version"]
    if json_output:
        print_json(found)
    elif not found:
        typer.echo(f"Session {name} has no version yet.")
    else:
        print_table(
            ("VERSION", "TIME", "WRITE", "WORKERS", "STALENESS", "NORM", "KERNEL", "HASH"),
            [
                (
                    each["version"],
                    time_of(each["at"]),
                    each["write"],
                    names(each["workers"]),
                    each["staleness"],
                    "" if each["norm"] is None else f"{each['norm']:.6g}",
                    each["kernel"],
                    each["hash"][:12],
                )
                for each in found
            ],
        )


def rollback(
    name: Name,
    version: Version,
    server: Server,
    token: Token = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Let a session go on at an earlier version. Its workers' next calls raise StateRolledBack."""
    with reporting(json_output), open_conversation(server, token, WITHIN_S) as conversation:
        if json_output and not yes:
            raise invalid_option("With --json there is no confirmation.", remedy="Add --yes.", field="yes")
        if not yes:
            now = document_of(conversation, path_of(name), "version")["version"]
            typer.confirm(f"Let session {name} go back from version {now} to {version}?", abort=True)
        found = conversation.control("POST", f"{path_of(name)}/rollback", {"version": version})
    if json_output:
        print_json(found)
    else:
        typer.echo(f"Session {name} goes on at version {found['version']}.")


def fork(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name of the other session.")],
    server: Server,
    version: Annotated[
        int | None, typer.Option("--at", metavar="VERSION", min=0, help="An earlier version to begin with.")
    ] = None,
    token: Token = None,
    json_output: JsonOutput = False,
) -> None:
    """Create a session that begins with what another one is: parameters, optimizer state and options."""
    with reporting(json_output), open_conversation(server, token, WITHIN_S) as conversation:
        path_of(new)
        document = {"name": new} if version is None else {"name": new, "version": version}
        found = conversation.control("POST", f"{path_of(name)}/fork", document)
    if json_output:
        print_json(found)
    else:
        typer.echo(f"Session {new} begins at version {found['version']} of {name}.")


def replay(
    name: Name,
    first: Annotated[int, typer.Option("--from", metavar="VERSION", min=0, help="The first version.")],
    last: Annotated[int, typer.Option("--to", metavar="VERSION", min=0, help="The last version.")],
    server: Server,
    token: Token = None,
    json_output: JsonOutput = False,
) -> None:
    """Take steps of a session again, beside it, and say whose gradient grew most."""
    with reporting(json_output), open_conversation(server, token, WITHIN_S) as conversation:
        path = f"{path_of(name)}/replay?{urlencode({'from': first, 'to': last})}"
        found: object = conversation.control("GET", path, largest=LISTING_BYTES)
        if not isinstance(found, list) or not all(isinstance(each, dict) and "gradients" in each for each in found):
            raise not_a_server(conversation.server)
    if json_output:
        print_json(found)
        return
    print_table(
        ("VERSION", "WORKER", "NORM", "LARGEST", "IN", "CHANGE", ""),
        [row for each in found for row in rows_of(each)],
    )
    for each in found:
        if each["jump"]:
            worst = max(each["gradients"], key=lambda gradient: number(gradient["norm"]))
            typer.echo(
                f"\nThe gradient of {worst['worker']} for version {each['version']} has {shown(each['growth'])} times "
                f"the norm of those before; its largest element is in {worst['parameter']}."
            )


def rows_of(version: dict[str, Any]) -> list[tuple[object, ...]]:
    """Return the rows of a version: one for each gradient."""
    said, change = version["version"], shown(version["change"])
    mark = "<- the norm grows most" if version["jump"] else ""
    return [
        (said, each["worker"], shown(each["norm"]), shown(each["largest"]), each["parameter"], change, mark)
        for each in version["gradients"]
    ] or [(said, "", "", "", "", change, "")]


def number(value: float | None) -> float:
    """Return a number to compare by: null stands for one that is not finite."""
    return float("inf") if value is None else value


def shown(value: float | None) -> str:
    """Return a number in six digits."""
    return "not finite" if value is None else f"{value:.6g}"


def time_of(at: float) -> str:
    """Return a time of day, as this machine has it."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def names(workers: list[str]) -> str:
    """Return some names in one cell of a table."""
    more = len(workers) - FEW_WORKERS
    return ", ".join(workers[:FEW_WORKERS]) + (f" and {more} more" if more > 0 else "")
