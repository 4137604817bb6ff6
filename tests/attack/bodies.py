"""Bodies that are nearly right: good requests with seeded damage, sent to every route that takes one.

    a good request ── damage (bits, lengths, types, nesting, splices) ──► the server ──► refused by name, or taken

Whatever is damaged, the answer is a success or a problem document with a known code below 500 (507 and 503 where the
server says that it is full), and a session that was not addressed keeps its bits.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any

import torch

from farstep.errors import BY_CODE
from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, PROBLEM
from tests.support.service.raw import RawClient, RawWorker, gradient, session_document
from tests.support.service.servers import RunningServer

PARAMETERS = (torch.linspace(-1, 1, 12).view(3, 4), torch.ones(5, dtype=torch.float64), torch.ones(3))
JSON = "application/json"
FULL = frozenset({503, 507})


@dataclass(frozen=True)
class Request:
    """One request: where it goes and what it carries."""

    method: str
    path: str
    kind: str
    body: bytes


@dataclass
class Bodies:
    """What became of the bodies.

    Attributes:
        sent: how many were sent.
        statuses: how often each status came back.
        wrong: the number of each body whose answer was none of those allowed, and what came back.
        dropped: how often the server closed the connection in place of an answer.
    """

    sent: int = 0
    dropped: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def good_requests(worker: RawWorker) -> list[Request]:
    """Return a good request for each route that takes a body."""

    def message(method: str, path: str, head: dict[str, Any], payload: list[memoryview]) -> Request:
        return Request(method, f"{worker.path}{path}", MSGPACK, b"".join(encode(head, payload)))

    def document(method: str, path: str, value: object) -> Request:
        return Request(method, path, JSON, json.dumps(value).encode())

    push = worker.message(gradient(1, PARAMETERS))
    contents = worker.head(base=..., fields=["param"], initial=True)
    parts = worker.message(gradient(2, PARAMETERS))[1]
    growth = worker.group({"more": torch.ones(2)})
    epoch, incarnation = worker.joined["epoch"], worker.joined["incarnation"]
    lease = {"epoch": epoch, "incarnation": incarnation}
    return [
        message("POST", "/push", *push),
        message("PUT", "/contents", contents, parts),
        message("POST", "/groups", *growth),
        document("POST", "/v1/sessions", session_document(worker.session, "w1", PARAMETERS)),
        document("PATCH", f"{worker.path}/groups", {"groups": {"0": {"lr": 0.5}}}),
        document("PUT", f"{worker.path}/consistency", {"consistency": {"mode": "async"}}),
        document("PUT", f"{worker.path}/workers/{worker.name}/lease", lease),
    ]


# -- damage ----------------------------------------------------------------------------------------------------------

VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64 - 1, 0.5, 1e308, float("nan"), float("inf"),
    "", "a", "x" * 300, [], {}, [0, 0], {"a": 1}, [[]] * 3, "w0", "param", [2, 3], "\x00",
)  # fmt: skip


def bits(rng: random.Random, body: bytes) -> bytes:
    """Flip up to eight bits."""
    damaged = bytearray(body or b"\x00")
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(rng: random.Random, body: bytes) -> bytes:
    """Leave the end out."""
    return body[: rng.randrange(len(body) + 1)]


def longer(rng: random.Random, body: bytes) -> bytes:
    """Put bytes in somewhere."""
    at = rng.randrange(len(body) + 1)
    return body[:at] + rng.randbytes(rng.randint(1, 64)) + body[at:]


def spliced(rng: random.Random, body: bytes) -> bytes:
    """Put a part of the body somewhere else in it."""
    first, last = sorted(rng.randrange(len(body) + 1) for _ in range(2))
    at = rng.randrange(len(body) + 1)
    return body[:at] + body[first:last] + body[at:]


def nested(rng: random.Random, body: bytes) -> bytes:
    """Begin with deep nesting, of JSON or of msgpack."""
    return rng.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a")) * rng.randint(1, 2000) + body


def noise(rng: random.Random, body: bytes) -> bytes:
    """Send anything."""
    return rng.randbytes(rng.randint(0, 2 * len(body) + 16))


def changed(rng: random.Random, body: bytes) -> bytes:
    """Change a value of the document or of the header, to one of another type or size, or leave its key out."""
    if body[:1] == b"{":
        document = json.loads(body)
        _change(rng, document)
        return json.dumps(document).encode()
    import msgpack

    unpacker = msgpack.Unpacker()
    unpacker.feed(body)
    head, *frames = list(unpacker)
    _change(rng, head)
    return b"".join([msgpack.packb(head), *map(msgpack.packb, frames)])


def _change(rng: random.Random, document: Any) -> None:
    at = document
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            at = inner
            continue
        if isinstance(at, dict) and rng.random() < 0.15:
            del at[key]
        else:
            at[key] = rng.choice(VALUES)
        return


DAMAGE: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    bits, cut, longer, spliced, nested, noise, changed, changed, changed,
)  # fmt: skip


# -- the run ---------------------------------------------------------------------------------------------------------


def attack(server: RunningServer, *, seed: int, count: int, token: str | None = None) -> Bodies:
    """Send damaged bodies, and say what came back.

    Args:
        server: takes them.
        seed: decides all of them.
        count: how many.
        token: what the requests show.
    """
    rng, result = random.Random(seed), Bodies()
    with RawClient(server.url, token) as raw:
        (target,) = raw.begun("target", parameters=PARAMETERS)
        requests = good_requests(target)
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        authorization = {"authorization": f"Bearer {token}"} if token else {}
        for number in range(count):
            good = rng.choice(requests)
            try:
                body = rng.choice(DAMAGE)(rng, good.body)
            except (OverflowError, ValueError, UnicodeEncodeError):
                body = noise(rng, good.body)  # a value that cannot be written down
            result.sent += 1
            try:
                connection.request(good.method, good.path, body, {"content-type": good.kind, **authorization})
                response = connection.getresponse()
                answer = response.read()
            except (HTTPException, OSError):
                result.dropped += 1
                connection.close()
                continue
            result.statuses[response.status] += 1
            if complaint := _complaint(response.status, response.getheader("content-type") or "", answer):
                result.wrong.append(f"body {number} to {good.method} {good.path}: {complaint}")
        connection.close()
    return result


def _complaint(status: int, kind: str, answer: bytes) -> str:
    """Return what is wrong with an answer, "" if nothing is."""
    if status < 400:
        return ""
    if status >= 500 and status not in FULL:
        return f"{status} {answer[:200]!r}"
    if kind != PROBLEM:
        return f"{status} {kind}"
    code = json.loads(answer)["code"]
    return "" if code in BY_CODE else f"unknown code {code}"
