"""The header of a new param group: a named write like gradients and contents.

worker    append group 2: options, names, shapes, dtypes, and the parameters as the payload
session   has 2 groups: it grows, as one new version, and every other worker has to add the same group
          has group 2, and it is this one: the worker knows it from now on, and gets the session's parameters
          has group 2, and it is another one: refused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farstep.errors import Fenced, InvalidRequest, Side
from farstep.protocol.header import VERSION, Header
from farstep.protocol.messages import WriteName


@dataclass(frozen=True, slots=True)
class NewParameter:
    """Announce one parameter of the group; the session checks it when it allocates the parameter."""

    name: object
    shape: tuple[object, ...]
    dtype: object


@dataclass(frozen=True, slots=True)
class AppendHead:
    """Describe a param group.

    Attributes:
        group: its number: the count of groups that the worker knows before it.
        options: its options at creation.
        parameters: its parameters, in the order of the payload.
    """

    name: WriteName
    incarnation: str
    group: int
    options: Mapping[str, Any]
    parameters: tuple[NewParameter, ...]

    def to_header(self) -> dict[str, Any]:
        return {
            "v": VERSION,
            "incarnation": self.incarnation,
            **self.name.to_header(),
            "group": self.group,
            "options": dict(self.options),
            "parameters": [[each.name, list(each.shape), each.dtype] for each in self.parameters],
        }

    @classmethod
    def from_header(cls, values: Mapping[str, Any]) -> AppendHead:
        header = Header(values)
        head = cls(
            WriteName.take(header),
            header.text("incarnation"),
            header.integer("group"),
            header.mapping("options"),
            _parameters(header.listing("parameters") or []),
        )
        header.nothing_left()
        return head


def outgrown(session: str, worker: str, groups: int, *, by: str = "", side: Side = "server") -> Fenced:
    """Return the error for a worker that knows only the first `groups` param groups of a session.

    Args:
        by: the worker that added the next one, if known.
    """
    who = "A call that got no answer" if by == worker else f"Worker {by!r}" if by else "Another worker"
    return Fenced(
        f"{who} added param group {groups} to session {session!r}; worker {worker!r} does not have it.",
        remedy="Add the same group with add_param_group, or make a new optimizer with all groups.",
        field="group",
        limit=groups,
        side=side,
    )


def _parameters(rows: list[Any]) -> tuple[NewParameter, ...]:
    for row in rows:
        if type(row) is not list or len(row) != 3 or type(row[1]) is not list:
            raise InvalidRequest(
                f"A row of header key 'parameters' is {row!r:.80}; it must be [name, shape, dtype].", field="parameters"
            )
    return tuple(NewParameter(name, tuple(shape), dtype) for name, shape, dtype in rows)
