"""A body that comes in chunks is the same message as one of known length, on every route that takes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, Answer
from tests.support.service.plain import plain_server
from tests.support.service.raw import RawClient, RawWorker, gradient
from tests.support.service.servers import running_server

PARAMETERS = (torch.linspace(-1, 1, 70_000), torch.zeros(3, 5))


@dataclass
class Streaming(RawClient):
    """A client that does not know how long what it sends will be.

    Attributes:
        chunk_bytes: size of its chunks.
    """

    chunk_bytes: int = 50_000

    def request(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        if content is None:
            return super().request(method, path, content, headers)
        pieces = (content[at : at + self.chunk_bytes] for at in range(0, len(content), self.chunk_bytes))
        response = self.http.request(method, path, content=pieces, headers=dict(headers or {}))
        assert response.request.headers["transfer-encoding"] == "chunked"
        return Answer(response.status_code, response.headers.get("content-type", ""), response.content)


@contextmanager
def ours() -> Iterator[str]:
    with running_server(loaded=True) as server:
        yield server.url


def trained(raw: RawClient, name: str) -> tuple[RawWorker, list[bytes]]:
    """Create a session, push, grow, push, and return what every answer held."""
    worker = raw.join(name, "w0", PARAMETERS)
    assert worker.begin().status == 200
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 5), (3, 5))
    answers = [worker.push(gradient(1, PARAMETERS)), worker.push([None, sparse])]
    answers.append(worker.append({"late": torch.ones(4)}))
    worker.parameters.append(torch.ones(4))
    answers.append(worker.push(gradient(2, worker.parameters)))
    return worker, [answer.payload for answer in answers]


def same(one: Iterable[bytes], other: Iterable[bytes]) -> bool:
    return list(one) == list(other)


@pytest.mark.parametrize("serving", [ours, plain_server])
def test_every_data_route_takes_chunks(serving) -> None:
    """First contents, pushes, sparse ones and groups in chunks give the bits that they give with a length."""
    with serving() as url, RawClient(url) as raw, Streaming(url) as streaming, Streaming(url, chunk_bytes=333) as fine:
        _, expected = trained(raw, "known")
        for client, name in ((streaming, "large-chunks"), (fine, "small-chunks")):
            assert same(trained(client, name)[1], expected)
        file = raw.request("GET", "/v1/sessions/known/file").body
        answer = streaming.request("PUT", "/v1/sessions/copy/file", file, {"content-type": "application/octet-stream"})
        assert answer.status == 201, answer.body
        assert raw.request("GET", "/v1/sessions/copy/contents").payload == expected[-1]


@pytest.mark.promise(
    "A length beyond what its session can use is refused before a byte of the body is read.",
    area="bad input",
)
@pytest.mark.parametrize("serving", [ours, plain_server])
def test_a_body_in_chunks_is_held_to_what_its_session_can_use(serving) -> None:
    """What cannot be is refused before memory is taken, though no length gives it away, and changes nothing."""
    with serving() as url, Streaming(url) as raw:
        (worker,) = raw.begun("s", parameters=PARAMETERS)

        def code(body: bytes, path: str = "push", method: str = "POST") -> str:
            return raw.request(method, f"{worker.path}/{path}", body, {"content-type": MSGPACK}).code

        head, payload = worker.message(gradient(1, PARAMETERS))
        good = b"".join(encode(head, payload))
        claims = worker.head(segments=[1, 2], sparse=[[1, 1, 2**40]])
        assert code(b"".join(encode(claims, []))) == "tensor_mismatch"
        assert code(good[:-1]) == "truncated"
        assert code(good + b"\xc4\x01\x00") == "invalid_request"
        assert code(b"") == "truncated"
        file = raw.request("GET", f"{worker.path}/file").body
        kind = {"content-type": "application/octet-stream"}
        assert raw.request("PUT", "/v1/sessions/short/file", file[:-1], kind).code == "truncated"
        assert raw.request("PUT", "/v1/sessions/long/file", file + b"x", kind).code == "invalid_request"
        assert worker.version == 0
        assert worker.push(gradient(1, PARAMETERS)).status == 200
