"""Bad requests on the data routes: each is refused in words, at once, changes nothing, and the next good push works."""

from __future__ import annotations

import msgpack
import pytest

from farstep.protocol import DTYPES
from farstep.protocol.limits import DEFAULT_LIMITS
from tests.support.service.answers import MSGPACK, half_sent, read_answer
from tests.support.service.bad_input.refusing import PARAMETERS, good, refused
from tests.support.service.raw import RawClient, RawWorker, gradient
from tests.support.service.servers import RunningServer

# -- the request


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "application/octet-stream"}, 415, "unsupported_media"),
        ({"content-type": "application/json"}, 415, "unsupported_media"),
        ({"content-type": "application/msgpack; charset=utf-8"}, 415, "unsupported_media"),
        ({"content-type": "text/plain"}, 415, "unsupported_media"),
        ({"content-type": ""}, 415, "unsupported_media"),
        ({"content-type": MSGPACK, "content-encoding": "gzip"}, 415, "unsupported_media"),
        ({"content-type": MSGPACK, "content-encoding": "zstd"}, 415, "unsupported_media"),
    ],
)
def test_another_type_or_encoding_is_refused(
    worker: RawWorker, method: str, headers: dict[str, str], status: int, code: str
) -> None:
    """Only application/msgpack as it is: nothing is decompressed, nothing is guessed."""
    path = f"{worker.path}/{'push' if method == 'POST' else 'contents'}"
    refused(lambda: worker.raw.request(method, path, good(worker), headers), status, code)


def test_a_body_without_a_length_is_refused(server: RunningServer, worker: RawWorker) -> None:
    """A request that neither says how long its body is nor sends it in chunks has none, and is refused."""
    headers = {"Content-Type": MSGPACK}
    with half_sent(server.url, "POST", f"{worker.path}/push", headers) as sock:
        refused(lambda: read_answer(sock), 400, "invalid_request", "content-length")


@pytest.mark.promise(
    "A length beyond what its session can use is refused before a byte of the body is read.",
    area="bad input",
)
@pytest.mark.parametrize("claimed", [2**31, 2**40, 2**62])
def test_a_length_beyond_the_session_is_refused_before_a_byte_is_read(
    server: RunningServer, worker: RawWorker, claimed: int
) -> None:
    """A body longer than the largest sensible one is refused on its headers alone."""
    headers = {"Content-Type": MSGPACK, "Content-Length": str(claimed)}
    with half_sent(server.url, "POST", f"{worker.path}/push", headers) as sock:
        answer = refused(lambda: read_answer(sock), 413, "limit_exceeded", "content-length")
    assert 0 < answer.document["limit"] < 2**31


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_a_message_that_ends_early_is_refused(worker: RawWorker, cut: int) -> None:
    """A body whose length is right and whose message is not complete is refused."""
    body = good(worker)[:-cut]
    answer = worker.raw.request("POST", f"{worker.path}/push", body, {"content-type": MSGPACK})
    assert answer.code in ("truncated", "tensor_mismatch")
    assert answer.status in (400, 422)


@pytest.mark.parametrize("tail", [b"\x00", b"\xc0", b"\xc4\x00", msgpack.packb({"v": 1}), b"\xc4\x01x" * 100])
def test_bytes_after_the_message_are_refused(worker: RawWorker, tail: bytes) -> None:
    """Nothing may follow a message, not even an empty frame."""
    headers = {"content-type": MSGPACK}
    refused(
        lambda: worker.raw.request("POST", f"{worker.path}/push", good(worker) + tail, headers), 400, "invalid_request"
    )


def deep(levels: int) -> bytes:
    return b"\x81\xa1x" + b"\x91" * levels + b"\xc0"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "truncated"),
        (b"\x80", 426, "protocol_mismatch"),
        (b"garbage", 400, "invalid_request"),
        (b"\x00" * 1000, 400, "invalid_request"),
        (b"\xff" * 1000, 400, "invalid_request"),
        (b"\xc1" * 10, 400, "invalid_request"),
        (b"\x81\xa1v\xc1", 400, "invalid_request"),
        (b'{"v": 1}', 400, "invalid_request"),
        (b"\x93\x01\x02\x03", 400, "invalid_request"),
        (b"\xc4\x04abcd", 400, "invalid_request"),
        (b"\x82\xa1v\x01\xa1v\x01", 400, "invalid_request"),
        (b"\x81\x01\x01", 400, "invalid_request"),
        (b"\x81\xa1v\xd4\x01\x00", 400, "invalid_request"),
        (b"\x81\xa1v\xd6\xff\x00\x00\x00\x00", 400, "invalid_request"),
        (b"\x81\xa1v\xa2\xff\xfe", 400, "invalid_request"),
        (deep(9), 413, "limit_exceeded"),
        (deep(500), 413, "limit_exceeded"),
        (deep(100_000), 413, "limit_exceeded"),
        (b"\xdf\xff\xff\xff\xff", 400, "truncated"),
        (b"\x81\xa1v\xdd\xff\xff\xff\xff", 400, "truncated"),
        (b"\x81\xa1v\xdb\xff\xff\xff\xff", 400, "truncated"),
        (b"\x81\xa1v\xda\x10\x01" + b"x" * 4097, 413, "limit_exceeded"),
        (b"\x81\xa1v\xcf\xff\xff\xff\xff\xff\xff\xff\xff", 400, "invalid_request"),
        (b"\x81\xa1v\xdd\x00\x04\x00\x01" + b"\x01" * 0x40001, 413, "limit_exceeded"),
        (b"\x81\xa1v" + (b"\xdd\x00\x00\x10\x00" * 2000), 400, "truncated"),
        (b"\x81\xa1v\xc6\x00\x20\x00\x00" + b"\x00" * (1 << 21), 413, "limit_exceeded"),
    ],
)
def test_a_header_that_is_no_header_is_refused(worker: RawWorker, body: bytes, status: int, code: str) -> None:
    """Garbage, other objects, extension types, repeated keys, depth, bombs and a header above 1 MiB."""
    answer = worker.raw.request("POST", f"{worker.path}/push", body, {"content-type": MSGPACK})
    if code == "truncated":  # which of the two is found first depends on what is missing
        assert answer.code in ("truncated", "limit_exceeded", "invalid_request")
    else:
        assert (answer.status, answer.code) == (status, code), answer.body


def test_frames_that_are_no_frames_are_refused(worker: RawWorker) -> None:
    """After the header come bin frames, none of them empty or beyond its bound, and nothing else."""
    header, payload = worker.message(gradient(1, PARAMETERS))
    head, content = msgpack.packb(header), b"".join(payload)
    path, headers = f"{worker.path}/push", {"content-type": MSGPACK}
    size = len(content).to_bytes(4, "big")
    for frames, status, code in (
        (b"\xc4\x00" + b"\xc6" + size + content, 400, "invalid_request"),
        (b"\xdb" + size + content, 400, "invalid_request"),
        (b"\xc6\xff\xff\xff\xff" + content, 413, "limit_exceeded"),
        (b"\xc6" + (len(content) + 1).to_bytes(4, "big") + content + b"\x00", 400, "invalid_request"),
    ):
        answer = worker.raw.request("POST", path, head + frames, headers)
        assert (answer.status, answer.code) == (status, code)


def test_very_small_frames_are_no_reason_to_fail(raw: RawClient) -> None:
    """A payload in frames of one byte is what the protocol allows, and the same content as one in a single frame."""
    (worker,) = raw.begun("small-frames", parameters=PARAMETERS)
    header, payload = worker.message(gradient(1, PARAMETERS))
    body = msgpack.packb(header) + b"".join(b"\xc4\x01" + bytes([each]) for each in b"".join(payload))
    answer = raw.request("POST", f"{worker.path}/push", body, {"content-type": MSGPACK})
    assert answer.receipt["version"] == 1
    assert worker.push(gradient(1, PARAMETERS)).header["duplicate"]


# -- where it goes


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "x" * 5000,
        "..%2f..%2fetc",
        "..%2Fpush",
        "%00",
        "%252e%252e",
        "%2e%2e",
        "bad;v=1",
        "bad%0a",
        "%ff",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_a_session_that_is_not_there_is_not_found(worker: RawWorker, name: str, method: str) -> None:
    """Unknown names and path tricks are 404, and nothing of them is looked up anywhere else."""
    path = f"/v1/sessions/{name}/{'push' if method == 'POST' else 'contents'}"
    answer = worker.raw.request(method, path, good(worker), {"content-type": MSGPACK})
    assert answer.status == 404
    assert answer.code in ("unknown_session", "no_such_route")


@pytest.mark.promise(
    "An older version is never shown as the same session: a session that begins anew has another incarnation.",
    area="reads",
)
def test_a_write_for_another_life_of_the_session_is_gone(worker: RawWorker) -> None:
    """A push and a put of another incarnation are told that the session is lost."""
    for ask in (
        lambda: worker.push(gradient(1, PARAMETERS), incarnation="f" * 32),
        lambda: worker.put({"param": list(PARAMETERS)}, incarnation="f" * 32),
    ):
        refused(ask, 410, "session_lost", "incarnation")


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "OPTIONS", "TRACE", "PUT", "GET"])
def test_a_method_that_the_path_does_not_have_is_refused(worker: RawWorker, method: str) -> None:
    """It is 405, and says which methods there are."""
    answer = refused(lambda: worker.raw.request(method, f"{worker.path}/push"), 405, "no_such_method")
    assert answer.document["remedy"]


@pytest.mark.promise(
    "What is refused leaves nothing behind: no session, no waiting push, no memory in flight.",
    area="bad input",
)
def test_what_is_refused_is_forgotten(worker: RawWorker, server: RunningServer) -> None:
    """After all of these, the server still has one session of this name, with nothing waiting and nothing in flight."""
    page = worker.raw.request("GET", worker.path).document
    assert page["bytes"]["waiting"] == 0
    assert page["workers"]["w0"] == {
        "incarnation": worker.joined["incarnation"],
        "epoch": 1,
        "sequence": worker.last,
        "waiting": False,
        "live": page["workers"]["w0"]["live"],  # a matter of how long the tests took, as the next one
        "lease_s": page["workers"]["w0"]["lease_s"],
    }


def test_every_dtype_is_in_the_table() -> None:
    """The parameters of these tests are of every dtype that a parameter can have."""
    assert {str(each.dtype).removeprefix("torch.") for each in PARAMETERS} == set(DTYPES) - {"int64"}
    assert DEFAULT_LIMITS.header_bytes == 1 << 20
