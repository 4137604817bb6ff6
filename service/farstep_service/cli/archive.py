"""`farstep sessions restore`: bring a session back from an archive, into a data directory that no server has open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from farstep.errors import Unavailable, invalid_option
from farstep_service.cli.output import REFUSED, JsonOutput, print_json, print_table, reporting, size

if TYPE_CHECKING:
    from farstep_service.durability.restoring import Archived


def restore_session(
    url: Annotated[str, typer.Argument(metavar="URL", help="What --archive was, or that with /ID behind it.")],
    data_dir: Annotated[
        str, typer.Option("--data-dir", metavar="DIR", help="The directory to restore it into; no server may have it.")
    ],
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Another name for the session.")] = None,
    json_output: JsonOutput = False,
) -> None:
    """Restore a session from an archive: the next server on that directory has it. Lists several, if there are."""
    with reporting(json_output):
        from farstep_service.durability.directory import DataDirectory
        from farstep_service.durability.restoring import archive_at, archived_in, one_of, restore

        if name is not None:
            check_name(name)
        objects, identity = archive_at(url)
        with of_the_store(url):
            found = archived_in(objects, identity)
        if len(found) > 1:
            show_archived(found, url, json_output)
            raise typer.Exit(REFUSED)
        chosen = one_of(found, url)
        owner = f"`farstep sessions restore`, process id {os.getpid()}"
        with closing(DataDirectory(data_dir, owner)) as directory, of_the_store(url):
            restored = restore(objects, chosen.identity, directory, name)
    if json_output:
        print_json({**asdict(restored), "url": url, "data_dir": data_dir})
        return
    typer.echo(
        f"Restored session {restored.name} into {data_dir}: version {restored.version}, and {restored.events} events "
        "behind it.\nA server on it tells workers of the session that it was rolled back."
    )
    for each in restored.dropped:
        typer.echo(f"warning: left in the archive: {each}", err=True)


def show_archived(found: Sequence[Archived], url: str, json_output: bool) -> None:
    """Print the sessions that an archive holds."""
    if json_output:
        print_json({"url": url, "sessions": [asdict(each) for each in found]})
        return
    print_table(
        ("SESSION", "VERSION", "SNAPSHOT", "SEGMENTS", "SIZE", "ID"),
        [
            (each.name, each.version, each.snapshot, each.segments, size(each.nbytes), each.identity)
            for each in sorted(found, key=lambda each: each.name)
        ],
    )
    typer.echo(f"Name one: farstep sessions restore {url.rstrip('/')}/ID --data-dir DIR", err=True)


def check_name(name: str) -> None:
    """Refuse what is no name of a session.

    Raises:
        InvalidOption: it is none.
    """
    from farstep.identity import NAME

    if not NAME.fullmatch(name):
        raise invalid_option(f"Invalid name of a session: {name!r:.80}.", field="name")


@contextmanager
def of_the_store(url: str) -> Iterator[None]:
    """Raise the errors of a store, or of the disk, as farstep's.

    Raises:
        Unavailable: the store, or the disk, failed.
    """
    try:
        yield
    except OSError as exc:
        raise Unavailable(
            f"{url} could not be read, or the data directory not written: {exc.strerror or exc}. Nothing has changed.",
            remedy="Look whether the store answers, with the variables of its vendor set, and the disk has room.",
            side="client",
        ) from exc
