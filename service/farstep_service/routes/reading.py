"""The bodies of control routes, within their bounds; large ones are read in pieces.

up to 16 KiB     on the event loop: a fraction of a millisecond
more             in a thread, one document of a route after the other; the lists of a document of 100,000 parameters
                 are decoded and checked element by element, and become a layout as they come, so that the thread
                 holds the interpreter's lock for a few milliseconds at most, and keeps few objects
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ConfigDict, FailFast, TypeAdapter, ValidationError
from starlette.types import Message

from farstep.errors import InvalidRequest, LimitExceeded
from farstep_service.layout import MAX_SEGMENTS, Layout
from farstep_service.limits import DOCUMENTS
from farstep_service.plan import MAX_GROUPS
from farstep_service.routes.documents import (
    GroupNumber,
    GroupsDocument,
    Options,
    Read,
    ReadMembers,
    SegmentDocument,
    SessionDocument,
    Whole,
    spec_of,
)
from farstep_service.routes.pieces import JsonReader
from farstep_service.routes.problems import too_large

SMALL_BYTES: Final = 16 * 1024
"""Documents up to this size are read on the event loop."""
BATCH: Final = 128
"""The number of elements that are checked together."""

Element = TypeVar("Element")
Pieced = Callable[[JsonReader], object]
"""Reads one large field of a document, and checks it."""

_SEGMENTS = TypeAdapter(Annotated[list[SegmentDocument], FailFast()])
_GROUPS = TypeAdapter(Annotated[list[Options], FailFast()], config=ConfigDict(strict=True))
_CHANGES = TypeAdapter(dict[GroupNumber, Options], config=ConfigDict(strict=True))


def _checked(field: str, reader: JsonReader, check: TypeAdapter[list[Element]], most: int) -> Iterator[Element]:
    """Read a list and yield its elements, checked in batches.

    Raises:
        InvalidRequest: it is not a list.
        LimitExceeded: it has more than `most` elements.
        RequestValidationError: the first invalid element.
    """
    number = 0
    batch: list[object] = []
    for _ in reader.elements():
        batch.append(reader.value())
        if number + len(batch) > most:
            raise LimitExceeded(f"{field}: List should have at most {most} items.", field=field, limit=most)
        if len(batch) == BATCH:
            yield from _valid(field, check, batch, number)
            number += len(batch)
            batch = []
    yield from _valid(field, check, batch, number)


def _valid(field: str, check: TypeAdapter[list[Element]], batch: list[object], number: int) -> list[Element]:
    try:
        return check.validate_python(batch)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        index, *where = first["loc"]
        raise RequestValidationError([{**first, "loc": ("body", field, number + int(index), *where)}]) from None


def _segments(reader: JsonReader) -> object:
    """Read the parameters of a session into a layout."""
    if reader.peek() != "[":
        return reader.value()
    layout = Layout.empty().append(map(spec_of, _checked("segments", reader, _SEGMENTS, MAX_SEGMENTS)))
    return layout if layout.segments else []


def _groups(reader: JsonReader) -> object:
    """Read the options of param groups."""
    if reader.peek() != "[":
        return reader.value()
    return Read(_checked("groups", reader, _GROUPS, MAX_GROUPS)) or []


def _changes(reader: JsonReader) -> object:
    """Read changed options by param group number."""
    if reader.peek() != "{":
        return reader.value()
    found = ReadMembers()
    for number in reader.members():
        if len(found) == MAX_GROUPS:
            raise LimitExceeded(
                f"groups: Dictionary should have at most {MAX_GROUPS} items.", field="groups", limit=MAX_GROUPS
            )
        try:
            found |= _CHANGES.validate_python({number: reader.value()})
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            raise RequestValidationError([{**first, "loc": ("body", "groups", *first["loc"])}]) from None
    return found


IN_PIECES: Final[Mapping[str, tuple[type[Whole], Mapping[str, Pieced]]]] = {
    "POST /v1/sessions": (SessionDocument, {"segments": _segments, "groups": _groups}),
    "PATCH /v1/sessions/{name}/groups": (GroupsDocument, {"groups": _changes}),
}
"""The documents that may be large, with the readers of their large fields."""


def read(chunks: Iterable[bytes], model: type[Whole], pieced: Mapping[str, Pieced]) -> object:
    """Return a document whose large fields are checked, and the others unchecked.

    Raises:
        InvalidRequest, LimitExceeded, RequestValidationError: it is not JSON, or its first mistake.
        TensorMismatch: a parameter is invalid.
    """
    reader = JsonReader(chunks)
    if reader.peek() != "{":
        document = reader.value()
        reader.end()
        return document
    found: dict[str, object] = {}
    for key in reader.members():
        if key not in model.model_fields:
            raise InvalidRequest(f"There is no field {key[:80]!r}.", field=key[:80])
        found[key] = pieced.get(key, JsonReader.value)(reader)
    reader.end()
    return found


class DocumentRoute(APIRoute):
    """A route that reads documents within its bound, large ones in pieces and one at a time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with a bound on what it receives."""
        handle = super().get_route_handler()
        (method, *_) = sorted(self.methods or ())
        limit = DOCUMENTS.most_bytes(method, self.path)
        pieces = IN_PIECES.get(f"{method} {self.path}")
        turn = asyncio.Lock()

        async def bounded(request: Request) -> Response:
            declared = request.headers.get("content-length", "0")
            if not declared.isdecimal() or int(declared) > limit:
                raise too_large(limit)
            left = limit

            async def receive() -> Message:
                nonlocal left
                message = await request.receive()
                left -= len(message.get("body", b""))
                if left < 0:
                    raise HTTPException(LimitExceeded.status)  # FastAPI hides every other error here
                return message

            request_within = Request(request.scope, receive)
            try:
                if pieces is not None and _is_json(request):
                    chunks = [chunk async for chunk in request_within.stream()]
                    if limit - left <= SMALL_BYTES:
                        document = read(chunks, *pieces)
                    else:
                        async with turn:
                            document = await asyncio.to_thread(read, chunks, *pieces)
                    request_within = _Given(request.scope, request.receive, document)
                return await handle(request_within)
            except HTTPException:
                if left < 0:
                    raise too_large(limit) from None
                raise

        return bounded


class _Given(Request):
    """A request whose document has been read."""

    def __init__(self, scope: Any, receive: Any, document: object) -> None:
        super().__init__(scope, receive)
        self._document = document

    async def body(self) -> bytes:
        """Return bytes, so that FastAPI asks for the document."""
        return b"{}"

    async def json(self) -> object:
        """Return the document."""
        return self._document


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
