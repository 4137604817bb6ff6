"""One worker's writes on their way: named, repeated until they are answered, and sorted out when they were given up.

`farstep.http_link.sequence` decides; here is the asking and the sending.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import httpx

from farstep.conversation import Arrived, BuffersFor, Conversation, Received
from farstep.conversation.answers import Page, Reply
from farstep.errors import (
    FarstepError,
    Fenced,
    IdempotencyMismatch,
    InvalidRequest,
    SequenceGap,
    StateRolledBack,
    Truncated,
    Unavailable,
)
from farstep.heartbeat import WITHIN_S
from farstep.http_link.retry import RetryPolicy
from farstep.http_link.sequence import Names, Unanswered
from farstep.overlap import BROKEN, Overlapped
from farstep.protocol.growth import AppendHead, outgrown
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep.transport import Answer, this
from farstep.transport.pieces import Payload

MEMORY: Final = frozenset({"area", "fill", "deliver"})
"""Header keys of a push whose gradients are in shared memory."""
MakeHead = Callable[[WriteName, str], PushHead | PutHead | AppendHead]
"""Given a name and the session's incarnation, return the header of a write."""


class Writer:
    """Send the writes of one worker to one session.

    Args:
        server: the conversation with its server.
        session: its name.
        worker: the worker's name.
        retry: how long a write is repeated.
        barrier_s: seconds a push may wait for those of other workers.

    Attributes:
        names: what has been written.
        incarnation: the life of the session that was joined.
        shard: the conversation with the server that has the session's tensors.
        share_again: given the key of shared memory that the server does not know, offers it again; returns whether the
            server takes it.
        settle: told of an unanswered write that turns out to have been applied; returns whether the payload of the next
            one has to be made again.
    """

    def __init__(
        self, server: Conversation, session: str, worker: str, *, retry: RetryPolicy, barrier_s: float
    ) -> None:
        self.names = Names(worker)
        self.incarnation = ""
        self.settle: Callable[[Unanswered], bool] = lambda _: False
        self.share_again: Callable[[str], bool] = lambda _: False
        self._server = self.shard = server
        self._session = session
        self._retry = retry
        self._barrier_s = barrier_s
        self._process = this.process
        self._path = f"/v1/sessions/{quote(session)}"
        self.worker_path = f"{self._path}/workers/{quote(worker)}"

    def wait_for(self, barrier_s: float, timeout_s: float) -> None:
        """Take other times from now on: how long a push may wait for others, and how long a write is repeated."""
        self._barrier_s = barrier_s
        self._retry.timeout_s = timeout_s

    @property
    def forked(self) -> bool:
        """Return whether this process is a fork of the one that joined, whose worker, session and streams these are."""
        return self._process is not this.process

    @property
    def server(self) -> str:
        """Return the address of the server."""
        return self._server.server

    @property
    def attempts(self) -> int:
        """Return how often the last write was sent."""
        return self._retry.attempts

    def join(self, epoch: int, incarnation: str) -> None:
        """Begin a new epoch of the worker in a session's life, from this process."""
        self._process = this.process
        self.names.join(epoch)
        self.incarnation = incarnation

    def push(
        self,
        head: MakeHead,
        payload: Payload,
        buffers_for: BuffersFor,
        arrived: Arrived | None = None,
        begun: Overlapped | None = None,
        again: Callable[[], Payload] | None = None,
    ) -> Received:
        """Send gradients; see `_write`."""
        return self._write(
            "Pushing to", "POST", f"{self._path}/push", head, payload, buffers_for, arrived, begun, again
        )

    def send_push(self, header: Mapping[str, Any], payload: Payload) -> Answer:
        """Send gradients once, and return when the head of an answer is there."""
        return self.shard.send("POST", f"{self._path}/push", header, payload, wait_s=self._barrier_s)

    def put(self, head: MakeHead, payload: Payload) -> Reply:
        """Send contents; see `_write`."""
        reply: Reply | None = None

        def buffers_for(header: dict[str, Any]) -> Sequence[memoryview]:
            nonlocal reply
            reply = Reply.of(header, self.incarnation)
            return []

        self._write("Writing", "PUT", f"{self._path}/contents", head, payload, buffers_for)
        assert reply is not None
        return reply

    def append(self, head: MakeHead, payload: Payload, buffers_for: BuffersFor) -> Received:
        """Send a param group; see `_write`."""
        return self._write("Adding a param group to", "POST", f"{self._path}/groups", head, payload, buffers_for)

    def _write(
        self,
        doing: str,
        method: str,
        path: str,
        head: MakeHead,
        payload: Payload,
        buffers_for: BuffersFor,
        arrived: Arrived | None = None,
        begun: Overlapped | None = None,
        again: Callable[[], Payload] | None = None,
    ) -> Received:
        """Repeat a named write until it is answered. Its sequence is consumed when, and only when, it is committed.

        Args:
            doing, method, path: what it is, and its route.
            head: makes its header.
            payload: what follows it.
            buffers_for: says where the answer's payload goes.
            arrived: called while it comes.
            begun: the first try, which is on its way already.
            again: makes the payload again; see `settle`.

        Raises:
            Fenced: this process was forked from the worker's.
            FarstepError: the server refused it, or `Unavailable`: its outcome is unknown.
        """
        self._check_mine()
        while True:
            header, settled = self._named(head, payload)
            if settled and again is not None:
                payload = again()
            self._check_known(header)

            def attempt(header: Mapping[str, Any] = header, payload: Payload = payload) -> Received:
                nonlocal begun
                if begun is not None:
                    first, begun = begun, None
                    try:
                        return self.shard.receive(first.finish(), buffers_for, path, arrived=arrived)
                    except Truncated:  # it came too slowly, so nothing has happened
                        first.outcome = BROKEN
                if self._retry.attempts > 1:  # an answer to the first try may still come where it was told to
                    header = {key: value for key, value in header.items() if key != "deliver"}
                body: Payload = () if "area" in header else payload
                send = partial(self.shard.data, method, path, arrived=arrived, wait_s=self._barrier_s)
                try:
                    return send(header, body, buffers_for)
                except InvalidRequest as exc:
                    if exc.field != "area" or exc.side != "server" or "area" not in header:
                        raise
                    # The server was started again. What the write is called, and what it says, stays the same.
                    if self.share_again(header["area"]):
                        return send(header, body, buffers_for)
                    header = {key: value for key, value in header.items() if key not in MEMORY}
                    return send(header, payload, buffers_for)

            try:
                received = self._retry.call(f"{doing} session {self._session!r}", self._server.server, attempt)
            except IdempotencyMismatch:
                if not self.names.mismatched(header["seq"]):
                    raise
            except BaseException as exc:
                self.names.failed(header, payload, exc)
                if self._went_back(exc):
                    raise StateRolledBack(f"The session knows nothing of {self._last}.", side="server") from exc
                raise
            else:
                self.names.committed(header["seq"])
                return received

    @property
    def _last(self) -> str:
        return f"write {self.names.last} of epoch {self.names.epoch} of worker {self.names.worker!r}"

    def _went_back(self, error: BaseException) -> bool:
        """Return whether a refusal shows that the session has forgotten a write that it acknowledged, or this epoch.

        No server does that without a word, unless its disk was exchanged for an older copy. One that has no epoch of a
        worker at all was not heard of it for long.
        """
        match error:
            case SequenceGap(side="server", extra={"expected": int(expected)}):
                return expected <= self.names.last
            case Fenced(side="server"):
                with suppress(FarstepError, httpx.TransportError):
                    page = Page.of(self._server.control("GET", self.worker_path))
                    return page.incarnation == self.incarnation and 0 < page.epoch < self.names.epoch
        return False

    def other_life(self) -> StateRolledBack | None:
        """Return what the server says of the life of the session that was joined; None if it was not rolled back.

        Raises:
            httpx.TransportError: no answer came.
        """
        try:
            document = {"epoch": self.names.epoch, "incarnation": self.incarnation}
            self._server.control("PUT", f"{self.worker_path}/lease", document, within_s=WITHIN_S)
        except StateRolledBack as exc:
            return exc
        except FarstepError:
            pass
        return None

    def _check_mine(self) -> None:
        """Refuse a second process under one name: of two equal writes one would pass for a repetition."""
        if self.forked:
            raise Fenced(
                f"This process was forked from worker {self.names.worker!r} of session {self._session!r}.",
                remedy="Make an optimizer of its own in each process, or take the worker over with rejoin().",
                side="client",
            )

    def _check_known(self, header: Mapping[str, Any]) -> None:
        """Refuse a write of a worker that does not know a group of its own, because it got no answer to it.

        Raises:
            Fenced: the group has to be added again first, which finds it there.
        """
        before = self.names.unanswered
        if before is not None and self.names.outgrown and "group" not in header:
            group = int(before.header["group"])
            raise outgrown(self._session, self.names.worker, group, by=self.names.worker, side="client")

    def _named(self, head: MakeHead, payload: Payload) -> tuple[Mapping[str, Any], bool]:
        """Return a write's header, under a new name or as it was sent before; ask the server if that is not clear.

        And whether its payload has to be made again, now that an earlier write turns out to have been applied.
        """
        header = head(self.names.next(), self.incarnation).to_header()
        if not self.names.unsure:
            return header, False
        before = self.names.unanswered
        repeated = before is not None and before.has_content_of(header, payload)

        def attempt() -> Page:
            page = Page.of(self._server.control("GET", self.worker_path))
            if page.waiting and page.epoch == self.names.epoch and not repeated:
                raise Unavailable("an earlier push of this worker still waits at the barrier")
            return page

        what = f"Asking session {self._session!r} for the last write of worker {self.names.worker!r}"
        page = self._retry.call(what, self._server.server, attempt)
        if page.incarnation != self.incarnation or page.epoch != self.names.epoch:
            return header, False  # which the server will refuse, in the right words
        if before is not None and repeated:
            return before.header, False
        if page.sequence < self.names.last:
            raise StateRolledBack(f"The session knows nothing of {self._last}.", side="server")
        self.names.learn(page.sequence)
        settled = before is not None and self.names.earlier == "applied" and self.settle(before)
        return head(self.names.next(), self.incarnation).to_header(), settled
