"""A worker sends tensors where the placement says, and everything else to the server that it joined at."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import torch

import farstep
from farstep.errors import InvalidAnswer
from tests.support.client.twins import Twins, drawn
from tests.support.service.servers import RunningServer

SHAPES = ((4, 3), (5,))


class Front:
    """A server that has no tensors: it hands control requests on, and places sessions elsewhere.

    Attributes:
        placement: what it answers a join with; None for where the tensors are.
        paths: the path of each request.
    """

    def __init__(self, behind: str) -> None:
        front = self
        self.placement: object = None
        self.paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                front.paths.append(self.path)
                kind = {"content-type": self.headers.get("content-type", "application/json")}
                answer = front.ask(self.command, behind + self.path, body, kind)
                content = front.placed(answer.content, behind) if self.path == "/v1/sessions" else answer.content
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers.get("content-type", "application/json"))
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._client = httpx.Client(trust_env=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def ask(self, method: str, url: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        return self._client.request(method, url, content=body, headers=headers)

    def placed(self, content: bytes, behind: str) -> bytes:
        document: dict[str, Any] = json.loads(content)
        if "placement" in document:
            count = document["placement"][0]["segments"][1]
            placement = [{"url": behind, "segments": [0, count]}] if self.placement is None else self.placement
            document["placement"] = placement
        return json.dumps(document).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._client.close()


@pytest.fixture
def front(server: RunningServer) -> Iterator[Front]:
    made = Front(server.url)
    yield made
    made.close()


def test_tensors_go_where_the_placement_says(front: Front) -> None:
    """Steps, pulls, state and new groups give torch's bits, and the server that was joined at sees no tensor."""
    twins = Twins("Adam", {}, {"server": front.url, "kernel": "reference"}, start=drawn(0, SHAPES))
    twins.train(2)
    twins.ours.pull()
    twins.check()
    twins.ours.load_state_dict(twins.ours.state_dict())
    twins.train(2, first=3)
    twins.check()
    twins.ours.heartbeat()
    twins.ours.close()
    assert any(path == "/v1/sessions" for path in front.paths)
    assert any(path.endswith("/lease") for path in front.paths)
    assert not any("/push" in path or "/contents" in path for path in front.paths)


@pytest.mark.parametrize(
    "placement",
    [
        [],
        [{"url": "", "segments": [0, 1]}],
        [{"url": "", "segments": [0, 1]}, {"url": "", "segments": [1, 2]}],
        [{"url": "", "segments": [0]}],
        [{"url": 3, "segments": [0, 2]}],
        {"url": "", "segments": [0, 2]},
    ],
    ids=str,
)
def test_a_placement_that_this_client_cannot_speak_to_is_refused(front: Front, placement: object) -> None:
    """A session in several shards, or in none, is refused by name, and nothing is sent to a part of it."""
    front.placement = placement
    with pytest.raises(InvalidAnswer, match="placement"):
        farstep.optim.Adagrad([torch.zeros(2), torch.zeros(3)], server=front.url, timeout_s=5.0)
    assert not any("/contents" in path for path in front.paths)
