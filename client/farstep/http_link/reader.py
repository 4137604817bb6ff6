"""What one worker reads of its session: the parameters, and the optimizer state of some of them.

Reading changes nothing, so it is repeated until an answer comes or the time is up.

What one worker replaces in its session: values of parameters, optimizer state, or a view such as their average.

Values that were sent are what the session has, so they do not count as edited any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final
from urllib.parse import quote

import torch
from torch import Tensor

from farstep.conversation import BuffersFor, Conversation, Received
from farstep.conversation.answers import check_contents
from farstep.conversation.replies import ReplyReader
from farstep.http_link.buffers import WorkerBuffers
from farstep.http_link.joined import JoinedSession
from farstep.http_link.retry import RetryPolicy
from farstep.http_link.writer import Writer
from farstep.protocol import to_ranges
from farstep.protocol.fields import PRESENT, FieldKind, State, shapes_from_header, shapes_of, worth_sending
from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PutHead, WriteName
from farstep.protocol.receipt import Receipt
from farstep.tensors import ParameterReceiver, StateArrivals, TensorMeta, outgoing, outgoing_contents

QUERY_BOUNDS = 1000
"""Bounds of ranges in a URL, which servers do not take at any length; beyond it what lies between is read too."""

Check = Callable[[Mapping[str, Any]], None]
"""Refuse the header of an answer that is not the session's as its worker knows it."""


class Reader:
    """Read one session.

    Args:
        server: the conversation with its server.
        session: its name.
        retry: how long a read is repeated.

    Attributes:
        shard: the conversation with the server that has the session's tensors.
    """

    def __init__(self, server: Conversation, session: str, *, retry: RetryPolicy) -> None:
        self.shard = server
        self._session = session
        self._retry = retry
        self._path = f"/v1/sessions/{quote(session)}/contents"

    def parameters(
        self, receiver: ParameterReceiver, check: Check, codec: str | None = None, *, worker: tuple[str, int]
    ) -> Received:
        """Bring all parameters, in a codec if one is named; they are in `receiver` then.

        Args:
            receiver: where they go.
            check: see `Check`.
            codec: its name.
            worker: who asks: its name and epoch.
        """
        name, epoch = worker
        path = f"{self._path}?worker={quote(name)}&epoch={epoch}"
        path += "" if codec is None else f"&wire_parameters={quote(codec)}"
        return self._get(
            "Pulling", path, ["param"], None, lambda header: receiver.targets(None, whole=codec is None), check
        )

    def stateful(self, parameters: Sequence[TensorMeta], check: Check) -> tuple[int, list[bool]]:
        """Return the session's version, and for each parameter whether it has state."""
        received, receiver = self._state({}, parameters, range(len(parameters)), check)
        return int(received.header["version"]), receiver.present()

    def states(
        self, fields: Mapping[str, FieldKind], parameters: Sequence[TensorMeta], indices: Sequence[int], check: Check
    ) -> list[State | None]:
        """Return the state of some of all parameters, ascending, None where one has none."""
        if len(to_ranges(indices)) > QUERY_BOUNDS:
            first, last = indices[0], indices[-1]
            states = self.states(fields, parameters, range(first, last + 1), check)
            return [states[index - first] for index in indices]
        _, receiver = self._state(fields, parameters, indices, check)
        return receiver.states()

    def view(self, name: str, parameters: Sequence[TensorMeta], check: Check) -> list[Tensor]:
        """Return what the session keeps of all parameters under another name, on their devices."""
        arrived = [torch.empty(p.shape, dtype=p.dtype, device="cpu") for p in parameters]
        views = [tensor_memory(each) for each in arrived]
        self._get(f"Reading {name} of", f"{self._path}?fields={quote(name)}", [name], None, lambda header: views, check)
        return [each.to(p.device) for each, p in zip(arrived, parameters, strict=True)]

    def _state(
        self, fields: Mapping[str, FieldKind], parameters: Sequence[TensorMeta], indices: Sequence[int], check: Check
    ) -> tuple[Received, StateArrivals]:
        receiver = StateArrivals(
            [parameters[i] for i in indices], fields, sum(form.shape.numel() for form in parameters)
        )
        path = f"{self._path}?fields={','.join((*fields, PRESENT))}"
        segments = to_ranges(indices) if len(indices) < len(parameters) else None
        if segments is not None:
            path += f"&segments={','.join(map(str, segments))}"

        def buffers_for(header: dict[str, Any]) -> Sequence[memoryview]:
            shapes = ReplyReader(header, "The answer").mapping("shapes") if "shapes" in header else {}
            return receiver.targets(header["fields"], shapes_from_header(shapes, side="client"))

        received = self._get("Reading the state of", path, [*fields, PRESENT], segments, buffers_for, check)
        return received, receiver

    def _get(
        self,
        doing: str,
        path: str,
        fields: Sequence[str],
        segments: Sequence[int] | None,
        targets: BuffersFor,
        check: Check,
    ) -> Received:
        """Read contents: these fields of these ranges of segments, None for all."""

        def buffers_for(header: dict[str, Any]) -> Sequence[memoryview]:
            check_contents(header, fields, segments)
            check(header)
            return targets(header)

        def attempt() -> Received:
            return self.shard.data("GET", path, None, (), buffers_for)

        return self._retry.call(f"{doing} session {self._session!r}", self.shard.server, attempt)


@final
class Putting:
    """Put contents of this worker's in the place of the session's.

    Args:
        joined: the session, and the version that is here.
        buffers: the parameters, and the memory for them.
        writer: names and sends what is put.
    """

    def __init__(self, joined: JoinedSession, buffers: WorkerBuffers, writer: Writer) -> None:
        self._joined = joined
        self._buffers = buffers
        self._writer = writer

    def begin(self, state: Mapping[int, State | None] | None, version: int) -> Receipt:
        """Give the session its first contents, unless it has some: all parameters, and their state if there is any.

        Args:
            state: by the parameter's index.
            version: the version it begins at.
        """
        every = range(len(self._buffers.parameters))
        return self._put(every, ["param", *self._fields(state)], state, initial=True, version=version)

    def parameters(self, indices: Sequence[int]) -> None:
        """Replace the values of some parameters."""
        self._put(indices, ["param"], None)

    def states(self, state: Mapping[int, State | None]) -> None:
        """Replace the state of some parameters; None where one shall have none."""
        self._put(sorted(state), self._fields(state), state)

    def view(self, view: str, values: Sequence[Tensor]) -> None:
        """Replace what the session keeps beside all of the parameters."""

        def head(name: WriteName, incarnation: str) -> PutHead:
            return PutHead(name, incarnation, (view,))

        with self._joined.there():
            self._writer.put(head, [outgoing(each) for each in values])

    def _fields(self, state: Mapping[int, State | None] | None) -> list[str]:
        return [] if state is None else [*worth_sending(self._joined.fields, state.values()), PRESENT]

    def _put(
        self,
        indices: Sequence[int],
        fields: Sequence[str],
        state: Mapping[int, State | None] | None,
        *,
        initial: bool = False,
        version: int = 0,
    ) -> Receipt:
        buffers, known = self._buffers, self._joined.fields
        buffers.leave_foreign_()
        segments = None if len(indices) == len(buffers.parameters) else to_ranges(indices)
        shapes = shapes_of(known, state or {})
        chosen = [(buffers.parameters[i], state[i] if state else None) for i in indices]
        payload = outgoing_contents(fields, known, chosen)

        def head(name: WriteName, incarnation: str) -> PutHead:
            return PutHead(name, incarnation, tuple(fields), segments, initial, version, shapes)

        with self._joined.there():
            reply = self._writer.put(head, payload)
        receipt = reply.receipt
        everything = "param" in fields and segments is None
        if receipt.base == self._joined.version or everything:  # else what others have changed is not here
            self._joined.version = receipt.version
        if "param" in fields:
            buffers.receiver.keep_(indices)
        return receipt
