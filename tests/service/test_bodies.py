"""Bodies in and out: silence, slow readers, and answers that are all of one version."""

from __future__ import annotations

import asyncio
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from starlette.types import Message

from farstep.protocol import encode
from farstep_service.app import create_app
from farstep_service.routes.bodies import TAIL_BYTES, answer_message
from farstep_service.settings import Settings
from tests.support.service.answers import MSGPACK, half_sent, opened, read_answer
from tests.support.service.raw import RawClient, RawWorker, session_document
from tests.support.service.servers import RunningServer

ELEMENTS = 1 << 22
"""Elements of the parameters: 16 MiB, more than the buffers between a server and a slow reader take in."""
SLOW_BYTES = 1 << 14
"""What the system receives ahead of a slow reader."""


class Conversation:
    """Speaks ASGI with an application in this process: what it receives is a list, and then silence."""

    def __init__(self, **settings: Any) -> None:
        self.app = create_app(Settings(**settings))

    async def ask(
        self, method: str, path: str, chunks: list[bytes], length: int, *, kind: str = MSGPACK, gone: bool = False
    ) -> tuple[int, bytes]:
        """Return status and body of the answer to a request whose body stops after some chunks."""
        given = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        if sum(map(len, chunks)) == length:
            given[-1]["more_body"] = False
        if gone:
            given.append({"type": "http.disconnect"})
        sent: list[Message] = []

        async def receive() -> Message:
            if given:
                return given.pop(0)
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", kind.encode()),
                (b"content-length", str(length).encode()),
            ],
        }
        await self.app(scope, receive, send)
        if not sent:
            return 0, b""
        return int(sent[0]["status"]), b"".join(each.get("body", b"") for each in sent[1:])


@pytest.mark.parametrize("gone", [False, True])
def test_a_client_that_is_gone_creates_no_session(gone: bool) -> None:
    """A join whose client went away while its document was read creates nothing, as nobody would ever remove it."""
    document = json.dumps(session_document("s", "w0")).encode()

    async def join() -> tuple[int, list[Any]]:
        conversation = Conversation()
        kind = "application/json"
        status, _ = await conversation.ask("POST", "/v1/sessions", [document], len(document), kind=kind, gone=gone)
        _, sessions = await conversation.ask("GET", "/v1/sessions", [b""], 0)
        return status, json.loads(sessions)

    status, sessions = asyncio.run(join())
    assert (status, len(sessions)) == ((0, 0) if gone else (200, 1))


@pytest.mark.promise("A body that stalls or trickles is given up, and nothing has changed.", area="limits")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_body_that_stalls_is_given_up(share: float) -> None:
    """After some seconds without a byte, the request is refused as truncated; nothing has changed."""

    async def talk() -> None:
        import json

        talking = Conversation(idle_body_s=0.05)
        document = json.dumps(session_document("s", "w0")).encode()
        status, body = await talking.ask("POST", "/v1/sessions", [document], len(document), kind="application/json")
        assert status == 200
        head = {"v": 1, "incarnation": json.loads(body)["incarnation"], "worker": "w0", "epoch": 1, "seq": 1}
        whole = b"".join(encode({**head, "fields": ["param"], "initial": True}, [memoryview(bytes(16))]))
        cut = int(share * (len(whole) - 1))
        path = "/v1/sessions/s/contents"
        status, body = await talking.ask("PUT", path, [whole[:cut]] if cut else [], len(whole))
        assert (status, json.loads(body)["code"]) == (400, "truncated")
        assert f"{cut} of {len(whole)}" in json.loads(body)["detail"]
        assert await talking.ask("PUT", path, [whole[:cut]], len(whole), gone=True) == (0, b"")
        assert (await talking.ask("PUT", path, [whole], len(whole)))[0] == 200

    asyncio.run(talk())


def test_a_request_that_is_cancelled_is_told_that_the_server_stops() -> None:
    """What still waits when the server has to go is answered 503, which a client tries again."""

    async def talk() -> None:
        import json

        talking = Conversation()
        document = json.dumps(
            session_document("s", "w0", consistency={"mode": "sync", "workers": 2, "deadline_s": 60})
        ).encode()
        _, body = await talking.ask("POST", "/v1/sessions", [document], len(document), kind="application/json")
        head = {"v": 1, "incarnation": json.loads(body)["incarnation"], "worker": "w0", "epoch": 1, "seq": 1}
        first = b"".join(encode({**head, "fields": ["param"], "initial": True}, [memoryview(bytes(16))]))
        assert (await talking.ask("PUT", "/v1/sessions/s/contents", [first], len(first)))[0] == 200
        push = b"".join(encode({**head, "seq": 2, "base": 0}, [memoryview(bytes(16))]))
        waiting = asyncio.create_task(talking.ask("POST", "/v1/sessions/s/push", [push], len(push)))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        waiting.cancel()
        status, body = await waiting
        assert (status, json.loads(body)["code"]) == (503, "unavailable")

    asyncio.run(talk())


@pytest.mark.parametrize("size", [0, 1, TAIL_BYTES - 100, TAIL_BYTES + 1, 3 * TAIL_BYTES, 40 << 20])
@pytest.mark.parametrize("pieces", [1, 7])
def test_the_end_of_an_answer_is_a_copy(size: int, pieces: int) -> None:
    """The last bytes, which may still lie in a buffer when the answer is done, are not the parameters' own memory."""

    async def talk() -> None:
        memory = [memoryview(bytearray(size // pieces + (index < size % pieces))) for index in range(pieces)]
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await answer_message(send, {"v": 1}, memory)
        bodies = [message["body"] for message in sent[1:]]
        total = sum(len(body) for body in bodies)
        assert dict(sent[0]["headers"])[b"content-length"] == str(total).encode()
        assert sent[-1].get("more_body", False) is False
        assert all(message["more_body"] for message in sent[1:-1])
        behind = 0
        for body in reversed(bodies):
            if isinstance(body, memoryview):
                assert behind >= min(TAIL_BYTES, total)
                break
            behind += len(body)
        joined = b"".join(encode({"v": 1}, memory))
        assert b"".join(bodies) == joined

    asyncio.run(talk())


# -- a real server, with readers that are slow


@pytest.fixture(scope="module")
def stamped(raw: RawClient) -> RawWorker:
    """Return the worker of a session whose parameters are the same number everywhere, another one in each version."""
    return raw.begun("stamped", parameters=(torch.zeros(ELEMENTS // 2), torch.zeros(ELEMENTS // 2)))[0]


def stamp(payload: bytes) -> float:
    """Return the one number of which a payload consists."""
    assert len(payload) == 4 * ELEMENTS
    first = payload[:4]
    assert payload == first * ELEMENTS, "an answer mixes versions"
    return float(struct.unpack("<f", first)[0])


@pytest.mark.promise("Parameters that are read are all of one version, the one that the answer names.", area="reads")
def test_every_answer_is_of_one_version(server: RunningServer, stamped: RawWorker) -> None:
    """While steps go on, readers that take their time get parameters that are all of the version they name."""
    steps, readers = 12, 4
    stamps = {stamped.version: stamp(stamped.raw.request("GET", f"{stamped.path}/contents").payload)}
    ones = [torch.ones(ELEMENTS // 2)] * 2

    def pull(share: int) -> list[tuple[int, float]]:
        seen = []
        for _ in range(3):
            with opened(server.url, buffer_bytes=SLOW_BYTES) as sock:
                sock.sendall(f"GET {stamped.path}/contents HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                begun = sock.recv(share)
                pushed.wait_for_next()
                answer = read_answer(sock, begun)
            seen.append((int(answer.header["version"]), stamp(answer.payload)))
        return seen

    pushed = Pushes()
    with ThreadPoolExecutor(readers) as pool:
        pulling = [pool.submit(pull, 1 << (8 + 4 * index)) for index in range(readers)]
        for _ in range(steps):
            answer = stamped.push(ones)
            stamps[answer.receipt["version"]] = stamp(answer.payload)
            pushed.count()
        while not all(each.done() for each in pulling):
            answer = stamped.push(ones)
            stamps[answer.receipt["version"]] = stamp(answer.payload)
            pushed.count()
        seen = [pair for each in pulling for pair in each.result()]
    assert len(stamps) == len(set(stamps.values()))
    for version, value in seen:
        assert stamps[version] == value


class Pushes:
    """Lets readers wait until a step has happened while their answer was under way."""

    def __init__(self) -> None:
        import threading

        self._changed, self._number = threading.Condition(), 0

    def count(self) -> None:
        with self._changed:
            self._number += 1
            self._changed.notify_all()

    def wait_for_next(self) -> None:
        with self._changed:
            before = self._number
            self._changed.wait_for(lambda: self._number >= before + 2, timeout=10)


def test_a_reader_that_stops_does_not_stop_the_others(server: RunningServer, stamped: RawWorker) -> None:
    """While somebody who asked for parameters does not read them, steps go on; what he reads later is his version."""
    ones = [torch.ones(ELEMENTS // 2)] * 2
    with opened(server.url, buffer_bytes=SLOW_BYTES) as sock:
        sock.sendall(f"GET {stamped.path}/contents HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        begun = sock.recv(1 << 12)
        version = stamped.version
        value = stamp(stamped.raw.request("GET", f"{stamped.path}/contents").payload)
        for _ in range(5):
            assert stamped.push(ones, reply="none").receipt["applied"]
        answer = read_answer(sock, begun)
    assert (int(answer.header["version"]), stamp(answer.payload)) == (version, value)
    page = stamped.raw.request("GET", stamped.path).document
    assert page["bytes"]["versions"] <= page["bytes"]["parameters"]


def test_a_reader_that_goes_away_gives_its_version_back(server: RunningServer, stamped: RawWorker) -> None:
    """After readers disappeared in the middle of their answers, the memory of their versions is used again."""
    ones = [torch.ones(ELEMENTS // 2)] * 2
    for _ in range(6):
        with opened(server.url, buffer_bytes=SLOW_BYTES) as sock:
            sock.sendall(f"GET {stamped.path}/contents HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            sock.recv(1 << 12)
            stamped.push(ones, reply="none")
    for _ in range(3):
        stamped.push(ones, reply="none")
    page = stamped.raw.request("GET", stamped.path).document
    assert page["bytes"]["versions"] <= page["bytes"]["parameters"]


def test_what_changed_is_all_that_is_sent(raw: RawClient) -> None:
    """With reply=changed the answer holds and names the segments that changed since the version the worker has."""
    parameters = [torch.zeros(3), torch.zeros(5), torch.zeros(2)]
    (worker,) = raw.begun("partly", parameters=parameters)
    answer = worker.push([None, torch.ones(5), None], reply="changed", have=0)
    assert answer.header["segments"] == [1, 2]
    assert len(answer.payload) == 20
    answer = worker.push([torch.ones(3), None, None], base=1, reply="changed", have=0)
    assert answer.header["segments"] == [0, 2]
    assert len(answer.payload) == 32
    answer = worker.push([None, None, None], base=2, reply="changed", have=2)
    assert (answer.header["segments"], answer.payload) == ([], b"")
    answer = worker.push([torch.ones(each.shape) for each in parameters], base=3, reply="changed", have=3)
    assert "segments" not in answer.header
    answer = worker.push([torch.ones(each.shape) for each in parameters], base=4, reply="none")
    assert (answer.header["version"], answer.payload) == (5, b"")


def test_head_tells_the_size_of_the_contents(raw: RawClient, stamped: RawWorker) -> None:
    """HEAD answers as GET does, without the body."""
    answer = raw.http.head(f"{stamped.path}/contents")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) > 4 * ELEMENTS
    assert answer.content == b""


def test_a_connection_is_used_again_after_an_error(server: RunningServer, stamped: RawWorker) -> None:
    """A refusal before the body is read does not break the connection for those who send the body all the same."""
    body = b"x" * 300_000
    headers = {"Content-Type": "text/plain", "Content-Length": str(len(body))}
    with half_sent(server.url, "POST", f"{stamped.path}/push", headers) as sock:
        assert read_answer(sock).code == "unsupported_media"
        sock.sendall(body)
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(sock).document == {"status": "ok"}
