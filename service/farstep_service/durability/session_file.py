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
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

from farstep.errors import InvalidFile
from farstep.protocol.consistency import to_options
from farstep.protocol.fields import EVERYWHERE, PRESENT, Shapes, shapes_from_header, shapes_to_header
from farstep.protocol.hyper import Hyper
from farstep.protocol.session_file import DESCRIPTION, FORMAT, FORMAT_VERSION
from farstep.protocol.tensor_file import FileHead, in_file_order, invalid_file, write_head
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.tensors.contents import PARAM, Contents
from farstep_service.tensors.snapshot import Snapshot

SMALL_BYTES = 16 * 1024
JOINED_AT_MOST = 1024
"""The number of pieces that are joined."""


def file_of(snapshot: Snapshot) -> list[bytes | memoryview]:
    """Return a session file in pieces: its head, and the memory of each tensor in the order of the file."""
    entries = snapshot.contents.entries()
    memory = dict(zip((each.name for each in entries), snapshot.contents.memory_of_entries(), strict=True))
    ordered = in_file_order(entries)
    described = describe(snapshot.plan, snapshot.groups, snapshot.version, snapshot.contents.shapes)
    metadata = {FORMAT: FORMAT_VERSION, DESCRIPTION: json.dumps(described, ensure_ascii=False)}
    return [write_head(ordered, metadata), *_small_ones_joined([memory[each.name] for each in ordered])]


def _small_ones_joined(pieces: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Yield pieces, small neighbours joined: sending each by itself takes longer than copying them."""
    for small, group in groupby(pieces, lambda piece: len(piece) < SMALL_BYTES):
        if not small:
            yield from group
            continue
        while batch := list(islice(group, JOINED_AT_MOST)):
            yield b"".join(batch)


def describe(plan: Plan, groups: Sequence[Hyper], version: int, shapes: Shapes) -> dict[str, Any]:
    """Return what a session is as a document of plain values.

    Args:
        groups: the options in force.
        version, shapes: of the contents that the document is about.
    """
    return {
        "name": plan.name,
        "optimizer": plan.rule.name,
        "version": version,
        "groups": [group.to_options() for group in plan.groups],
        "options": [group.to_options() for group in groups],
        "consistency": to_options(plan.consistency),
        "nonfinite": plan.nonfinite,
        "kernel": plan.kernel,
        **({"policy": policy} if (policy := plan.policies.to_options()) else {}),
        "fields": plan.rule.kinds,
        "shapes": shapes_to_header(shapes),
        "segments": [
            {"name": each.name, "shape": list(each.shape), "dtype": each.dtype, "group": each.group}
            for each in plan.layout.segments
        ],
    }


def plan_in(described: Mapping[str, Any]) -> Plan:
    """Return the plan in a document; for errors see `Plan.build`."""
    segments = [
        SegmentSpec(each["name"], tuple(each["shape"]), each["dtype"], each["group"]) for each in described["segments"]
    ]
    return Plan.build(
        name=described["name"],
        optimizer=described["optimizer"],
        groups=described["groups"],
        segments=segments,
        consistency=described["consistency"],
        nonfinite=described["nonfinite"],
        kernel=described["kernel"],
        policy=described.get("policy"),
    )


def options_in(described: Mapping[str, Any], plan: Plan) -> list[Hyper]:
    """Return the options in force, from a document.

    Raises:
        InvalidFile: there are options for another number of groups.
    """
    options = described["options"]
    if len(options) != len(plan.groups):
        raise invalid_file(f"it has {len(plan.groups)} param groups and options for {len(options)}")
    return [
        plan.rule.hyper.from_options({**created.to_options(), **each}, edited=True)
        for created, each in zip(plan.groups, options, strict=True)
    ]


def snapshot_in(head: FileHead, described: Mapping[str, Any], plan: Plan) -> Snapshot:
    """Return the snapshot that the head of a file announces; its contents have no memory yet.

    Raises:
        InvalidFile: it is of another release's optimizer.
    """
    kinds, fields = plan.rule.kinds, described["fields"]
    # Files of older releases have no precisions, and the numbers in them are float32's.
    known = [item for item in kinds.items() if item[1] != "precision" or item[0] in fields]
    if list(fields.items()) != known:
        raise InvalidFile(
            f"In this file {plan.rule.name} has the state {', '.join(fields)!s:.300}; here it has {', '.join(kinds)}.",
            remedy="Import it with the release that wrote it, and take the state over by state_dict.",
            field="fields",
        )
    groups = options_in(described, plan)
    stored = {entry.name.partition("/")[0] for entry in head.entries}
    certain = {PARAM, PRESENT, *(name for name, kind in known if kind in EVERYWHERE)}
    chosen = [each for each in (PARAM, *kinds, PRESENT) if each in certain or each in stored]
    chosen += [view for view in plan.policies.views if view in stored]
    shapes = shapes_from_header(described["shapes"])
    every = range(len(plan.layout.segments))
    contents = Contents(plan.layout, plan.rule, chosen, every, shapes, views=plan.policies.views)
    return Snapshot(plan, groups, contents, described["version"])


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
