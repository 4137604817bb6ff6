"""A server's answers to a worker, as records: every member is checked before it is used.

A server of another release, a proxy, or anything else that answers must not corrupt a parameter, a version or a
sequence of this worker. Unknown members are ignored: later releases may add some.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, cast, get_args

from farstep.conversation.replies import LARGEST_INT, ReplyReader, invalid_answer
from farstep.errors import FarstepError, ProtocolMismatch
from farstep.protocol.consistency import Consistency, from_options
from farstep.protocol.durability import LONGEST_TEXT
from farstep.protocol.fields import FieldKind
from farstep.protocol.header import VERSION
from farstep.protocol.policies import facts
from farstep.protocol.receipt import Reason, Receipt

KINDS: Final = frozenset(get_args(FieldKind))
REASONS: Final = frozenset(get_args(Reason))
MOST_FIELDS: Final = 62
"""State fields of an optimizer: `present` has a bit for each."""
MOST_TIMES: Final = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a session's parameters, and its server.

    Attributes:
        url: of the server; "" for the one that was asked.
        segments: the half-open range of its segments.
    """

    url: str
    segments: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer to a worker that joins.

    Attributes:
        incarnation: the life of the session.
        created: the session is new.
        epoch: the worker's.
        initialised: the session has its first parameters.
        initialise: this worker is asked to send them.
        fields: the optimizer's state fields.
        has_initial_state: a parameter has state before its first step.
        groups: the options in force, None from an older server.
        placement: the servers of its parameters.
        durability: what the server keeps of the session, as text; "" from an older server.
    """

    incarnation: str
    created: bool
    epoch: int
    initialised: bool
    initialise: bool
    fields: Mapping[str, FieldKind]
    has_initial_state: bool
    groups: list[Mapping[str, Any]] | None
    placement: tuple[Shard, ...]
    durability: str

    @classmethod
    def of(cls, document: object) -> Self:
        """Return the answer in a document.

        Raises:
            InvalidAnswer: it is not the answer to a join.
        """
        reply = ReplyReader(document, "The answer to joining")
        fields = reply.mapping("fields")
        if len(fields) > MOST_FIELDS or not all(type(kind) is str and kind in KINDS for kind in fields.values()):
            raise invalid_answer(f"The answer to joining has the state fields {fields!r:.200}.", "fields")
        return cls(
            _incarnation(reply),
            reply.flag("created"),
            reply.integer("epoch", least=1),
            reply.flag("initialised"),
            reply.flag("initialise"),
            cast("dict[str, FieldKind]", fields),
            reply.flag("eager"),
            reply.mappings("groups") if "groups" in reply else None,
            tuple(_shard(each) for each in reply.mappings("placement")),
            _durability(cast("Mapping[str, Any]", document)),
        )


def _durability(values: Mapping[str, Any]) -> str:
    """Return what an answer says that the server keeps of the session."""
    durability = values.get("durability", "")
    if type(durability) is not str or len(durability) > LONGEST_TEXT:
        raise invalid_answer(f"The answer names the durability {durability!r:.80}.", "durability")
    return durability


def _shard(document: Mapping[str, Any]) -> Shard:
    reply, segments = ReplyReader(document, "A shard of the placement"), document.get("segments")
    if type(segments) is not list or len(segments) != 2 or not all(type(each) is int for each in segments):
        raise invalid_answer(f"A shard of the placement has the segments {segments!r:.80}.", "placement")
    return Shard(reply.text("url"), (segments[0], segments[1]))


@dataclass(frozen=True, slots=True)
class Page:
    """The progress of a worker: its epoch, its last committed write, and whether a push of it is waiting."""

    incarnation: str
    epoch: int
    sequence: int
    waiting: bool

    @classmethod
    def of(cls, document: object) -> Self:
        """Return the page in a document.

        Raises:
            InvalidAnswer: it is not a worker's page.
        """
        reply = ReplyReader(document, "The page of the worker")
        return cls(_incarnation(reply), reply.integer("epoch"), reply.integer("sequence"), reply.flag("waiting"))


@dataclass(frozen=True, slots=True)
class Reply:
    """The header of the reply to a write.

    Attributes:
        version: of the parameters that follow, or of the session.
        outcome: the checked members of the write's receipt.
        duplicate: the server had seen it before.
        delivered: the parameters are in shared memory.
        times: seconds by activity.
        consistency: the session's mode, if it was switched after the creation.
        durability: what the server keeps of the session, as text; "" from an older server.
    """

    version: int
    outcome: Mapping[str, Any]
    duplicate: bool
    delivered: bool
    times: Mapping[str, float]
    consistency: Consistency | None
    durability: str

    @property
    def receipt(self) -> Receipt:
        """Return the outcome as a record."""
        return Receipt.from_header(self.outcome)

    @classmethod
    def of(cls, header: Mapping[str, Any], incarnation: str) -> Self:
        """Return the reply in a header.

        Args:
            header: as received.
            incarnation: the incarnation of the session that was written to.

        Raises:
            ProtocolMismatch: it has another version of the protocol.
            InvalidAnswer: it is not a reply to a write in that session.
        """
        reply = ReplyReader(header, "The reply")
        check_version(header)
        if _incarnation(reply) != incarnation:
            raise invalid_answer("The reply is of another life of the session than was written to.", "incarnation")
        times = reply.mapping("times") if "times" in header else {}
        if len(times) > MOST_TIMES:
            raise invalid_answer(f"The reply has {len(times)} times.", "times")
        spent = {key: value for key, value in times.items() if value is not None}
        for key, value in spent.items():
            if type(value) is not float or not 0.0 <= value <= LARGEST_INT:
                spent[key] = ReplyReader(spent, "The times of the reply").number(key)
        durability = header.get("durability", "")
        if type(durability) is not str or len(durability) > LONGEST_TEXT:
            durability = _durability(header)
        return cls(
            reply.integer("version"),
            checked_receipt(reply.mapping("receipt")),
            reply.flag("duplicate"),
            "delivered" in header and reply.flag("delivered"),
            spent,
            mode_of(reply.mapping("consistency")) if "consistency" in header else None,
            durability,
        )


def checked_receipt(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the checked members of the receipt in a reply, without those that are None.

    Raises:
        InvalidAnswer: it is not a receipt.
    """
    reply = ReplyReader(values, "The receipt")
    for key, least in (("version", 0), ("base", 0), ("staleness", 0), ("divisor", 1)):
        value = values.get(key)
        if type(value) is not int or not least <= value <= LARGEST_INT:
            reply.integer(key, least=least)  # which says what is wrong
    reply.flag("applied")
    reply.text("kernel")
    reply.texts("contributors")
    values = {key: value for key, value in values.items() if value is not None}
    for key in values.keys() & _OPTIONAL.keys():
        _OPTIONAL[key](reply, key)
    for key in facts():
        if key in values:
            reply.real(key)
    return values


_OPTIONAL: Mapping[str, Callable[[ReplyReader, str], object]] = {
    "again": ReplyReader.flag,
    "reason": lambda reply, key: reply.among(key, REASONS),
    "detail": ReplyReader.text,
    "disagreement": ReplyReader.text,
    "weight": ReplyReader.number,
}


def check_version(header: Mapping[str, Any]) -> None:
    """Refuse an answer of another version of the protocol, before any other key is read.

    Raises:
        ProtocolMismatch: it has another version, or none.
    """
    version = header.get("v")
    if type(version) is not int or version != VERSION:
        raise ProtocolMismatch(
            f"The answer is of protocol version {version!r:.40}; this client speaks {VERSION}.",
            remedy="Bring client and server to releases that share a protocol version.",
            field="v",
            limit=VERSION,
            side="client",
        )


def check_contents(header: Mapping[str, Any], fields: Collection[str], segments: Sequence[int] | None) -> None:
    """Refuse contents other than those requested.

    Args:
        header: of the answer.
        fields: the requested fields; state that no parameter has may be missing, and is checked elsewhere.
        segments: the requested ranges, None for all.

    Raises:
        ProtocolMismatch, InvalidAnswer: they are not.
    """
    check_version(header)
    reply = ReplyReader(header, "The answer")
    _incarnation(reply)
    reply.integer("version")
    if "count" in reply:
        reply.integer("count", least=1)
    names = reply.texts("fields")
    if len(set(names)) != len(names) or not set(names) <= set(fields) or not names:
        raise invalid_answer(f"The answer has the fields {names!r:.200}, not those asked for.", "fields")
    ranges = header.get("segments")
    whole = segments is None and (ranges is None or ranges == [0, header.get("count")])
    if not whole and (type(ranges) is not list or ranges != list(segments or ())):
        raise invalid_answer(f"The answer has the segments {ranges!r:.80}, not those asked for.", "segments")


def mode_of(options: Mapping[str, Any]) -> Consistency:
    """Return the consistency mode in an answer.

    Raises:
        InvalidAnswer: the mode is unknown.
    """
    try:
        return from_options(options)
    except FarstepError as exc:
        what = f"The answer names a consistency mode that is not known here: {exc.detail}"
        raise invalid_answer(what, "consistency") from exc


def _incarnation(reply: ReplyReader) -> str:
    incarnation = reply.text("incarnation")
    if not 0 < len(incarnation) <= 64 or not incarnation.isprintable():
        raise invalid_answer(f"The answer has the incarnation {incarnation!r:.80}.", "incarnation")
    return incarnation
