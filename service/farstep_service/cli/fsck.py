"""`farstep sessions fsck`: look at a data directory that no server owns, and save what can be saved."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farstep.errors import InvalidOption
from farstep_service.cli.output import FAILED, JsonOutput, print_json, reporting
from farstep_service.cli.serve import ReplayKernel

if TYPE_CHECKING:
    from farstep_service.keeping.fsck import Report
    from farstep_service.kernels import Kernels


def fsck(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The data directory of a server that is stopped.")],
    save: Annotated[
        bool, typer.Option("--save", help="Save what can be saved; nothing is deleted, but put into damaged-<n>/.")
    ] = False,
    replay: Annotated[
        ReplayKernel, typer.Option("--replay", help="Kernels that take steps again; see `farstep serve`.")
    ] = ReplayKernel.recorded,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Device that takes steps again.")] = "cpu",
    json_output: JsonOutput = False,
) -> None:
    """Look at the files of sessions: what is whole, what is damaged, and up to which version it can be saved."""
    with reporting(json_output):
        found = look_at(directory, save=save, reference=replay is ReplayKernel.reference, device=device)
    if json_output:
        print_json([{**asdict(each), "whole": each.whole} for each in found])
    else:
        for each in found:
            typer.echo("\n".join(lines_of(each)))
        if not found:
            typer.echo(f"There are no sessions in {directory}.")
    if not all(each.whole or each.saved for each in found):
        raise typer.Exit(FAILED)


def look_at(path: Path, *, save: bool, reference: bool, device: str) -> list[Report]:
    """Return what was found of each session of a data directory.

    Raises:
        InvalidOption: it is no data directory, or a server owns it.
    """
    from farstep_service.durability.directory import MARKER, DataDirectory
    from farstep_service.keeping.fsck import Examination
    from farstep_service.kernels import Kernels

    if not (path / MARKER).is_file():
        raise InvalidOption(
            f"Invalid data_dir: {path} is not a data directory of farstep.",
            remedy="Give the directory of `farstep serve --data-dir`.",
            field="data_dir",
        )
    kernels: dict[str, Kernels] = {}

    def of(mode: Any) -> Kernels:
        if mode not in kernels:
            kernels[mode] = Kernels(mode)
        return kernels[mode]

    data = DataDirectory(str(path), f"farstep sessions fsck with process id {os.getpid()}")
    try:
        found = []
        for folder in data.folders():
            examined = Examination(data.storage, folder)
            if save and not examined.report.whole and examined.report.version is not None:
                examined.save(of, device, reference=reference)
            found.append(examined.report)
        return found
    finally:
        data.close()


def lines_of(report: Report) -> list[str]:
    """Return what is said of one session."""
    called = f"session {report.name}" if report.name else "a session without a manifest that holds"
    if report.whole:
        return [f"{called} ({report.folder}): whole, at version {report.version}"]
    lines = [f"{called} ({report.folder}): damaged"]
    for each in report.damage:
        where = each.file if each.byte is None else f"{each.file}, byte {each.byte}"
        lines.append(f"  {where}: {each.what}")
    lost = "what was acknowledged after it is lost" if report.lost else "nothing is lost"
    if report.version is None:
        lines.append("  nothing can be saved, but for .safetensors files that hold: `farstep sessions import`")
    elif report.saved:
        lines.append(f"  saved at version {report.version}, {lost}; what was there is in {report.saved}")
    else:
        lines.append(f"  can be saved at version {report.version}, {lost}: add --save")
    return lines
