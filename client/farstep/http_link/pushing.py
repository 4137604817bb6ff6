"""The pushes of one worker over HTTP: in bodies, begun during the backward pass, or through shared memory.

    begun during backward   finished if it is what the step sends, and nothing was edited; else an ordinary push
    large                   edits are looked for while it is sent; one that is found ends it, is sent, and the push
                            follows from its beginning
    other                   edits are sent first

Whichever way it goes, a push that fails leaves the parameters as they were, and memory in which an answer may still
arrive is not used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, final

from torch import Tensor

from farstep.conversation.answers import Reply
from farstep.conversation.replies import invalid_answer
from farstep.errors import ReceiptExpired, StateRolledBack, UnknownSession
from farstep.http_link.buffers import WorkerBuffers
from farstep.http_link.joined import JoinedSession
from farstep.http_link.reader import Putting
from farstep.http_link.writer import Writer
from farstep.link import Options
from farstep.overlap import LEAST_BYTES, OTHERS, STREAMED, Overlapped, Overlapping
from farstep.protocol import to_ranges
from farstep.protocol.messages import Evaluation, PushHead, SharedPush, Sparse, Wanted, WriteName
from farstep.protocol.receipt import StepReport
from farstep.tensors import BackgroundCompare, Edited, outgoing_gradients
from farstep.transport import StreamedBody
from farstep.transport.pieces import Payload, nbytes_of


class _Encoded(NamedTuple):
    """Gradients as they travel.

    Attributes:
        payload: all of them.
        present: whose they are.
        sparse: those among them that are sparse.
        order: in which they follow; None for that of `present`.
    """

    payload: Payload
    present: Sequence[int]
    sparse: Sequence[Sparse] = ()
    order: Sequence[int] | None = None


@final
class Pushing:
    """Push gradients, and take in the parameters that come back.

    Args:
        joined: the session, and the version that is here.
        buffers: the parameters, and the memory for them.
        writer: names and sends what is pushed.
        overlapping: the pushes that begin early.
        putting: sends the values of parameters that were edited.
    """

    def __init__(
        self,
        joined: JoinedSession,
        buffers: WorkerBuffers,
        writer: Writer,
        overlapping: Overlapping,
        putting: Putting,
    ) -> None:
        self._joined = joined
        self._buffers = buffers
        self._writer = writer
        self._overlapping = overlapping
        self._putting = putting
        self._streams = buffers.encoder.streams and buffers.on_cpu
        self._residuals = buffers.encoder.codec.residual
        self._unlooked: list[int] | None = None  # addresses of parameters that the next push has to look at
        self._edited_last = False  # whether the last look found an edit: then the next one comes before the push

    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
        """Send gradients, and bring the parameters to the version that they led to; see `Link.push`."""
        began = time.perf_counter()
        unlooked, self._unlooked = self._unlooked, None
        begun = self._overlapping.take()
        if begun is not None:
            present = [index for index, each in enumerate(gradients) if each is not None]
            head = self._head(present, groups, evaluation=evaluation, order=begun.order)
            if self._still(begun, head, gradients, unlooked):
                report = self._push(head, present, begun.payload(), began, begun=begun)
                hidden = begun.bytes_overlapped if begun.outcome == STREAMED else 0
                return replace(report, overlap=begun.outcome, bytes_overlapped=hidden)
        try:
            report = self._push_all(gradients, groups, evaluation, began, unlooked)
        except Edited:  # the server has a part of this push, which it throws away
            self._send_edits(unlooked)
            report = self._push_all(gradients, groups, evaluation, began, None)
        return report if begun is None else replace(report, overlap=begun.outcome)

    def _still(
        self,
        begun: Overlapped,
        head: Callable[[WriteName, str], PushHead],
        gradients: Sequence[Tensor | None],
        unlooked: list[int] | None,
    ) -> bool:
        """Return whether a push that was begun is what the step sends, which no edit of a parameter has to precede.

        Two comparisons of memory, side by side: all cores are the step's now.
        """
        looking = None if unlooked is None else BackgroundCompare(partial(self._buffers.receiver.checks, unlooked))
        try:
            if looking is not None:
                looking.start()
            carried = begun.carries(head(self._writer.names.next(), self._writer.incarnation).to_header(), gradients)
            if looking is not None and carried:
                looking.finish()
            return carried
        except Edited:
            begun.end(OTHERS)
            return False
        finally:
            if looking is not None:
                looking.stop()

    def _push_all(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None,
        began: float,
        unlooked: list[int] | None,
    ) -> StepReport:
        """Send gradients of which none has been sent; look for edits at the addresses `unlooked` before they are whole.

        Raises:
            Edited: there is an edit; nothing was done.
        """
        buffers, names = self._buffers, self._writer.names
        if self._residuals:  # what was left out of an earlier push may be known only after these
            self._send_edits(unlooked)
            unlooked = None
            buffers.encoder.begin()
        before = names.unanswered

        def encode() -> _Encoded:
            order = None if before is None else before.header.get("order")
            if order is None:
                looking = None if unlooked is None else BackgroundCompare(partial(buffers.receiver.checks, unlooked))
                payload = buffers.sender.payload(gradients, looking, at_once=buffers.sharing.possible)
                if payload is not None:
                    return _Encoded(payload, range(len(buffers.parameters)))
            present, sparse, views = outgoing_gradients(gradients, buffers.parameters, buffers.encoder)
            if order is None or sparse or sorted(order) != present:
                return _Encoded(views, present, sparse)
            placed = dict(zip(present, views, strict=True))  # it may be that push again
            return _Encoded([placed[index] for index in order], present, order=order)

        encoded = encode()
        payload, present = encoded.payload, encoded.present
        if unlooked is not None and not isinstance(payload, StreamedBody):
            self._send_edits(unlooked)
        bodies = encoded.sparse or evaluation or names.unsure
        shared = None if bodies else buffers.fill_(names.epoch, present, gradients)
        head = self._head(
            present, groups, evaluation=evaluation, order=encoded.order, sparse=encoded.sparse, shared=shared
        )
        again = (lambda: encode().payload) if self._residuals else None
        return self._push(head, present, payload, began, shared=shared is not None, again=again)

    def _head(
        self,
        present: Sequence[int],
        groups: Mapping[int, Options],
        *,
        evaluation: Evaluation | None = None,
        order: Sequence[int] | None = None,
        sparse: Sequence[Sparse] = (),
        shared: SharedPush | None = None,
    ) -> Callable[[WriteName, str], PushHead]:
        everything = len(present) == len(self._buffers.parameters)
        segments = None if everything else to_ranges(present)
        wanted: Wanted = "all" if everything and self._wants_all else "changed"

        def head(name: WriteName, incarnation: str) -> PushHead:
            return PushHead(
                name,
                incarnation,
                self._joined.version,
                wanted,
                self._joined.version,
                segments=segments,
                sparse=tuple(sparse),
                groups=groups,
                evaluation=evaluation,
                wire_gradients=self._buffers.wire_gradients,
                wire_parameters=self._buffers.wire_parameters,
                shared=shared,
                order=None if order is None else tuple(order),
                options=self._joined.options,
            )

        return head

    @property
    def _wants_all(self) -> bool:
        """Return whether a push of all gradients asks for all parameters: of several rounds only the last changes any.

        Without a gradient only another worker changes a parameter.
        """
        return self._joined.spec.policies.rounds == 1

    def begin_push(self, order: Sequence[int], groups: Mapping[int, Options]) -> Overlapped | None:
        """Begin to send gradients that are still being computed; see `Link.begin_push`."""
        names = self._writer.names
        if not self._streams or names.unsure or self._buffers.sharing.possible or self._joined.forked:
            return None
        if sum(self._buffers.parameters[index].nbytes for index in order) < LEAST_BYTES:
            return None
        header = self._head(sorted(order), groups, order=order)(names.next(), self._writer.incarnation).to_header()
        send = partial(self._writer.send_push, header)
        return self._overlapping.begin(header, order, self._buffers.parameters, self._buffers.encoder, send)

    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        """Take no step with this worker's gradients; see `Link.skip`."""
        self._overlapping.end(OTHERS)
        unlooked, self._unlooked = self._unlooked, None
        self._send_edits(unlooked)
        codec = self._buffers.wire_parameters

        def head(name: WriteName, incarnation: str) -> PushHead:
            have, options = self._joined.version, self._joined.options
            return PushHead(
                name,
                incarnation,
                have,
                "changed",
                have,
                segments=[],
                groups=groups,
                skip=True,
                wire_parameters=codec,
                options=options,
            )

        return self._push(head, (), (), time.perf_counter())

    def _push(
        self,
        head: Callable[[WriteName, str], PushHead],
        present: Sequence[int],
        payload: Payload,
        began: float,
        *,
        shared: bool = False,
        begun: Overlapped | None = None,
        again: Callable[[], Payload] | None = None,
    ) -> StepReport:
        """Send a push with the gradients of the parameters `present`, and take in what comes back.

        Args:
            again: encodes them again, where what an earlier push left out has to be added to them after all.
        """
        buffers, before = self._buffers, self._writer.names.unanswered
        whole = self._wants_all and len(present) == len(buffers.parameters)
        arrived: list[int] | None = None
        reply: Reply | None = None

        def buffers_for(header: dict[str, Any]) -> Sequence[memoryview]:
            nonlocal arrived, reply
            buffers.receiver.undo_()  # what an earlier try has brought
            reply = Reply.of(header, self._writer.incarnation)
            if not reply.duplicate:
                self._joined.check_version(reply.version)
            arrived = self._joined.arriving(header, len(buffers.parameters), whole=whole)
            if reply.delivered:
                if not shared:
                    raise invalid_answer("The reply names shared memory, and the push did not.", "delivered")
                return []
            if self._writer.attempts > 1 or not buffers.sharing.possible:
                buffers.share_no_more_()
            if arrived is None and len(present) == len(buffers.parameters):
                return buffers.receiver.landing()
            return buffers.receiver.targets(arrived)

        try:
            received = self._writer.push(head, payload, buffers_for, buffers.receiver.advance_, begun, again)
        except BaseException as exc:
            unanswered = self._writer.names.unanswered
            if isinstance(exc, ReceiptExpired):
                buffers.encoder.commit(counts=True)
            elif unanswered is not None and unanswered is not before:
                buffers.encoder.doubt(unanswered)
            else:
                buffers.encoder.rollback()
            buffers.receiver.undo_()
            if self._writer.names.unsure or self._writer.attempts > 1:
                buffers.share_no_more_()
            buffers.receiver.give_up_(lost=shared)
            if isinstance(exc, (UnknownSession, StateRolledBack)):
                raise self._joined.explained(exc) from exc
            raise
        buffers.sharing.settled()
        shared = shared and buffers.sharing.possible
        if arrived is None and len(present) < len(buffers.parameters):
            # What has no gradient, and is as it was, is not touched.
            arrived = sorted({*present, *buffers.receiver.edited(buffers.addresses)})
        copying = time.perf_counter()
        buffers.receiver.settle_(arrived)
        copy_s = time.perf_counter() - copying
        assert reply is not None
        if self._residuals:
            buffers.encoder.commit(counts=reply.receipt.counts)
        self._joined.version = reply.version
        if reply.consistency is not None:
            self._joined.follow_(reply.consistency)
        total_s = time.perf_counter() - began
        return StepReport.of(
            reply.outcome,
            duplicate=reply.duplicate,
            earlier=self._writer.names.tell(),
            bytes_sent=0 if shared else nbytes_of(payload),
            bytes_received=received.payload_bytes,
            attempts=self._writer.attempts,
            durability=reply.durability,
            path="" if not payload else "shared memory" if shared else "bodies",
            seconds={"total": total_s, **reply.times, "send": received.receive_s, "copy": copy_s},
        )

    # -- edits ------------------------------------------------------------------------------------------------------

    def settle_edits(self, addresses: list[int]) -> None:
        """Send edited parameters now, or have the next push find them while it is sent; see `Link.settle_edits`."""
        buffers = self._buffers
        large = buffers.sender.large and buffers.on_cpu and not buffers.sharing.possible
        if large and not self._writer.names.unsure and not self._edited_last:
            self._unlooked = addresses
        else:
            self._send_edits(addresses)

    def _send_edits(self, addresses: list[int] | None) -> None:
        """Send what was edited, unless that is done already (None)."""
        if addresses is None:
            return
        edited = self._buffers.receiver.edited(addresses)
        self._edited_last = bool(edited)
        if edited:
            self._putting.parameters(edited)
