"""The data routes: msgpack messages in and out (`farstep/protocol/PROTOCOL.md`).

    POST /v1/sessions/{name}/push                 gradients in; receipt and parameters out
    GET  /v1/sessions/{name}/contents[?fields=&segments=]   parameters (the default) or state fields out
         /v1/sessions/{name}/contents?wire_parameters=      parameters out, encoded
         /v1/sessions/{name}/contents?worker=&epoch=        parameters out, to a worker that says who it is
    PUT  /v1/sessions/{name}/contents             parameters and state in
    POST /v1/sessions/{name}/groups               a param group and its parameters in

Each is a plain ASGI endpoint: the body is streamed into its final memory, and the answer sent from the memory of a held
version.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import parse_qs

import xxhash
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from farstep.errors import InvalidRequest
from farstep.protocol import from_ranges
from farstep.protocol.codecs import FULL, check_codec, codec_named
from farstep.protocol.consistency import to_options
from farstep.protocol.fields import NUMBERS, PRESENT, shapes_to_header
from farstep.protocol.growth import AppendHead
from farstep.protocol.header import VERSION
from farstep.protocol.messages import PushHead, PutHead, SharedPush
from farstep_service.optimizers.rule import Rule
from farstep_service.plan import Plan
from farstep_service.routes.bodies import Pace, answer_message, outgoing_of, read_body
from farstep_service.sessions import OVERHEAD_BYTES, Actor, Answer, AtMost, Intake, Reader, View
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings

WriteHead = TypeVar("WriteHead", PushHead, PutHead, AppendHead)
QUERY = frozenset({"fields", "segments", "wire_parameters", "worker", "epoch"})
"""The keys of a pull's query."""
Reserve = Callable[[int], None]
"""Called with the bytes of memory about to be allocated; raises `Busy` if they do not fit."""


class Endpoint(ABC):
    """Serve one data route of every session."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        actor = self._registry.find(scope["path_params"]["name"])
        with self._registry.in_flight() as reserve:
            await self.serve(actor, reserve, scope, receive, send)

    @abstractmethod
    async def serve(self, actor: Actor, reserve: Reserve, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to `actor`."""

    async def take(
        self,
        actor: Actor,
        reserve: Reserve,
        scope: Scope,
        receive: Receive,
        parse: Callable[[Mapping[str, Any]], WriteHead],
        begin: Callable[[WriteHead, int], Intake],
        *,
        largest: int,
    ) -> tuple[WriteHead, Intake, str]:
        """Receive a body into the memory of `begin`, and return its header, that memory and its fingerprint."""
        parts: list[tuple[WriteHead, Intake]] = []

        def buffers_for(header: dict[str, Any], body_bytes: int) -> Sequence[memoryview]:
            head = parse(header)
            known = not isinstance(body_bytes, AtMost)
            if known:
                reserve(body_bytes)
            intake = begin(head, body_bytes)
            if not known:  # the size follows from the header; the memory is allocated, but not touched yet
                reserve(sum(view.nbytes for view in intake.views))
            parts.append((head, intake))
            return intake.views

        def arrived(received: int) -> None:
            for _, intake in parts:
                intake.arrived(received)

        pace = Pace(self._settings.idle_body_s)
        body = await read_body(scope, receive, buffers_for, largest=largest, pace=pace, arrived=arrived)
        ((head, intake),) = parts
        intake.complete(body.digest)
        return head, intake, body.fingerprint


class PushEndpoint(Endpoint):
    """Receive gradients; answer with the receipt and the requested parameters."""

    async def serve(self, actor: Actor, reserve: Reserve, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()

        def begin(head: PushHead, body_bytes: int) -> Intake:
            if head.wire_gradients is not None or head.wire_parameters is not None:
                reserve(_converted_bytes(actor.plan, head))
            return actor.begin_push(head, body_bytes)

        head, intake, fingerprint = await self.take(
            actor, reserve, scope, receive, PushHead.from_header, begin, largest=actor.largest_body_bytes
        )
        received_s = time.perf_counter() - began
        if head.shared is not None:
            fingerprint = fingerprint_of(head, head.shared)
        answer = await actor.push(head, intake, fingerprint)
        in_place = (
            head.wire_gradients is not None
            and head.wire_gradients == head.wire_parameters
            and codec_named(head.wire_gradients).element is not None
        )
        spent = intake if in_place or head.shared is not None else None
        del intake  # frees the gradients' memory while the answer is sent, unless that uses it
        header = _header(actor, answer, {"receive": received_s})
        if head.wanted == "none":
            await answer_message(send, {**header, "version": answer.receipt.version, "segments": []}, ())
            return
        since = head.have if head.wanted == "changed" else None
        view = await actor.reads.parameters(since, head.name, head.wire_parameters, spent, outgoing=outgoing_of(scope))
        delivered = head.shared is not None and await _delivered(actor, head, view, spent)
        del spent
        await answer_view(send, header, view, delivered=delivered)


class ContentsEndpoint(Endpoint):
    """Send and receive parameters and optimizer state."""

    async def serve(self, actor: Actor, reserve: Reserve, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "PUT":
            await self._give(actor, reserve, scope, send)
            return
        head, intake, fingerprint = await self.take(
            actor, reserve, scope, receive, PutHead.from_header, actor.begin_put, largest=actor.largest_body_bytes
        )
        answer = await actor.put(head, intake, fingerprint)
        header = {**_header(actor, answer, {}), "version": answer.receipt.version, "segments": []}
        await answer_message(send, header, ())

    async def _give(self, actor: Actor, reserve: Reserve, scope: Scope, send: Send) -> None:
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if unknown := sorted(set(query) - QUERY):
            raise InvalidRequest(f"Unknown query parameter {unknown[0]!r:.80}.", field="query")
        fields = ",".join(query.get("fields", ["param"])).split(",")
        if len(set(fields)) != len(fields):
            raise InvalidRequest("A field is named twice.", field="fields")
        layout = actor.plan.layout
        indices = _indices(query["segments"], len(layout.segments)) if "segments" in query else None
        whole = fields == ["param"] and indices is None
        codec = (
            check_codec("wire_parameters", ",".join(query["wire_parameters"])) if "wire_parameters" in query else None
        )
        if codec is not None and not whole:
            raise InvalidRequest("Only all parameters, and nothing else, are given encoded.", field="wire_parameters")
        reader = _reader(query)
        reserve(size := await _size(actor, fields, indices))
        outgoing = outgoing_of(scope)
        header = {"v": VERSION, "incarnation": actor.incarnation}
        if whole:
            view = await actor.reads.parameters(codec=codec, reader=reader, outgoing=outgoing)
            await answer_view(send, {**header, "fields": list(view.fields)}, view)
            return
        async with actor.reads.copying(size, outgoing):
            view = await actor.reads.contents(fields, indices)
            await answer_view(send, {**header, "fields": list(view.fields)}, view)


class GroupsEndpoint(Endpoint):
    """Receive a param group; answer with the receipt, and with parameters if another worker had added the group."""

    async def serve(self, actor: Actor, reserve: Reserve, scope: Scope, receive: Receive, send: Send) -> None:
        head, intake, fingerprint = await self.take(
            actor,
            reserve,
            scope,
            receive,
            AppendHead.from_header,
            actor.begin_append,
            largest=self._settings.max_session_bytes + OVERHEAD_BYTES,
        )
        answer = await actor.append(head, intake, fingerprint)
        del intake
        header = _header(actor, answer, {})
        if answer.receipt.applied:
            await answer_message(send, {**header, "version": answer.receipt.version, "segments": []}, ())
        else:
            await answer_view(send, header, await actor.reads.parameters(write=head.name, outgoing=outgoing_of(scope)))


async def _delivered(actor: Actor, head: PushHead, view: View, spent: Intake | None) -> bool:
    try:
        return await actor.deliver(head, view, spent)
    except BaseException:
        view.release()
        raise


def fingerprint_of(head: PushHead, shared: SharedPush) -> str:
    """Return the fingerprint of a push with gradients in shared memory: its header without the target of the answer.

    The worker guarantees that the same count of fillings means the same gradients.
    """
    same = replace(head, shared=replace(shared, deliver=False))
    return xxhash.xxh3_128_hexdigest(repr(same).encode())


async def answer_view(send: Send, header: dict[str, Any], view: View, *, delivered: bool = False) -> None:
    """Answer with the contents of a version, and release it.

    Args:
        delivered: they have been written to shared memory.
    """
    try:
        header |= {"version": view.version, "count": view.count}
        if view.segments is not None:
            header["segments"] = view.segments
        if view.shapes:
            header["shapes"] = shapes_to_header(view.shapes)
        if delivered:
            header["delivered"] = True
        await answer_message(send, header, () if delivered else view.views)
    finally:
        view.release()


async def _size(actor: Actor, fields: Sequence[str], indices: Sequence[int] | None) -> int:
    """Return an upper estimate of the bytes of fields."""
    layout, kinds = actor.plan.layout, actor.plan.rule.kinds
    free = [name for name in fields if kinds.get(name) == "free"]
    one = layout.nbytes if indices is None else layout.bytes_of(indices)
    numbers = [name for name in fields if name == PRESENT or kinds.get(name) in NUMBERS]
    one_number = 8 * (len(layout.segments) if indices is None else len(indices))
    return (
        one * (len(fields) - len(free) - len(numbers))
        + one_number * len(numbers)
        + ((await actor.summary()).bytes["state"] if free else 0)
    )


def _converted_bytes(plan: Plan, head: PushHead) -> int:
    """Return the additional bytes that a push takes beside its body.

    Gradients encoded as bytes are decoded first. Those in 16 bits are widened before they are clipped, compensated,
    added to others, or used by an optimizer that is no rule. Parameters in the same 16 bits use the gradients' memory,
    in another codec their own.
    """
    mode = plan.consistency
    alone = mode.alone and not mode.delay_compensation and isinstance(plan.rule, Rule)
    gradients, parameters = codec_named(head.wire_gradients), codec_named(head.wire_parameters)
    decoded = gradients is not FULL and (gradients.element is None or not (alone and plan.policies.as_they_come))
    encoded = parameters is not FULL and (parameters is not gradients or parameters.element is None)
    return (plan.layout.nbytes if decoded else 0) + (plan.layout.on_wire(parameters).nbytes if encoded else 0)


def _indices(query: Sequence[str], count: int) -> list[int]:
    """Return the segments of a query such as `segments=0,3,7,8`: ranges as in a header."""
    bounds = ",".join(query).split(",")
    ranges = [int(each) if each.isascii() and each.isdecimal() and len(each) < 10 else each for each in bounds]
    return from_ranges(ranges, count)


def _reader(query: Mapping[str, Sequence[str]]) -> Reader | None:
    """Return the worker that pulls, None if the query does not name it.

    Raises:
        InvalidRequest: it names only worker or epoch, or an invalid epoch.
    """
    if "worker" not in query and "epoch" not in query:
        return None
    worker, epoch = ",".join(query.get("worker", [])), ",".join(query.get("epoch", []))
    if not worker or not (epoch.isascii() and epoch.isdecimal() and len(epoch) < 16):
        raise InvalidRequest("A pull names both 'worker' and 'epoch', a number, or neither.", field="epoch")
    return Reader(worker, int(epoch))


def _header(actor: Actor, answer: Answer, times: dict[str, float]) -> dict[str, Any]:
    switched = {"consistency": to_options(actor.plan.consistency)} if actor.switched else {}
    return {
        **switched,
        "v": VERSION,
        "incarnation": actor.incarnation,
        "durability": actor.plan.level,
        "receipt": answer.receipt.to_header(),
        "duplicate": answer.duplicate,
        "times": {**answer.times, **times},
    }


def data_routes(registry: Registry, settings: Settings) -> list[Route]:
    """Return the data routes of a server."""
    return [
        Route("/v1/sessions/{name}/push", PushEndpoint(registry, settings), methods=["POST"]),
        Route("/v1/sessions/{name}/groups", GroupsEndpoint(registry, settings), methods=["POST"]),
        Route("/v1/sessions/{name}/contents", ContentsEndpoint(registry, settings), methods=["GET", "PUT"]),
    ]
