"""What one worker replaces in its session: values of parameters, optimizer state, or a view such as their average.

Values that were sent are what the session has, so they do not count as edited any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from farstep.http_link.buffers import WorkerBuffers
from farstep.http_link.joined import JoinedSession
from farstep.http_link.writer import Writer
from farstep.messages import PutHead, WriteName
from farstep.presence import PRESENT
from farstep.receipt import Receipt
from farstep.states import State, shapes_of, worth_sending
from farstep.tensors import outgoing, outgoing_contents
from farstep.wire import to_ranges


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
