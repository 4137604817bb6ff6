"""Bad input on the data routes: each is refused in words, at once, changes nothing, and the next good push works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import msgpack
import pytest
import torch

from farstep.wire import DTYPES, encode
from farstep.wire.limits import DEFAULT_LIMITS
from tests.service.answers import MSGPACK, Answer, half_sent, read_answer
from tests.service.raw import RawClient, RawWorker, gradient, payload_of, zeros
from tests.service.servers import RunningServer

PARAMETERS = (
    torch.linspace(-1, 1, 12).view(3, 4),
    torch.ones(5, dtype=torch.float64),
    torch.ones(3, dtype=torch.bfloat16),
    torch.ones(2, dtype=torch.complex64),
    torch.ones(4, dtype=torch.float16),
    torch.ones(1, dtype=torch.complex128),
    torch.ones(6),
)
AT_ONCE_S = 1.0
INTERNAL = ("Traceback", "internal error")


@pytest.fixture(scope="module")
def session(raw: RawClient) -> RawWorker:
    """Return the one worker of a session that all of these bad requests are sent to."""
    return raw.begun("bad", parameters=PARAMETERS, groups=[{"lr": 0.1}])[0]


@pytest.fixture
def worker(session: RawWorker, server: RunningServer) -> Iterator[RawWorker]:
    """Check after a test that the version and parameters are what they were, and that a good push works."""
    before, log = session.pull(), len(server.log)
    yield session
    after = session.pull()
    assert after[0] == before[0]
    assert all(map(torch.equal, after[1], before[1]))
    assert session.push(gradient(session.last, PARAMETERS)).receipt["version"] == before[0] + 1
    assert not any(word in server.log[log:] for word in INTERNAL), server.log[log:]


def refused(ask: Callable[[], Answer], status: int, code: str, field: str | None = None) -> Answer:
    """Check how a request is refused, and that it does not take long."""
    began = time.perf_counter()
    answer = ask()
    assert time.perf_counter() - began < AT_ONCE_S
    assert (answer.status, answer.code) == (status, code), answer.body
    if field is not None:
        assert answer.document.get("field") == field, answer.body
    return answer


def good(worker: RawWorker, **changes: Any) -> bytes:
    """Return the body of a good push."""
    return b"".join(encode(*worker.message(gradient(1, PARAMETERS), **changes)))


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
    """A chunked body has no length to compare with the session's, and is not read."""
    headers = {"Content-Type": MSGPACK, "Transfer-Encoding": "chunked"}
    with half_sent(server.url, "POST", f"{worker.path}/push", headers) as sock:
        refused(lambda: read_answer(sock), 400, "invalid_request", "content-length")


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
    """A payload in frames of one byte is what the protocol allows; it is another content than one in a single frame."""
    (worker,) = raw.begun("small-frames", parameters=PARAMETERS)
    header, payload = worker.message(gradient(1, PARAMETERS))
    body = msgpack.packb(header) + b"".join(b"\xc4\x01" + bytes([each]) for each in b"".join(payload))
    answer = raw.request("POST", f"{worker.path}/push", body, {"content-type": MSGPACK})
    assert answer.receipt["version"] == 1
    assert worker.push(gradient(1, PARAMETERS)).code == "idempotency_mismatch"


# -- the header's keys


WRONG_INTS: tuple[object, ...] = (None, "1", 1.0, True, -1, b"1", [1], {}, ...)
WRONG_NAMES: tuple[object, ...] = (None, 1, "", "x" * 129, "a\x00b", "a\nb", b"w0", ["w0"], ...)
WRONG_LISTS: tuple[object, ...] = (1, "0", {}, True)


def wrong(key: str, values: tuple[object, ...], code: str = "invalid_request", status: int = 400) -> list[Any]:
    return [pytest.param(key, value, status, code, id=f"{key}={value!r:.20}") for value in values]


@pytest.mark.parametrize(
    ("key", "value", "status", "code"),
    [
        *wrong("v", (0, 2, 99, "1", 1.5, None, ...), "protocol_mismatch", 426),
        *wrong("worker", WRONG_NAMES),
        *wrong("incarnation", WRONG_NAMES),
        *wrong("epoch", (*WRONG_INTS, 0)),
        *wrong("seq", (*WRONG_INTS, 0)),
        *wrong("base", WRONG_INTS),
        *wrong("have", (None, "1", 1.0, True, -1)),
        *wrong("reply", (None, 1, "", "some", "ALL", b"all", ["all"])),
        *wrong("segments", WRONG_LISTS),
        *wrong("segments", ([0], [1, 1], [3, 1], [0, 8], [0, 2, 1, 3], [-1, 2], [0, 1.0], [[0, 1]], [0, 2**62])),
        *wrong("sparse", WRONG_LISTS),
        *wrong("sparse", ([1], [[0, 1]], [[0, 1, 2, 3]], [["0", 1, 1]], [[0, -1, 1]], [[0, True, 1]], [[7, 1, 1]])),
        *wrong("sparse", ([[0, 1, 1], [0, 1, 1]],)),
        *wrong("groups", (1, "0", [], True)),
        *wrong("groups", ({"a": {}}, {"-1": {}}, {"0": 1}, {"0": None}, {"1.0": {}}, {"": {}}, {"1234567": {}})),
        *wrong("groups", ({"1": {"lr": 1}}, {"999999": {}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"momentum": 1}}, {"0": {"lr": "1"}}, {"0": {"lr": None}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"lr": True}}, {"0": {"lr": float("nan")}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"lr": float("inf")}}, {"0": {"maximize": 1}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"differentiable": True}}, {"0": {"lr": [0.1]}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"lr": 2**63 - 1, "eps": b"x"}},), "invalid_option", 422),
        *wrong("unheard_of", (1, None, {}, [])),
        *wrong("x" * 4000, (1,)),
    ],
)
def test_every_key_of_a_header_is_checked(worker: RawWorker, key: str, value: object, status: int, code: str) -> None:
    """A key of a wrong type or value, one that is missing and one that nobody knows are refused by name."""
    answer = refused(lambda: worker.push(gradient(1, PARAMETERS), **{key: value}), status, code)
    if code != "invalid_option":
        assert answer.document["field"] == key[:80]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *product(["fields"], [None, [], "param", [1], ["param", "param"], {}, [["param"]], ...]),
        *product(["initial"], [1, "yes", []]),
        *product(["version"], [-1, 1.0, "1", True]),
        *product(["segments"], [1, [0], [0, 9]]),
        ("base", 1),
        ("groups", {}),
    ],
)
def test_every_key_of_a_put_is_checked(worker: RawWorker, key: str, value: object) -> None:
    """The header of new contents is held to its own keys."""
    changes = {"fields": ["param"], key: value}
    answer = refused(
        lambda: worker.raw.message(
            "PUT", f"{worker.path}/contents", worker.head(**{"base": ..., **changes}), payload_of(PARAMETERS)
        ),
        400,
        "invalid_request",
    )
    assert answer.document["field"] == key


@pytest.mark.parametrize("fields", [["momentum"], ["param", "exp_avg"], ["x" * 4000], ["../../param"], [""]])
def test_a_field_that_the_optimizer_does_not_have_is_refused(worker: RawWorker, fields: list[str]) -> None:
    """Unknown fields are refused on the way in and on the way out."""
    refused(
        lambda: worker.raw.message(
            "PUT", f"{worker.path}/contents", worker.head(base=..., fields=fields), payload_of(PARAMETERS)
        ),
        422,
        "invalid_option",
        "fields",
    )
    query = ",".join(fields)
    refused(lambda: worker.raw.request("GET", f"{worker.path}/contents?fields={query}"), 422, "invalid_option")


@pytest.mark.parametrize(
    "query", ["fields=param,param", "fields=param&fields=param", "since=1", "fields=step&x=1", "&=&"]
)
def test_a_query_that_nobody_knows_is_refused(worker: RawWorker, query: str) -> None:
    """Unknown parameters, and a field that would be sent twice."""
    refused(lambda: worker.raw.request("GET", f"{worker.path}/contents?{query}"), 400, "invalid_request")


@pytest.mark.parametrize(
    "ranges", ["", "0", "1,0", "0,0", "0,2,1,3", "6,8", "-1,1", "0,1e1", "0,9999999999", "²,³", ","]
)
def test_ranges_that_are_none_are_refused_in_a_query(worker: RawWorker, ranges: str) -> None:
    """The bounds of `segments` in a query are held to what those in a header are held to."""
    url = f"{worker.path}/contents?fields=step&segments={ranges}"
    refused(lambda: worker.raw.request("GET", url), 400, "invalid_request", "segments")


@pytest.mark.parametrize("fields", ["param", "sum", "step", "step,param"])
def test_some_segments_are_what_they_are_among_all(worker: RawWorker, fields: str) -> None:
    """Contents of chosen segments are the same bytes as in the whole, and the header names the segments."""
    whole = worker.raw.request("GET", f"{worker.path}/contents?fields={fields}")
    chosen = worker.raw.request("GET", f"{worker.path}/contents?fields={fields}&segments=1,3,5,6")
    sizes = [p.nbytes for p in PARAMETERS]
    expected, at = b"", 0
    for field in fields.split(","):
        for index, size in enumerate([8] * len(sizes) if field == "step" else sizes):
            expected += whole.payload[at : at + size] if index in (1, 2, 5) else b""
            at += size
    assert chosen.header == {**whole.header, "segments": [1, 3, 5, 6]}
    assert chosen.payload == expected
    assert at == len(whole.payload)


# -- the payload


@pytest.mark.parametrize("change", [-1, +1, -4, +4, -(2**10), +(2**10), +(2**22)])
def test_a_payload_of_another_size_is_refused(worker: RawWorker, change: int) -> None:
    """Bytes missing or too many, by one, by one number, or by far."""
    content = b"".join(payload_of(gradient(1, PARAMETERS)))
    content = content + bytes(change) if change > 0 else content[:change] if -change < len(content) else b""
    answer = worker.raw.message("POST", f"{worker.path}/push", worker.head(), [content])
    assert answer.code in ("tensor_mismatch", "truncated", "invalid_request", "limit_exceeded"), answer.body
    assert answer.status in (400, 413, 422)


@pytest.mark.parametrize("dtype", ["float64", "float16", "complex64"])
def test_gradients_of_another_dtype_are_refused(worker: RawWorker, dtype: str) -> None:
    """Numbers of another size than the parameters' do not fit."""
    wrong_ones = [zeros(dtype, *each.shape) for each in PARAMETERS]
    answer = worker.push(wrong_ones)
    assert answer.code in ("tensor_mismatch", "truncated", "invalid_request")


def test_gradients_for_other_segments_are_refused(worker: RawWorker) -> None:
    """A header that announces fewer or more segments than the payload has is refused."""
    some = gradient(1, PARAMETERS)[:2]
    for segments in ([0, 1], [0, 3], [5, 7], None):
        answer = worker.raw.message(
            "POST", f"{worker.path}/push", worker.head(**({"segments": segments} if segments else {})), payload_of(some)
        )
        assert answer.code in ("tensor_mismatch", "truncated", "invalid_request"), answer.body


@dataclass(frozen=True)
class Rows:
    """A sparse gradient of the first parameter, as announced and as sent."""

    announced: list[int]
    indices: list[list[int]]
    values: tuple[int, ...]
    code: str = "tensor_mismatch"


@pytest.mark.parametrize(
    "rows",
    [
        Rows([0, 0, 1], [[]], (1, 4)),
        Rows([0, 3, 1], [[0], [0], [0]], (1,)),
        Rows([0, 2**40, 1], [[0]], (1, 4)),
        Rows([0, 1, 2**40], [[0]], (1, 4)),
        Rows([0, 1, 2**62], [[0]], (1, 4)),
        Rows([0, 2, 2**61], [[0], [0]], (1,)),
        Rows([0, 1, 1], [[3]], (1, 4)),
        Rows([0, 1, 2], [[0, -1]], (2, 4)),
        Rows([0, 1, 1], [[2**62]], (1, 4)),
        Rows([0, 1, 1], [[-(2**63)]], (1, 4)),
        Rows([0, 2, 1], [[0], [4]], (1,)),
        Rows([0, 2, 1], [[2], [2**40]], (1,)),
    ],
)
def test_sparse_rows_that_cannot_be_are_refused(worker: RawWorker, rows: Rows) -> None:
    """Dimensions, counts and indices outside the parameter; a claimed count takes no memory."""
    payload = [torch.tensor(rows.indices, dtype=torch.int64), torch.zeros(rows.values)]
    head = worker.head(segments=[0, 1], sparse=[rows.announced])
    refused(
        lambda: worker.raw.message("POST", f"{worker.path}/push", head, payload_of(payload)), 422, "tensor_mismatch"
    )


@pytest.mark.parametrize("wide", [2**20, 2**33, 2**50])
def test_rows_of_an_empty_parameter_take_no_memory(raw: RawClient, wide: int) -> None:
    """A parameter of no elements may have any width; a sparse row of it is announced by its full size."""
    (worker,) = raw.begun(f"wide{wide}", parameters=[torch.zeros(3), torch.empty(0, wide)])
    head = worker.head(segments=[1, 2], sparse=[[1, 1, 1]])
    refused(
        lambda: raw.message("POST", f"{worker.path}/push", head, payload_of([torch.zeros(1, dtype=torch.int64)])),
        422,
        "tensor_mismatch",
    )
    assert worker.push([torch.ones(3), torch.empty(0, wide)]).receipt["version"] == 1


def test_sparse_rows_are_refused_with_weight_decay(raw: RawClient) -> None:
    """As torch does, Adagrad refuses them on the header alone."""
    (worker,) = raw.begun("decaying", parameters=[torch.zeros(3, 4)], groups=[{"weight_decay": 0.1}])
    rows = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 4), (3, 4))
    answer = worker.push([rows])
    assert (answer.status, answer.code) == (422, "tensor_mismatch")
    assert "weight_decay" in answer.document["detail"]
    assert worker.push([torch.ones(3, 4)]).receipt["version"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", range(len(PARAMETERS)))
@pytest.mark.parametrize("where", [0, -1])
def test_a_gradient_that_is_not_finite_is_refused(worker: RawWorker, which: int, where: int, bad: float) -> None:
    """NaN and Inf in the first, a middle or the last tensor of every dtype, naming tensor and worker."""
    gradients = gradient(1, PARAMETERS)
    own = gradients[which]
    own.view(-1)[where] = torch.tensor(complex(0, bad) if own.is_complex() else bad)
    answer = refused(lambda: worker.push(gradients), 422, "non_finite_gradient", f"p{which}")
    assert "'w0'" in answer.document["detail"]


@pytest.mark.parametrize("half", [None, "bfloat16", "float16"])
def test_much_that_is_not_finite_is_refused_by_name(raw: RawClient, half: str | None) -> None:
    """So much that it is looked at while it arrives: refused at its end, naming the tensor, and nothing has changed."""
    parameters = [torch.zeros(700_001), torch.zeros(3), torch.zeros(300_000)]
    (worker,) = raw.begun("much", parameters=parameters)
    more = {} if half is None else {"wire_gradients": half}
    dtype = torch.float32 if half is None else getattr(torch, half)
    try:
        for which, at in ((0, 0), (0, 700_000), (1, 1), (2, 299_999), (2, 150_000)):
            gradients = [torch.ones_like(each, dtype=dtype) for each in parameters]
            gradients[which][at] = float("nan")
            refused(partial(worker.push, gradients, **more), 422, "non_finite_gradient", f"p{which}")
        assert worker.push([torch.ones_like(each, dtype=dtype) for each in parameters], **more).receipt["version"] == 1
    finally:
        raw.request("DELETE", worker.path)


def test_sparse_rows_that_are_not_finite_are_refused(worker: RawWorker) -> None:
    """A sparse gradient is looked at, too."""
    rows = torch.sparse_coo_tensor(torch.tensor([[2]]), torch.tensor([[1, 2, 3, float("nan")]]), (3, 4))
    refused(lambda: worker.push([rows, *gradient(1, PARAMETERS)[1:]]), 422, "non_finite_gradient", "p0")


@pytest.mark.parametrize(
    ("fields", "values"),
    [(["step"], [float("nan")] * 7), (["step"], [-1.0] * 7), (["step"], [0.5] * 7), (["param", "step"], [-3.0] * 7)],
)
def test_state_that_cannot_be_is_refused(worker: RawWorker, fields: list[str], values: list[float]) -> None:
    """Step counts are whole numbers from 0 up; a put with others changes nothing, its parameters included."""
    contents = {"param": list(PARAMETERS), "step": [torch.tensor(values, dtype=torch.float64)]}
    refused(lambda: worker.put({field: contents[field] for field in fields}), 422, "tensor_mismatch", "step")


@pytest.mark.parametrize("version", [2**63 - 1, 2**63 - 2, 2**53])
def test_a_version_beyond_counting_is_refused(raw: RawClient, version: int) -> None:
    """First contents begin at a version that leaves room for all the steps of a lifetime, and that JSON can hold."""
    name = f"far{version}"
    worker = raw.join(name)
    refused(lambda: worker.begin(version=version), 400, "invalid_request", "version")
    assert worker.begin(version=2**52).receipt["version"] == 2**52
    assert worker.push([torch.ones(4)]).receipt["version"] == 2**52 + 1


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


def test_what_is_refused_is_forgotten(worker: RawWorker, server: RunningServer) -> None:
    """After all of these, the server still has one session of this name, with nothing waiting and nothing in flight."""
    page = worker.raw.request("GET", worker.path).document
    assert page["bytes"]["waiting"] == 0
    assert page["workers"]["w0"] == {
        "incarnation": worker.joined["incarnation"],
        "epoch": 1,
        "sequence": worker.last,
        "waiting": False,
        "live": page["workers"]["w0"]["live"],  # a matter of how long the tests took
    }


def test_every_dtype_is_in_the_table() -> None:
    """The parameters of these tests are of every dtype that a parameter can have."""
    assert {str(each.dtype).removeprefix("torch.") for each in PARAMETERS} == set(DTYPES) - {"int64"}
    assert DEFAULT_LIMITS.header_bytes == 1 << 20
