"""`farstep sessions`: list, show and remove sessions, set their mode, export them to files and import them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from farstep.errors import invalid_option
from farstep.protocol.consistency import MODES
from farstep_service.cli.archive import restore_session
from farstep_service.cli.output import JsonOutput, print_facts, print_json, print_table, reporting, size
from farstep_service.cli.remote import Server, Token, document_of, open_conversation, session_of, sessions_of

sessions = typer.Typer(
    help="List, show, remove, switch, export, import and restore the sessions of a server.", no_args_is_help=True
)
sessions.command("restore")(restore_session)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The session's name.")]


@sessions.command("ls")
def list_sessions(server: Server, token: Token = None, json_output: JsonOutput = False) -> None:
    """List every session."""
    with reporting(json_output), open_conversation(server, token) as conversation:
        found = sessions_of(conversation)
    if json_output:
        print_json(found)
    elif found:
        print_sessions(found)
    else:
        typer.echo(f"There are no sessions at {server}.")


@sessions.command("show")
def show_session(name: Name, server: Server, token: Token = None, json_output: JsonOutput = False) -> None:
    """Show one session: its options, memory and workers."""
    with reporting(json_output), open_conversation(server, token) as conversation:
        found = session_of(conversation, path_of(name))
    if json_output:
        print_json(found)
        return
    print_facts(
        {
            "session": found["name"],
            "optimizer": found["optimizer"],
            "version": found["version"] if found["initialised"] else "none: the first parameters have not arrived",
            "parameters": f"{found['parameters']} in {found['segments']} tensors",
            "memory": ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in found["bytes"].items()) or "none",
            "kernel": found["kernel"],
            "consistency": ", ".join(f"{key} {value}" for key, value in found["consistency"].items()),
            "nonfinite": found["nonfinite"],
            **({"durability": level} if (level := found.get("durability")) else {}),
            **({"archived": f"version {copied}"} if (copied := found.get("archived_version")) is not None else {}),
            **({"policy": options_of(policy)} if (policy := found.get("policy")) else {}),
            "incarnation": found["incarnation"],
            **{f"group {number}": options_of(group) for number, group in enumerate(found["groups"])},
        }
    )
    if found["workers"]:
        typer.echo()
        print_table(
            ("WORKER", "EPOCH", "LAST WRITE", "NOW"),
            [
                (worker, page["epoch"], page["sequence"], worker_state(page))
                for worker, page in sorted(found["workers"].items())
            ],
        )


@sessions.command("rm")
def remove_session(
    name: Name,
    server: Server,
    token: Token = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Remove a session with its parameters and optimizer state."""
    with reporting(json_output), open_conversation(server, token) as conversation:
        if json_output and not yes:
            raise invalid_option("With --json there is no confirmation.", remedy="Add --yes.", field="yes")
        if not yes:
            found = document_of(conversation, path_of(name), "version")
            facts = f"version {found['version']}, {worker_count(found)} workers"
            typer.confirm(f"Remove session {name} ({facts}) and its state?", abort=True)
        conversation.control("DELETE", path_of(name))
    if json_output:
        print_json({"removed": name})
    else:
        typer.echo(f"Removed session {name}.")


@sessions.command("mode")
def set_mode(
    name: Name,
    mode: Annotated[str, typer.Argument(metavar="MODE", help=f"One of {', '.join(MODES)}.")],
    server: Server,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Such as workers=4 quorum=3.")
    ] = None,
    token: Token = None,
    json_output: JsonOutput = False,
) -> None:
    """Switch a session to another consistency mode. Pushes that wait for a step go on in it."""
    with reporting(json_output), open_conversation(server, token) as conversation:
        wanted = {"mode": mode, **parse_options(options or ())}
        found = conversation.control("PUT", f"{path_of(name)}/consistency", {"consistency": wanted})
    if json_output:
        print_json(found)
    else:
        typer.echo(f"Session {name} goes on as {', '.join(f'{k} {v}' for k, v in found['consistency'].items())}.")


@sessions.command("export")
def export_session(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, readable by you alone.")],
    server: Server,
    token: Token = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite the file.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Write one version of a session to a safetensors file. Workers may go on meanwhile."""
    from farstep.transfer import save

    with reporting(json_output), open_conversation(server, token) as conversation:
        found = save(conversation, name, file, force=force)
    if json_output:
        print_json({**asdict(found), "file": str(file)})
    else:
        typer.echo(f"Exported session {name} at version {found.version} to {file} ({size(found.nbytes)}).")


@sessions.command("import")
def import_session(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `export` wrote.")],
    server: Server,
    token: Token = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Another name for the session.")] = None,
    json_output: JsonOutput = False,
) -> None:
    """Create a session from an exported file."""
    from farstep.protocol.session_file import look_at
    from farstep.transfer import load

    with reporting(json_output), open_conversation(server, token) as conversation:
        found = look_at(file)
        created = load(conversation, found, name)
    if json_output:
        print_json({**asdict(found), "file": str(file), "name": created})
    else:
        typer.echo(f"Imported {found.optimizer} session {created} at version {found.version}.")


def print_sessions(found: Sequence[dict[str, Any]]) -> None:
    """Print a table of sessions, or nothing without sessions."""
    if found:
        print_table(
            ("SESSION", "OPTIMIZER", "VERSION", "MODE", "WORKERS", "PARAMETERS", "MEMORY", "DURABILITY", "KERNEL"),
            [
                (
                    each["name"],
                    each["optimizer"],
                    each["version"],
                    each["consistency"].get("mode", ""),
                    worker_count(each),
                    each["parameters"],
                    size(sum(each["bytes"].values())),
                    each.get("durability", "none"),
                    each["kernel"],
                )
                for each in found
            ],
        )


def worker_count(found: dict[str, Any]) -> int:
    """Return the number of a session's workers; a listing holds only the first ones."""
    return int(found.get("worker_count", len(found["workers"])))


def worker_state(page: dict[str, Any]) -> str:
    """Describe the state of a worker."""
    return "waits for others" if page["waiting"] else "" if page["live"] else "not heard of for its lease"


def options_of(group: dict[str, Any]) -> str:
    """Return a param group's options in one line, without those that are off."""
    return ", ".join(f"{key} {value}" for key, value in group.items() if value is not None and value is not False)


def parse_options(said: Sequence[str]) -> dict[str, str | int | float]:
    """Parse several `NAME=VALUE`.

    Raises:
        InvalidOption: one has no value, or a name is given twice.
    """
    found: dict[str, str | int | float] = {}
    for name, value in map(parse_option, said):
        if name in found:
            raise invalid_option(f"{name!r:.80} is given twice.", remedy="Give each option once.", field=name[:80])
        found[name] = value
    return found


def parse_option(said: str) -> tuple[str, str | int | float]:
    """Parse `NAME=VALUE`, with a number as the value if it is one.

    Raises:
        InvalidOption: the text has no value.
    """
    name, equals, value = said.partition("=")
    if not equals or not name or name == "mode":
        raise invalid_option(f"{said!r:.80} is not OPTION=VALUE.", field="options")
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def path_of(name: str) -> str:
    """Return the path of a session.

    Raises:
        InvalidOption: the name is invalid.
    """
    from farstep.identity import NAME

    if not NAME.fullmatch(name):
        raise invalid_option(f"Invalid name of a session: {name!r:.80}.", field="name")
    return f"/v1/sessions/{name}"
