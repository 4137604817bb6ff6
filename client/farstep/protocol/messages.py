"""The header maps of the data routes, as records.

A message is a header followed by a payload of raw tensor bytes (`farstep/protocol/PROTOCOL.md`). Every write, gradients
or contents, is named by (session, worker, worker epoch, sequence), so a retry is harmless.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from farstep.errors import InvalidRequest
from farstep.protocol.codecs import check_codec
from farstep.protocol.fields import Shapes, shapes_from_header, shapes_to_header
from farstep.protocol.header import VERSION, Header

LARGEST_START_VERSION = 2**52
"""The highest version that a session may begin at, within the integers that JSON can hold."""
GROUP = re.compile(r"0|[1-9][0-9]{0,5}")
"""The number of a param group as a key. Only one spelling is allowed, so that a map cannot name a group twice."""
OptionsMode = Literal["session", "push"]
"""Whether the options of a push are in force from its step on, or for that step alone."""
Wanted = Literal["all", "changed", "none"]
Times = dict[str, float]


@dataclass(frozen=True, slots=True)
class WriteName:
    """The name of one write in one session: worker, epoch of the worker, number of the write."""

    worker: str
    epoch: int
    sequence: int

    @classmethod
    def take(cls, header: Header) -> WriteName:
        return cls(header.text("worker"), header.integer("epoch", least=1), header.integer("seq", least=1))

    def to_header(self) -> dict[str, Any]:
        return {"worker": self.worker, "epoch": self.epoch, "seq": self.sequence}


@dataclass(frozen=True, slots=True)
class Sparse:
    """A sparse gradient: its payload is int64 indices `[dims, nnz]`, then the values."""

    segment: int
    dims: int
    nnz: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of a closure, for an optimizer that evaluates the objective several times in a step.

    Attributes:
        loss: the objective at the parameters of version `base`.
        continues: the step before asked for this evaluation; otherwise it begins a step.
    """

    loss: float
    continues: bool = False


@dataclass(frozen=True, slots=True)
class SharedPush:
    """The gradients of a push that are in shared memory (`farstep.protocol.shared_memory`), not in its body.

    Attributes:
        key: names the memory.
        count: how often the memory has been filled; the same number means the same gradients.
        deliver: whether to write the new parameters there, too. Not part of the push's identity.
    """

    key: str
    count: int
    deliver: bool = True


@dataclass(frozen=True, slots=True)
class PushHead:
    """The header of a push: gradients of some segments, computed on version `base`.

    Attributes:
        groups: options by param group: changed ones, in force from this step on, or all options for this step alone.
        options: which of the two.
        segments: half-open index ranges that have a gradient, flat and ascending; None for all.
        wanted: which parameters to answer with.
        have: the version of this worker's parameters, for `wanted="changed"`.
        evaluation: what the closure returned, for an optimizer that needs it.
        skip: this worker's gradients overflowed; all workers skip the step.
        wire_gradients: the codec of float32 gradients; None for unchanged.
        wire_parameters: the codec of float32 parameters in the answer; None for unchanged.
        shared: where the gradients are, if not in the body.
        order: the order of the segments whose gradients follow; None for ascending.
    """

    name: WriteName
    incarnation: str
    base: int
    wanted: Wanted = "all"
    have: int = 0
    segments: list[int] | None = None
    sparse: tuple[Sparse, ...] = ()
    groups: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    skip: bool = False
    wire_gradients: str | None = None
    wire_parameters: str | None = None
    shared: SharedPush | None = None
    order: tuple[int, ...] | None = None
    options: OptionsMode = "session"

    def to_header(self) -> dict[str, Any]:
        head: dict[str, Any] = {
            "v": VERSION,
            "incarnation": self.incarnation,
            **self.name.to_header(),
            "base": self.base,
            "reply": self.wanted,
        }
        if self.wanted == "changed":
            head["have"] = self.have
        if self.segments is not None:
            head["segments"] = self.segments
        if self.sparse:
            head["sparse"] = [[each.segment, each.dims, each.nnz] for each in self.sparse]
        if self.groups:
            head["groups"] = {str(group): dict(options) for group, options in self.groups.items()}
        if self.options != "session":
            head["options"] = self.options
        if self.evaluation is not None:
            head["loss"] = self.evaluation.loss
            if self.evaluation.continues:
                head["continues"] = True
        if self.skip:
            head["skip"] = True
        if self.wire_gradients is not None:
            head["wire_gradients"] = self.wire_gradients
        if self.wire_parameters is not None:
            head["wire_parameters"] = self.wire_parameters
        if self.shared is not None:
            head |= {"area": self.shared.key, "fill": self.shared.count, "deliver": self.shared.deliver}
        if self.order is not None:
            head["order"] = list(self.order)
        return head

    @classmethod
    def from_header(cls, values: Mapping[str, Any]) -> PushHead:
        header = Header(values)
        name = WriteName.take(header)
        wanted = header.text("reply", default="all")
        if wanted not in ("all", "changed", "none"):
            raise InvalidRequest(f"Header key 'reply' is {wanted!r}; there are all, changed and none.", field="reply")
        head = cls(
            name=name,
            incarnation=header.text("incarnation"),
            base=header.integer("base"),
            wanted=wanted,  # type: ignore[arg-type]  # compared just above
            have=header.integer("have", default=0),
        )
        if header.is_empty:  # the usual push
            return head
        head = replace(
            head,
            segments=header.listing("segments"),
            sparse=_sparse(header.listing("sparse") or []),
            groups=_groups(header.mapping("groups")),
            evaluation=_evaluation(header.number("loss"), header.flag("continues")),
            skip=header.flag("skip"),
            wire_gradients=_codec(header, "wire_gradients"),
            wire_parameters=_codec(header, "wire_parameters"),
            shared=_shared(header),
            order=_order(header.listing("order")),
            options=_options(header),
        )
        header.nothing_left()
        if head.shared is not None and (head.wire_gradients or head.wire_parameters):
            raise InvalidRequest("Gradients in shared memory are not narrowed.", field="area")
        if head.skip and head.segments != []:
            raise InvalidRequest("A push that skips its step has no gradients: 'segments' must be [].", field="skip")
        if head.shared is not None and (head.sparse or head.skip or head.evaluation is not None):
            raise InvalidRequest("Only dense gradients can be in shared memory.", field="area")
        if head.order is not None and (head.sparse or head.shared is not None):
            raise InvalidRequest("Only dense gradients in the payload come in an order of their own.", field="order")
        return head


@dataclass(frozen=True, slots=True)
class PutHead:
    """The header of contents that replace the session's own: parameters, optimizer state, or both.

    Attributes:
        fields: `param`, and the update rule's state fields, in the order of the payload.
        initial: these are the session's first contents; ignored by a session that has contents already.
        version: the version of the session afterwards, only with `initial` (a resumed training).
        shapes: of the free fields.
    """

    name: WriteName
    incarnation: str
    fields: tuple[str, ...]
    segments: list[int] | None = None
    initial: bool = False
    version: int = 0
    shapes: Shapes = field(default_factory=dict)

    def to_header(self) -> dict[str, Any]:
        head: dict[str, Any] = {
            "v": VERSION,
            "incarnation": self.incarnation,
            **self.name.to_header(),
            "fields": list(self.fields),
        }
        if self.segments is not None:
            head["segments"] = self.segments
        if self.initial:
            head |= {"initial": True, "version": self.version}
        if self.shapes:
            head["shapes"] = shapes_to_header(self.shapes)
        return head

    @classmethod
    def from_header(cls, values: Mapping[str, Any]) -> PutHead:
        header = Header(values)
        name = WriteName.take(header)
        incarnation = header.text("incarnation")
        names = header.listing("fields") or []
        if not names or not all(type(each) is str for each in names) or len(set(names)) != len(names):
            raise InvalidRequest("Header key 'fields' must name each field once.", field="fields")
        segments, initial = header.listing("segments"), header.flag("initial")
        version = header.integer("version", most=LARGEST_START_VERSION, default=0)
        shapes = shapes_from_header(header.mapping("shapes"))
        header.nothing_left()
        return cls(name, incarnation, tuple(names), segments, initial, version, shapes)


def _evaluation(loss: float | None, continues: bool) -> Evaluation | None:
    if loss is not None:
        return Evaluation(loss, continues)
    if continues:
        raise InvalidRequest("Header key 'continues' goes with a 'loss'.", field="continues")
    return None


def _codec(header: Header, key: str) -> str | None:
    return check_codec(key, header.text(key)) if key in header else None


def _options(header: Header) -> OptionsMode:
    said = header.text("options", default="session")
    if said not in ("session", "push"):
        raise InvalidRequest(f"Header key 'options' is {said!r}; there are session and push.", field="options")
    return said  # type: ignore[return-value]  # compared just above


def _shared(header: Header) -> SharedPush | None:
    count, deliver = header.integer("fill", default=0), header.flag("deliver")
    if count:
        return SharedPush(header.text("area"), count, deliver)
    if deliver:
        raise InvalidRequest("Header key 'deliver' goes with 'area' and 'fill'.", field="deliver")
    return None


def _order(indices: list[Any] | None) -> tuple[int, ...] | None:
    if indices is None:
        return None
    if not set(map(type, indices)) <= {int}:
        raise InvalidRequest("Header key 'order' must be a list of ints.", field="order")
    return tuple(indices)


def _sparse(rows: list[Any]) -> tuple[Sparse, ...]:
    for row in rows:
        if type(row) is not list or len(row) != 3 or not all(type(each) is int and each >= 0 for each in row):
            raise InvalidRequest(
                f"A row of header key 'sparse' is {row!r:.80}; it must be [segment, dims, nnz].", field="sparse"
            )
    return tuple(Sparse(*row) for row in rows)


def _groups(values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    for key, options in values.items():
        if not GROUP.fullmatch(key) or type(options) is not dict:
            raise InvalidRequest(
                f"Header key 'groups' has {key!r:.80}; it maps group numbers to options.", field="groups"
            )
    return {int(key): options for key, options in values.items()}
