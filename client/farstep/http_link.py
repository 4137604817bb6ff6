"""The link over HTTP: join a session, push and pull its tensors, and survive what networks do.

Every write has a name. A write that got no answer is repeated under the same name until one comes or the time is up; if
it was given up, `farstep.sequence` says what the next write has to do so that nothing is applied twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast
from urllib.parse import quote

import httpx
from torch import Tensor

from farstep.arrivals import Arrivals
from farstep.consistency import Consistency, from_options, longest_wait_s, to_options
from farstep.conversation import READ_TIMEOUT_S, Conversation
from farstep.departures import Departures
from farstep.errors import FarstepError, SessionLost, Unavailable, UnknownSession
from farstep.fields import FieldKind
from farstep.foresight import STREAMED
from farstep.growth import AppendHead, NewParameter, outgrown
from farstep.link import Link, Options, Parameter, SessionSpec, Start, State, shapes_of, worth_sending
from farstep.looking import Edited, Looking
from farstep.messages import Evaluation, Fill, PushHead, PutHead, Receipt, Sparse, Wanted, WriteName
from farstep.narrow_arrivals import NarrowArrivals
from farstep.narrowing import Narrowing
from farstep.overlap import LEAST_BYTES, OTHERS, UNUSED, Overlapped
from farstep.overlapping import Overlapping
from farstep.patience import Patience
from farstep.payload import Payload, nbytes_of
from farstep.presence import PRESENT
from farstep.reader import Reader
from farstep.report import StepReport
from farstep.settings import Place
from farstep.sharing import Sharing
from farstep.staging import outgoing, outgoing_contents, outgoing_gradients
from farstep.transport import Supply
from farstep.unix import path_of_url
from farstep.wire import from_ranges, to_ranges
from farstep.wire.memory import TORCH_DTYPES
from farstep.writer import Writer

CLOSE_TIMEOUT_S = 2.0


class HttpLink(Link):
    """A worker's way to a session on a server."""

    def __init__(
        self, spec: SessionSpec, parameters: Sequence[Tensor], place: Place, start: Start | None = None
    ) -> None:
        self._spec = spec
        self._parameters = list(parameters)
        self._place = place
        self._path = f"/v1/sessions/{quote(spec.name)}"
        self._server = Conversation(
            cast(str, place.server),
            place.token,
            transport=place.transport,
            # A connection that has gone silent is given up in time for another try.
            read_timeout_s=min(READ_TIMEOUT_S, place.timeout_s / 2),
        )
        self._patience = Patience(place.timeout_s)
        barrier_s = longest_wait_s(place.consistency)
        self._writer = Writer(
            self._server,
            spec.name,
            place.worker,
            patience=Patience(place.timeout_s + barrier_s),
            barrier_s=barrier_s,
        )
        self._reader = Reader(self._server, spec.name, patience=self._patience)
        self._wire_gradients, self._wire_parameters = place.wire.dtypes
        self._arrivals = (
            Arrivals(self._parameters)
            if self._wire_parameters is None
            else NarrowArrivals(self._parameters, self._wire_parameters)
        )
        self._set_out()
        own_socket = path_of_url(cast(str, place.server)) is not None and place.transport is None
        self._sharing = Sharing(self._server, self._writer.worker_path, possible=own_socket and not place.wire)
        self._overlapping = Overlapping()
        # float16 gradients are looked at before anything is sent.
        self._streams = self._wire_gradients != "float16" and all(p.device.type == "cpu" for p in parameters)
        self._unlooked: list[int] | None = None  # addresses of parameters that the next push has to look at
        self._edited_last = False  # whether the last look found an edit: then the next one comes before the push
        self._version = 0
        self._process = os.getpid()
        try:
            self._join(start or Start())
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        return self._version

    @property
    def fields(self) -> Mapping[str, FieldKind]:
        return self._fields

    @property
    def eager(self) -> bool:
        return self._eager

    # -- joining ----------------------------------------------------------------------------------------------------

    def _join(self, start: Start) -> bool:
        """Create or join the session; return whether this worker gave it its first contents."""
        self._share_no_more()
        self._overlapping.end(OTHERS)
        document = {**self._spec.to_document(), "worker": self._place.worker}

        def attempt() -> bool:
            joined = self._server.control("POST", "/v1/sessions", document)
            self._fields = cast("dict[str, FieldKind]", joined["fields"])
            self._eager = bool(joined["eager"])
            self._writer.join(int(joined["epoch"]), str(joined["incarnation"]))
            if not joined["initialise"] and not joined["initialised"]:
                raise Unavailable("another worker is sending the session's first parameters")
            return bool(joined["initialise"])

        chosen = self._patience.call(f"Joining session {self._spec.name!r}", self._server.server, attempt)
        if chosen:
            state = None if start.state is None else dict(enumerate(start.state(self._fields)))
            fields = ["param", *self._state_fields(state)]
            if self._put(range(len(self._parameters)), fields, state, initial=True, version=start.version).applied:
                return True
        self.pull()
        return False

    def rejoin(self, start: Start) -> bool:
        return self._join(start)

    # -- writes -----------------------------------------------------------------------------------------------------

    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
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
        """Say whether a push that was begun is what the step sends, which no edit of a parameter has to precede.

        Two comparisons of memory, side by side: all cores are the step's now.
        """
        looking = None if unlooked is None else Looking(partial(self._arrivals.checks, unlooked))
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
        present: Sequence[int] = range(len(self._parameters))
        sparse: Sequence[Sparse] = ()
        before = self._writer.names.unanswered
        order = None if before is None else before.header.get("order")
        payload: Payload | None = None
        if order is None:
            looking = None if unlooked is None else Looking(partial(self._arrivals.checks, unlooked))
            payload = self._departures.payload(gradients, looking, at_once=self._sharing.possible)
        if payload is None:
            present, sparse, payload = outgoing_gradients(gradients, self._parameters, self._narrowing)
            if order is not None and not sparse and sorted(order) == present:
                views = dict(zip(present, payload, strict=True))  # it may be that push again
                payload = [views[index] for index in order]
            else:
                order = None
        if not isinstance(payload, Supply):
            self._send_edits(unlooked)
        fill = None if sparse or evaluation else self._fill(present, gradients)
        head = self._head(present, groups, evaluation=evaluation, order=order, sparse=sparse, fill=fill)
        return self._push(head, present, payload, began, shared=fill is not None)

    def _head(
        self,
        present: Sequence[int],
        groups: Mapping[int, Options],
        *,
        evaluation: Evaluation | None = None,
        order: Sequence[int] | None = None,
        sparse: Sequence[Sparse] = (),
        fill: Fill | None = None,
    ) -> Callable[[WriteName, str], PushHead]:
        segments = None if len(present) == len(self._parameters) else to_ranges(present)
        # Of several rounds only the last one changes parameters.
        wanted: Wanted = "all" if self._spec.policy.accumulate == 1 else "changed"

        def head(name: WriteName, incarnation: str) -> PushHead:
            return PushHead(
                name,
                incarnation,
                self._version,
                wanted,
                self._version,
                segments=segments,
                sparse=tuple(sparse),
                groups=groups,
                evaluation=evaluation,
                wire_gradients=self._wire_gradients,
                wire_parameters=self._wire_parameters,
                fill=fill,
                order=None if order is None else tuple(order),
            )

        return head

    def begin_push(self, order: Sequence[int], groups: Mapping[int, Options]) -> Overlapped | None:
        names = self._writer.names
        if not self._streams or names.unsure or self._sharing.possible or self._process != os.getpid():
            return None
        if sum(self._parameters[index].nbytes for index in order) < LEAST_BYTES:
            return None
        header = self._head(sorted(order), groups, order=order)(names.next(), self._writer.incarnation).to_header()
        send = partial(self._writer.send_push, header)
        return self._overlapping.begin(header, order, self._parameters, self._wire_gradients, send)

    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        self._overlapping.end(OTHERS)
        unlooked, self._unlooked = self._unlooked, None
        self._send_edits(unlooked)

        def head(name: WriteName, incarnation: str) -> PushHead:
            have = self._version
            return PushHead(
                name,
                incarnation,
                have,
                "changed",
                have,
                segments=[],
                groups=groups,
                skip=True,
                wire_parameters=self._wire_parameters,
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
    ) -> StepReport:
        """Send a push with the gradients of the parameters `present`, and take in what comes back."""
        arrived: list[int] | None = None

        def place(header: dict[str, Any]) -> Sequence[memoryview]:
            nonlocal arrived
            self._arrivals.undo_()  # what an earlier try has brought
            arrived = self._arriving(header, len(self._parameters))
            if header.get("delivered"):
                return []
            if self._writer.attempts > 1:
                self._share_no_more()
            if arrived is None and len(present) == len(self._parameters):
                return self._arrivals.landing()
            return self._arrivals.targets(arrived)

        try:
            with self._session_there():
                received = self._writer.push(head, payload, place, self._advance, begun)
        except BaseException:
            self._arrivals.undo_()
            if self._writer.names.unsure or self._writer.attempts > 1:
                self._share_no_more()
            self._arrivals.give_up_(lost=shared)
            raise
        if arrived is None and len(present) < len(self._parameters):
            # What has no gradient, and is as it was, is not touched.
            arrived = sorted({*present, *self._arrivals.edited(self._addresses())})
        copying = time.perf_counter()
        self._arrivals.settle_(arrived)
        copy_s = time.perf_counter() - copying
        self._version = int(received.header["version"])
        receipt = Receipt.from_header(received.header["receipt"])
        if (mode := received.header.get("consistency")) is not None:
            self._follow(from_options(mode))
        total_s = time.perf_counter() - began
        seconds = {key: float(value) for key, value in received.header.get("times", {}).items()}
        return StepReport.of(
            receipt,
            duplicate=bool(received.header["duplicate"]),
            earlier=self._writer.names.tell(),
            bytes_sent=0 if shared else nbytes_of(payload),
            bytes_received=received.payload_bytes,
            attempts=self._writer.attempts,
            path="" if not payload else "shared memory" if shared else "bodies",
            seconds={"total": total_s, **seconds, "send": received.receive_s, "copy": copy_s},
        )

    def _advance(self, received_bytes: int) -> None:
        self._arrivals.advance_(received_bytes)

    def _fill(self, present: Sequence[int], gradients: Sequence[Tensor | None]) -> Fill | None:
        """Put gradients into shared memory, if there is any and nothing is unclear; return how to name them."""
        if self._writer.names.unsure:
            return None
        self._own_memory()
        if self._sharing.offer(self._writer.names.epoch, self._parameters) and self._sharing.area:
            halves = self._sharing.area.parameters
            self._arrivals = self._arrivals.within({TORCH_DTYPES[name]: flat for name, flat in halves.items()})
        return self._sharing.fill(present, gradients)

    def _share_no_more(self) -> None:
        """Give shared memory up until more is offered."""
        if self._sharing.area is not None:
            self._arrivals = self._arrivals.within(None)
            self._sharing.give_up()

    def _own_memory(self) -> None:
        """Leave shared memory to the process that this one was forked from."""
        if self._sharing.foreign:
            self._share_no_more()

    def write(self, parameters: Sequence[int] = (), state: Mapping[int, State | None] | None = None) -> int:
        if state is None:
            self._put(parameters, ["param"], None)
        else:
            self._put(sorted(state), self._state_fields(state), state)
        return self._version

    def _state_fields(self, state: Mapping[int, State | None] | None) -> list[str]:
        return [] if state is None else [*worth_sending(self._fields, state.values()), PRESENT]

    def _put(
        self,
        indices: Sequence[int],
        fields: Sequence[str],
        state: Mapping[int, State | None] | None,
        *,
        initial: bool = False,
        version: int = 0,
    ) -> Receipt:
        self._own_memory()
        segments = None if len(indices) == len(self._parameters) else to_ranges(indices)
        shapes = shapes_of(self._fields, state or {})
        chosen = [(self._parameters[i], state[i] if state else None) for i in indices]
        payload = outgoing_contents(fields, self._fields, chosen)

        def head(name: WriteName, incarnation: str) -> PutHead:
            return PutHead(name, incarnation, tuple(fields), segments, initial, version, shapes)

        with self._session_there():
            received = self._writer.put(head, payload)
        self._version = int(received.header["version"])
        if "param" in fields:
            self._arrivals.keep_(indices)
        return Receipt.from_header(received.header["receipt"])

    def append(self, options: Options, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> bool:
        group, everything = len(self._spec.groups), [*self._parameters, *tensors]
        described = tuple(NewParameter(each.name, each.shape, each.dtype) for each in parameters)
        self._share_no_more()  # what there is has no room for more
        arrivals = self._arrivals.grown(tensors)

        def head(name: WriteName, incarnation: str) -> AppendHead:
            return AppendHead(name, incarnation, group, options, described)

        arrived: list[int] | None = None

        def place(header: dict[str, Any]) -> Sequence[memoryview]:
            nonlocal arrived
            arrived = self._arriving(header, len(everything))
            return arrivals.targets(arrived, whole=True)

        with self._session_there():
            received = self._writer.append(head, [outgoing(each) for each in tensors], place)
        receipt = Receipt.from_header(received.header["receipt"])
        if not receipt.applied:
            arrivals.settle_(arrived)
            self._version = int(received.header["version"])
        elif receipt.base == self._version:  # else others have stepped: what is here is still of the version before
            self._version = receipt.version
        self._spec = replace(
            self._spec, groups=(*self._spec.groups, options), parameters=(*self._spec.parameters, *parameters)
        )
        self._parameters, self._arrivals = everything, arrivals
        self._set_out()
        self._overlapping.forget_()
        return receipt.applied

    # -- the mode ---------------------------------------------------------------------------------------------------

    @property
    def consistency(self) -> Consistency:
        return self._spec.consistency

    def set_consistency(self, mode: Consistency) -> None:
        def attempt() -> None:
            self._server.control("PUT", f"{self._path}/consistency", {"consistency": to_options(mode)})

        with self._session_there():
            what = f"Setting the consistency mode of session {self._spec.name!r}"
            self._patience.call(what, self._server.server, attempt)
        self._follow(mode)

    def _follow(self, mode: Consistency) -> None:
        """Go on with the mode that the session is in."""
        if mode != self._spec.consistency:
            self._spec = replace(self._spec, consistency=mode)
            barrier_s = longest_wait_s(mode)
            self._writer.wait_for(barrier_s, self._place.timeout_s + barrier_s)

    # -- reads ------------------------------------------------------------------------------------------------------

    def edited(self, addresses: list[int]) -> list[int]:
        return self._arrivals.edited(addresses)

    def settle_edits(self, addresses: list[int]) -> None:
        here = all(p.device.type == "cpu" for p in self._parameters)
        hidden = self._departures.large and here and not self._sharing.possible and not self._writer.names.unsure
        if hidden and not self._edited_last:
            self._unlooked = addresses
        else:
            self._send_edits(addresses)

    def _send_edits(self, addresses: list[int] | None) -> None:
        """Send what was edited, unless that is done already (None)."""
        if addresses is None:
            return
        edited = self._arrivals.edited(addresses)
        self._edited_last = bool(edited)
        if edited:
            self.write(edited)

    def rebind(self, parameters: Sequence[Tensor]) -> bool:
        self._parameters = list(parameters)
        self._arrivals.rebind_(parameters)  # the departures go by shapes and dtypes, which are the same
        return True

    def pull(self) -> int:
        self._own_memory()
        edited = self._arrivals.edited(self._addresses())
        try:
            with self._session_there():
                received = self._reader.parameters(
                    self._arrivals,
                    self._check_arriving,
                    self._wire_parameters,
                    worker=(self._place.worker, self._writer.names.epoch),
                )
        except BaseException:
            self._arrivals.keep_(but=edited)
            raise
        self._arrivals.settle_(None)
        self._version = int(received.header["version"])
        return self._version

    def stateful(self) -> tuple[int, list[bool]]:
        with self._session_there():
            return self._reader.stateful(self._parameters, self._check_arriving)

    def read_state(self, indices: Sequence[int]) -> list[State | None]:
        with self._session_there():
            return self._reader.states(self._fields, self._parameters, indices, self._check_arriving)

    def read_view(self, view: str) -> list[Tensor]:
        with self._session_there():
            return self._reader.view(view, self._parameters, self._check_arriving)

    def write_view(self, view: str, values: Sequence[Tensor]) -> None:
        def head(name: WriteName, incarnation: str) -> PutHead:
            return PutHead(name, incarnation, (view,))

        with self._session_there():
            self._writer.put(head, [outgoing(each) for each in values])

    def _check_arriving(self, header: Mapping[str, Any]) -> None:
        """Refuse what another life of the session answers, or a session that has grown."""
        if header["incarnation"] != self._writer.incarnation:
            raise self._lost("was created anew at")
        self._arriving(header, len(self._parameters))

    def _arriving(self, header: Mapping[str, Any], count: int) -> list[int] | None:
        """Return which parameters an answer holds, None for all that are here.

        Raises:
            Fenced: it holds all that the session has, which are not so many.
        """
        ranges = header.get("segments")
        if ranges is not None:
            return from_ranges(ranges, count, side="client")
        if header.get("count", count) != count:
            raise outgrown(self._spec.name, self._place.worker, len(self._spec.groups), side="client")
        return None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _set_out(self) -> None:
        half = self._wire_gradients
        self._narrowing = None if half is None else Narrowing(half, self._parameters)
        self._departures = Departures(self._parameters, self._narrowing)

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._parameters))

    @contextmanager
    def _session_there(self) -> Iterator[None]:
        try:
            yield
        except UnknownSession as exc:
            raise self._lost("is gone from") from exc

    def _lost(self, what: str) -> SessionLost:
        return SessionLost(
            f"Session {self._spec.name!r}, of which worker {self._place.worker!r} held version {self._version}, {what} "
            f"{self._server.server}: the server restarted, or somebody removed it.",
            remedy="Its optimizer state is lost, unless it was imported from a file: then call rejoin(), "
            "else load your last checkpoint and call rejoin(state_dict).",
            side="client",
        )

    def close(self) -> None:
        if self._process != os.getpid():
            return  # a fork of the worker must not end the session of its parent
        self._overlapping.end(UNUSED)
        epoch = self._writer.names.epoch
        path = self._path if self._place.private else f"{self._writer.worker_path}?epoch={epoch}"
        try:
            if epoch:
                with suppress(FarstepError, httpx.HTTPError, OSError):  # what is gone need not be left
                    self._server.control("DELETE", path, within_s=CLOSE_TIMEOUT_S)
        finally:
            self._server.close()
            self._overlapping.close(CLOSE_TIMEOUT_S)
