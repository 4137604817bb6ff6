"""A session as a safetensors file: one version of everything, in a common format (`docs/sessions.md`).

    metadata            farstep_format   "1"
                        farstep_session  a JSON document: what the session is, its version, the options in force
    param/weight        a parameter, and below the name of each state field
    exp_avg/weight      one per element
    step                numbers: float64, one per parameter in the document's order
    present             which of the document's fields each parameter has, a number whose bits they are

The head is written here, and the tensors are sent from their own memory; an incoming file is received into its final
memory. Nothing is joined.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from farstep.protocol.consistency import to_options
from farstep.protocol.fields import shapes_to_header
from farstep.protocol.session_file import DESCRIPTION, FORMAT, FORMAT_VERSION
from farstep.protocol.tensor_file import FileHead, in_file_order, invalid_file, write_head
from farstep_service.tensors.contents import Contents
from farstep_service.tensors.snapshot import Snapshot

SMALL_BYTES = 16 * 1024
JOINED_AT_MOST = 1024
"""The number of pieces that are joined."""


def file_of(snapshot: Snapshot) -> list[bytes | memoryview]:
    """Return a session file in pieces: its head, and the memory of each tensor in the order of the file."""
    entries = snapshot.contents.entries()
    memory = dict(zip((each.name for each in entries), snapshot.contents.memory_of_entries(), strict=True))
    ordered = in_file_order(entries)
    metadata = {FORMAT: FORMAT_VERSION, DESCRIPTION: json.dumps(_description(snapshot), ensure_ascii=False)}
    return [write_head(ordered, metadata), *_small_ones_joined([memory[each.name] for each in ordered])]


def _small_ones_joined(pieces: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Yield pieces, small neighbours joined: sending each by itself takes longer than copying them."""
    for small, group in groupby(pieces, lambda piece: len(piece) < SMALL_BYTES):
        if not small:
            yield from group
            continue
        while batch := list(islice(group, JOINED_AT_MOST)):
            yield b"".join(batch)


def _description(snapshot: Snapshot) -> dict[str, Any]:
    plan = snapshot.plan
    return {
        "name": plan.name,
        "optimizer": plan.rule.name,
        "version": snapshot.version,
        "groups": [group.to_options() for group in plan.groups],
        "options": [group.to_options() for group in snapshot.groups],
        "consistency": to_options(plan.consistency),
        "nonfinite": plan.nonfinite,
        "kernel": plan.kernel,
        **({"policy": policy} if (policy := plan.policies.to_options()) else {}),
        "fields": plan.rule.kinds,
        "shapes": shapes_to_header(snapshot.contents.shapes),
        "segments": [
            {"name": each.name, "shape": list(each.shape), "dtype": each.dtype, "group": each.group}
            for each in plan.layout.segments
        ],
    }


def places_of(head: FileHead, contents: Contents) -> list[memoryview]:
    """Allocate the memory for the tensors of a file, and return it in the file's order.

    Raises:
        InvalidFile: a tensor is missing or superfluous, or has another dtype or shape than its session says.
    """
    wanted = contents.entries()
    found = {entry.name: entry for entry in head.entries}
    for entry in wanted:
        here = found.pop(entry.name, None)
        if here is None:
            raise invalid_file(f"the tensor {entry.name!r:.300} is missing")
        if here != entry:
            raise invalid_file(
                f"the tensor {entry.name!r:.300} is {here.dtype}{list(here.shape)}, "
                f"and its session says {entry.dtype}{list(entry.shape)}"
            )
    if found:
        raise invalid_file(f"its session has no tensor {next(iter(found))!r:.300}")
    contents.allocate()
    memory = dict(zip((each.name for each in wanted), contents.memory_of_entries(), strict=True))
    return [memory[entry.name] for entry in head.entries]
