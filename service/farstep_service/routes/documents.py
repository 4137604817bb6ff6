"""Incoming JSON documents: unknown fields are refused, never ignored.

Reading stops at the first mistake, so a document of a million mistakes costs no more than one. Large fields are read
and checked in pieces by `farstep_service.routes.reading`, and not checked again.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import Path, Query
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from farstep.protocol.messages import LARGEST_START_VERSION
from farstep.protocol.session_file import description_in
from farstep.protocol.tensor_file import FileHead, invalid_file
from farstep_service.durability.session_file import snapshot_in
from farstep_service.layout import MAX_SEGMENTS, Layout, SegmentSpec
from farstep_service.plan import MAX_GROUPS, Plan
from farstep_service.tensors import Snapshot

MAX_OPTIONS: Final = 64
"""The most options of one param group."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME)]
NamePath = Annotated[str, Path(pattern=NAME)]


def _digits(value: object) -> object:
    """Refuse spellings that pydantic would convert to a number, such as `1.0` or `+1`."""
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) < 16):
        raise ValueError("it must be a whole number in digits")
    return value


Digits = BeforeValidator(_digits)
EpochQuery = Annotated[int, Digits, Query(ge=1)]


class Document(BaseModel):
    """Base class of incoming documents: unknown fields are refused, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Whole(Document):
    """Base class of a whole document."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, document: object) -> object:
        """Refuse the first unknown field, instead of counting them all."""
        for key in document if isinstance(document, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"there is no field {key!r:.80}")
        return document


class Read(list[Any]):
    """A list that was checked while it was read in pieces."""


class ReadMembers(dict[str, Any]):
    """An object that was checked while it was read in pieces."""


def _once(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """Check a value that was not checked in pieces."""
    return value if isinstance(value, (Read, ReadMembers, Layout)) else check(value)


OnceChecked = WrapValidator(_once)
Options = Annotated[dict[str, Any], Field(max_length=MAX_OPTIONS)]


class SegmentDocument(Document):
    """One parameter of a session."""

    name: str
    shape: Annotated[list[int], FailFast()]
    dtype: str
    group: int = 0


class PlanDocument(Whole):
    """Base class of documents that describe a session."""

    name: Name
    optimizer: str
    groups: Annotated[list[Options], Field(min_length=1, max_length=MAX_GROUPS), FailFast(), OnceChecked]
    segments: Annotated[list[SegmentDocument], Field(max_length=MAX_SEGMENTS), FailFast(), OnceChecked]
    consistency: dict[str, Any] = Field(default_factory=lambda: {"mode": "async"})
    nonfinite: Literal["refuse", "skip", "allow"] = "refuse"
    kernel: Literal["auto", "reference", "fused"] = "auto"
    policy: dict[str, Any] = Field(default_factory=dict)


class SessionDocument(PlanDocument):
    """A session to create or join, and the worker that joins it.

    `options`: `session` joins with any options in force, `push` sends its own with each push. Without it the groups
    must equal those at the creation, or those in force. `named`: the worker's name was chosen, and is the same in every
    run. `durability`: without it the session's own, or the server's default for a new one.
    """

    worker: Name
    named: bool = True
    options: Literal["session", "push"] | None = None
    durability: dict[str, Any] | None = None


class SnapshotDocument(PlanDocument):
    """The description of a session in a session file, with the options in force and the state fields."""

    version: Annotated[int, Field(ge=0, le=LARGEST_START_VERSION)]
    options: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_GROUPS), FailFast()]
    fields: dict[str, str]
    shapes: dict[str, Any]


class MemoryDocument(Document):
    """Memory that a worker shares: the random key in its name, and the process and descriptor that have it open."""

    epoch: Annotated[int, Field(ge=1)]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    fd: Annotated[int, Field(ge=0, lt=2**31)]


class LeaseDocument(Whole):
    """A live worker: its epoch, and the incarnation of the session that it joined."""

    epoch: Annotated[int, Field(ge=1)]
    incarnation: Annotated[str, Field(max_length=64)]


GroupNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$")]


class GroupsDocument(Whole):
    """Changed options, by param group number."""

    groups: Annotated[dict[GroupNumber, Options], Field(max_length=MAX_GROUPS), OnceChecked]


class ConsistencyDocument(Whole):
    """The mode to switch a session to, with its options."""

    consistency: dict[str, Any]


def spec_of(segment: SegmentDocument) -> SegmentSpec:
    """Return the spec of one parameter."""
    return SegmentSpec(segment.name, tuple(segment.shape), segment.dtype, segment.group)


def parts_of(document: PlanDocument) -> int:
    """Return the number of parameters and param groups of a document."""
    segments: object = document.segments
    count = len(segments.segments) if isinstance(segments, Layout) else len(document.segments)
    return len(document.groups) + count


def plan_of(document: PlanDocument, durability: dict[str, Any] | None = None) -> Plan:
    """Return the plan in a document, with a level if one is named; for errors see `Plan.build`."""
    segments: object = document.segments
    if not isinstance(segments, Layout):
        segments = Layout.build(map(spec_of, document.segments))
    return Plan.build(
        name=document.name,
        optimizer=document.optimizer,
        groups=document.groups,
        segments=segments,
        consistency=document.consistency,
        nonfinite=document.nonfinite,
        kernel=document.kernel,
        policy=document.policy,
        durability=durability,
    )


def snapshot_of(head: FileHead, name: str | None) -> Snapshot:
    """Return the snapshot in a session file's head; its contents have no memory yet.

    Args:
        head: of the file.
        name: the session's new name, None for the one in the file.

    Raises:
        InvalidFile: the description is invalid, or of another release's optimizer.
        FarstepError: see `Plan.build`.
    """
    try:
        document = SnapshotDocument.model_validate(description_in(head.metadata))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise invalid_file(f"its session says something odd about {where!r:.100}: {first['msg']:.200}") from None
    plan = plan_of(document if name is None else document.model_copy(update={"name": name}))
    return snapshot_in(head, document.model_dump(), plan)
