"""The link over HTTP: join a session, push and pull its tensors, and survive what networks do.

    JoinedSession    which session it is, and the version that is here
    WorkerBuffers    the parameters, and the memory through which tensors move
    Writer      names writes, and repeats them
    Putting     values and state of this worker's that replace the session's
    Pushing     gradients out, parameters back
    Reader      what is read of the session

Every write has a name. A write that got no answer is repeated under the same name until one comes or the time is up; if
it was given up, `farstep.http_link.sequence` says what the next write has to do so that nothing is applied twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, cast
from urllib.parse import quote

import httpx
from torch import Tensor

from farstep.conversation import READ_TIMEOUT_S, Conversation
from farstep.conversation.answers import Joined, Reply, Shard
from farstep.conversation.replies import invalid_answer
from farstep.errors import FarstepError, Unavailable
from farstep.heartbeat import WITHIN_S, Heartbeat
from farstep.http_link.buffers import Sharing, WorkerBuffers
from farstep.http_link.joined import JoinedSession
from farstep.http_link.pushing import Pushing
from farstep.http_link.reader import Putting, Reader
from farstep.http_link.retry import RetryPolicy
from farstep.http_link.writer import Writer
from farstep.link import Link, Options, Parameter, SessionSpec, Start, in_ordinary_memory
from farstep.overlap import OTHERS, UNUSED, Overlapped, Overlapping
from farstep.protocol.consistency import Consistency, to_options
from farstep.protocol.fields import FieldKind, State
from farstep.protocol.growth import AppendHead, NewParameter
from farstep.protocol.messages import Evaluation, WriteName
from farstep.protocol.receipt import StepReport
from farstep.protocol.unix import path_of_url
from farstep.settings import WorkerSettings
from farstep.tensors import outgoing

CLOSE_TIMEOUT_S = 2.0
GROUPS_PAGE: Final = 500
"""Param groups whose options are asked for at once: as many as a server gives."""


class HttpLink(Link):
    """A worker's way to a session on a server."""

    @in_ordinary_memory
    def __init__(
        self, spec: SessionSpec, parameters: Sequence[Tensor], settings: WorkerSettings, start: Start | None = None
    ) -> None:
        address = cast(str, settings.server)
        self._settings = settings
        self._path = f"/v1/sessions/{quote(spec.name)}"
        self._server = self._shard = self._conversation(address)
        self._retry = RetryPolicy(settings.timeout_s)
        barrier_s = settings.consistency.longest_wait_s
        self._writer = Writer(
            self._server,
            spec.name,
            settings.worker,
            retry=RetryPolicy(settings.timeout_s + barrier_s),
            barrier_s=barrier_s,
        )
        self._reader = Reader(self._server, spec.name, retry=self._retry)
        self._joined = JoinedSession(spec, settings, self._writer)
        own_socket = path_of_url(address) is not None and settings.transport is None
        sharing = Sharing(self._server, self._writer.worker_path, possible=own_socket and not settings.wire)
        self._buffers = WorkerBuffers(parameters, settings.wire, sharing)
        self._writer.settle = self._buffers.settle
        self._writer.share_again = self._buffers.sharing.offer_again
        self._overlapping = Overlapping()
        self._joined_options: list[Options] | None = None
        self._asked = False  # to join, whatever the answer was
        self._putting = Putting(self._joined, self._buffers, self._writer)
        self._pushing = Pushing(self._joined, self._buffers, self._writer, self._overlapping, self._putting)
        try:
            self._join(start or Start())
        except BaseException:
            self.close()
            raise

    def _conversation(self, address: str) -> Conversation:
        return Conversation(
            address,
            self._settings.token,
            transport=self._settings.transport,
            # A connection that has gone silent is given up in time for another try.
            read_timeout_s=min(READ_TIMEOUT_S, self._settings.timeout_s / 2),
        )

    @property
    def version(self) -> int:
        return self._joined.version

    @property
    def durability(self) -> str:
        return self._joined.durability

    @property
    def fields(self) -> Mapping[str, FieldKind]:
        return self._joined.fields

    @property
    def has_initial_state(self) -> bool:
        return self._joined.has_initial_state

    @property
    def joined_options(self) -> list[Options] | None:
        return self._joined_options

    # -- joining ----------------------------------------------------------------------------------------------------

    def _join(self, start: Start) -> bool:
        """Create or join the session; return whether this worker gave it its first contents."""
        self._buffers.share_no_more_()
        self._buffers.encoder.forget()
        self._overlapping.end(OTHERS)
        document = {**self._joined.spec.to_document(), "worker": self._settings.worker}
        if not self._settings.named:
            document["named"] = False
        if self._settings.options is not None:
            document["options"] = self._settings.options

        def attempt() -> bool:
            self._asked = True
            joined = Joined.of(self._server.control("POST", "/v1/sessions", document))
            self._go_to(joined.placement)
            self._joined.join_(joined)
            self._joined_options = None if joined.created else joined.groups
            if not joined.initialise and not joined.initialised:
                raise Unavailable("another worker is sending the session's first parameters")
            return joined.initialise

        chosen = self._retry.call(f"Joining session {self._joined.spec.name!r}", self._server.server, attempt)
        if chosen:
            state = None if start.state is None else dict(enumerate(start.state(self._joined.fields)))
            if self._putting.begin(state, start.version).applied:
                return True
        self.pull()
        return False

    def _go_to(self, placement: tuple[Shard, ...]) -> None:
        """Speak with the server that has the session's tensors, which may be another one than was asked.

        Raises:
            InvalidAnswer: there is more than one, or it has not all of them.
        """
        count = len(self._buffers.parameters)
        if len(placement) != 1 or placement[0].segments != (0, count):
            raise invalid_answer(
                f"The placement has {len(placement)} shards, of which the first holds {placement[0].segments}; this "
                f"client takes one with all {count} parameters."
                if placement
                else "The placement has no shard.",
                "placement",
            )
        (shard,), before = placement, self._shard
        self._shard = self._server
        if shard.url and shard.url != self._server.server:
            self._shard = before if before.server == shard.url else self._conversation(shard.url)
        if before is not self._server and before is not self._shard:
            before.close()
        self._writer.shard = self._reader.shard = self._shard
        if self._shard is not self._server:
            self._buffers.sharing.possible = False

    @in_ordinary_memory
    def rejoin(self, start: Start) -> bool:
        return self._join(start)

    # -- pushes -----------------------------------------------------------------------------------------------------

    @in_ordinary_memory
    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
        return self._pushing.push(gradients, groups, evaluation)

    def begin_push(self, order: Sequence[int], groups: Mapping[int, Options]) -> Overlapped | None:
        return self._pushing.begin_push(order, groups)

    @in_ordinary_memory
    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        return self._pushing.skip(groups)

    def edited(self, addresses: list[int]) -> list[int]:
        return self._buffers.receiver.edited(addresses)

    @in_ordinary_memory
    def settle_edits(self, addresses: list[int]) -> None:
        self._pushing.settle_edits(addresses)

    @in_ordinary_memory
    def stand_in(self, index: int) -> Tensor | None:
        return self._buffers.receiver.stand_in(index)

    @in_ordinary_memory
    def rebind(self, parameters: Sequence[Tensor]) -> bool:
        self._buffers.rebind_(parameters)
        return True

    # -- other writes -----------------------------------------------------------------------------------------------

    @in_ordinary_memory
    def write(self, parameters: Sequence[int] = (), state: Mapping[int, State | None] | None = None) -> int:
        if state is None:
            self._putting.parameters(parameters)
        else:
            self._putting.states(state)
        return self._joined.version

    @in_ordinary_memory
    def write_view(self, view: str, values: Sequence[Tensor]) -> None:
        self._putting.view(view, values)

    @in_ordinary_memory
    def append(self, options: Options, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> bool:
        group, count = len(self._joined.spec.groups), len(self._buffers.parameters) + len(tensors)
        described = tuple(NewParameter(each.name, each.shape, each.dtype) for each in parameters)
        self._buffers.share_no_more_()  # it has no room for more
        receiver = self._buffers.receiver.grown(tensors)

        def head(name: WriteName, incarnation: str) -> AppendHead:
            return AppendHead(name, incarnation, group, options, described)

        arrived: list[int] | None = None
        reply: Reply | None = None

        def buffers_for(header: dict[str, Any]) -> Sequence[memoryview]:
            nonlocal arrived, reply
            reply = Reply.of(header, self._writer.incarnation)
            arrived = self._joined.arriving(header, count, whole=not reply.receipt.applied)
            return receiver.targets(arrived, whole=True)

        with self._joined.there():
            self._writer.append(head, [outgoing(each) for each in tensors], buffers_for)
        assert reply is not None
        receipt = reply.receipt
        if not receipt.applied:
            receiver.settle_(arrived)
            self._joined.version = reply.version
        elif receipt.base == self._joined.version:  # else others have stepped: here is still the version before
            self._joined.version = receipt.version
        self._joined.grow_(options, parameters)
        self._buffers.grow_(tensors, receiver)
        self._overlapping.forget_()
        return receipt.applied

    # -- the lease --------------------------------------------------------------------------------------------------

    def heartbeat(self, *, once: bool = False) -> Heartbeat:
        document = {"epoch": self._writer.names.epoch, "incarnation": self._writer.incarnation}
        path = f"{self._writer.worker_path}/lease"
        retry = RetryPolicy(0.0 if once else self._settings.timeout_s)

        def attempt() -> Heartbeat:
            answer = self._server.control("PUT", path, document, within_s=WITHIN_S if once else None)
            return Heartbeat.of(answer)

        seen = self._joined.seen  # now: an answer to another thread may show a later one before this one is read
        with self._joined.there():
            what = f"Renewing the lease of worker {self._settings.worker!r} in session {self._joined.spec.name!r}"
            heartbeat = retry.call(what, self._server.server, attempt)
            self._joined.check_version(heartbeat.version, seen)
            return heartbeat

    # -- the mode ---------------------------------------------------------------------------------------------------

    @property
    def consistency(self) -> Consistency:
        return self._joined.spec.consistency

    def set_consistency(self, mode: Consistency) -> None:
        def attempt() -> None:
            self._server.control("PUT", f"{self._path}/consistency", {"consistency": to_options(mode)})

        with self._joined.there():
            what = f"Setting the consistency mode of session {self._joined.spec.name!r}"
            self._retry.call(what, self._server.server, attempt)
        self._joined.follow_(mode)

    def options_in_force(self) -> list[Options]:
        what = f"Asking session {self._joined.spec.name!r} for its options"
        found: list[Options] = []

        def attempt() -> list[Options]:
            after = f"&after={len(found) - 1}" if found else ""
            page = self._server.control("GET", f"{self._path}/groups?limit={GROUPS_PAGE}{after}")
            return cast("list[Options]", page["groups"])

        with self._joined.there():
            while True:
                page = self._retry.call(what, self._server.server, attempt)
                found += page
                if len(page) < GROUPS_PAGE:
                    return found

    # -- reads ------------------------------------------------------------------------------------------------------

    @in_ordinary_memory
    def pull(self) -> int:
        self._buffers.leave_foreign_()
        edited = self._buffers.receiver.edited(self._buffers.addresses)
        try:
            with self._joined.there():
                received = self._reader.parameters(
                    self._buffers.receiver,
                    self._check,
                    self._buffers.wire_parameters,
                    worker=(self._settings.worker, self._writer.names.epoch),
                )
        except BaseException:
            self._buffers.receiver.keep_(but=edited)
            raise
        self._buffers.receiver.settle_(None)
        self._joined.version = received.header["version"]
        return self._joined.version

    @in_ordinary_memory
    def stateful(self) -> tuple[int, list[bool]]:
        with self._joined.there():
            return self._reader.stateful(self._buffers.forms, self._check)

    @in_ordinary_memory
    def read_state(self, indices: Sequence[int]) -> list[State | None]:
        with self._joined.there():
            return self._reader.states(self._joined.fields, self._buffers.forms, indices, self._check)

    @in_ordinary_memory
    def read_view(self, view: str) -> list[Tensor]:
        with self._joined.there():
            return self._reader.view(view, self._buffers.forms, self._check)

    def _check(self, header: Mapping[str, Any]) -> None:
        self._joined.check_arriving(header, len(self._buffers.parameters))

    # -- leaving ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._joined.forked:
            return  # a fork of the worker must not end the session of its parent
        self._overlapping.end(UNUSED)
        epoch = self._writer.names.epoch
        try:
            with suppress(FarstepError, httpx.HTTPError, OSError):  # what is gone need not be left
                if self._settings.private and self._asked:  # there may be one though its answer never came
                    self._server.control("DELETE", self._path, within_s=CLOSE_TIMEOUT_S)
                elif epoch:
                    path = f"{self._writer.worker_path}?epoch={epoch}"
                    self._server.control("DELETE", path, within_s=CLOSE_TIMEOUT_S)
        finally:
            self._server.close()
            if self._shard is not self._server:
                self._shard.close()
            self._overlapping.close(CLOSE_TIMEOUT_S)
