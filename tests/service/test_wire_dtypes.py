"""Float32 in 16 bits, by hand: what a server reads and answers, what it refuses, and what that takes of its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from tests.support.service.answers import opened
from tests.support.service.measured import SLACK, Process, sent
from tests.support.service.raw import RawClient, RawWorker, gradient, payload_of, tensors_of
from tests.support.service.servers import RunningServer, running_server

PARAMETERS = (torch.linspace(-1, 1, 12).view(3, 4), torch.ones(5, dtype=torch.float64), torch.ones(6))
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 1 << 20
SIZE = 96 * MIB


@pytest.fixture
def worker(raw: RawClient, request: pytest.FixtureRequest) -> Iterator[RawWorker]:
    """Return the one worker of a session."""
    (own,) = raw.begun(f"halves-{abs(hash(request.node.name))}", parameters=PARAMETERS)
    yield own
    raw.request("DELETE", own.path)


def narrowed(tensors: list[torch.Tensor], half: str) -> list[torch.Tensor]:
    return [each.to(HALVES[half]) if each.dtype is torch.float32 else each for each in tensors]


@pytest.mark.parametrize("half", HALVES)
def test_a_push_and_its_answer_in_16_bits(worker: RawWorker, half: str) -> None:
    """The payloads hold float32 segments in the dtypes that the header names, each direction by itself."""
    sent = gradient(1, PARAMETERS)
    answer = worker.push(narrowed(sent, half), wire_gradients=half, wire_parameters=half)
    assert answer.status == 200, answer.body
    _, full = worker.pull()
    expected = narrowed(full, half)
    got = tensors_of(answer.payload, expected)
    assert all(map(torch.equal, got, expected))
    assert "wire_parameters" not in answer.header
    again = worker.push(sent, wire_parameters=half)
    assert len(again.payload) == sum(each.nbytes for each in expected)
    other = worker.push(narrowed(sent, half), wire_gradients=half)
    assert len(other.payload) == sum(each.nbytes for each in PARAMETERS)


@pytest.mark.parametrize("half", HALVES)
def test_contents_in_16_bits(worker: RawWorker, half: str) -> None:
    """A pull may ask for them, of all parameters."""
    answer = worker.raw.request("GET", f"{worker.path}/contents?wire_parameters={half}")
    expected = narrowed(list(PARAMETERS), half)
    assert all(map(torch.equal, tensors_of(answer.payload, expected), expected))


@pytest.mark.parametrize("key", ["wire_gradients", "wire_parameters"])
@pytest.mark.parametrize("value", ["bf16", "float32", "float64", "int64", "", 16, True, None, ["bfloat16"]])
def test_another_dtype_is_refused(worker: RawWorker, key: str, value: object) -> None:
    """By the header key, and nothing has changed."""
    answer = worker.push(gradient(1, PARAMETERS), **{key: value})
    assert (answer.status, answer.code, answer.document["field"]) == (400, "invalid_request", key)
    assert worker.version == 0
    assert worker.push(gradient(1, PARAMETERS)).status == 200


@pytest.mark.parametrize("query", ["bf16", "", "bfloat16,float16", "bfloat16&wire_parameters=bfloat16"])
def test_another_dtype_in_a_query_is_refused(worker: RawWorker, query: str) -> None:
    """By the parameter's name."""
    answer = worker.raw.request("GET", f"{worker.path}/contents?wire_parameters={query}")
    assert (answer.status, answer.code, answer.document["field"]) == (400, "invalid_request", "wire_parameters")


@pytest.mark.parametrize("query", ["fields=sum", "fields=param,step", "segments=0,1"])
def test_only_all_parameters_are_given_in_16_bits(worker: RawWorker, query: str) -> None:
    """State is never rounded, and what is asked for by segments is given as it is."""
    answer = worker.raw.request("GET", f"{worker.path}/contents?wire_parameters=bfloat16&{query}")
    assert (answer.status, answer.document["field"]) == (400, "wire_parameters")


def test_a_payload_of_another_length_than_announced_is_refused(worker: RawWorker) -> None:
    """Full gradients under a header that says 16 bits, and the other way round: nothing has changed."""
    full = gradient(1, PARAMETERS)
    for answer in (
        worker.push(full, wire_gradients="bfloat16"),
        worker.push(narrowed(full, "bfloat16")),
    ):
        assert answer.status in (400, 422), answer.body
        assert answer.code in ("tensor_mismatch", "invalid_request", "truncated")
    assert worker.version == 0
    assert worker.push(narrowed(full, "float16"), wire_gradients="float16").status == 200


def test_a_retry_in_16_bits_is_the_same_push_and_one_in_another_dtype_is_not(worker: RawWorker) -> None:
    """The dtypes belong to the content: the same bytes give the first receipt, others are refused."""
    sent = narrowed(gradient(1, PARAMETERS), "bfloat16")
    first = worker.push(sent, wire_gradients="bfloat16", wire_parameters="bfloat16")
    again = worker.push(sent, wire_gradients="bfloat16", wire_parameters="bfloat16", seq=worker.last)
    assert again.header["duplicate"]
    assert (again.receipt, again.payload) == (first.receipt, first.payload)
    other = worker.push(gradient(1, PARAMETERS), seq=worker.last)
    assert other.code == "idempotency_mismatch"
    assert worker.version == 1


def test_infinity_in_float16_is_refused_by_name(worker: RawWorker) -> None:
    """The error says which tensor it is, and in which dtype it came."""
    sent = narrowed(gradient(1, PARAMETERS), "float16")
    sent[2][3] = float("inf")
    answer = worker.push(sent, wire_gradients="float16")
    assert (answer.status, answer.code, answer.document["field"]) == (422, "non_finite_gradient", "p2")
    assert "float16" in answer.document["detail"]
    assert worker.version == 0


def test_a_step_that_is_skipped_is_answered_in_16_bits(worker: RawWorker) -> None:
    """With `changed`, segments that changed since are narrowed by themselves."""
    assert worker.push(gradient(1, PARAMETERS), segments=...).status == 200
    (only,) = narrowed([PARAMETERS[2]], "bfloat16")
    assert worker.push([None, None, PARAMETERS[2]]).status == 200
    answer = worker.push([], segments=[], skip=True, reply="changed", have=1, base=2, wire_parameters="bfloat16")
    assert answer.header["segments"] == [2, 3]
    (got,) = tensors_of(answer.payload, [only])
    assert torch.equal(got, worker.pull()[1][2].bfloat16())


@pytest.fixture
def anew() -> Iterator[RunningServer]:
    """Run a server whose process is no fork: memory that is let go of goes back to the system as it does for users."""
    with running_server() as running:
        yield running


@pytest.fixture
def raw_anew(anew: RunningServer) -> Iterator[RawClient]:
    with RawClient(anew.url) as client:
        yield client


@pytest.mark.alone
def test_memory_of_conversions_is_counted_and_does_not_add_up(anew: RunningServer, raw_anew: RawClient) -> None:
    """Steps leave none behind; slow readers of one version share one, and when they go the next ones take no more."""
    server, raw = anew, raw_anew
    parameters = tuple(torch.zeros(SIZE // 16) for _ in range(4))
    ones = tuple(torch.ones(SIZE // 16, dtype=torch.bfloat16) for _ in range(4))
    (warm,) = raw.begun("halves-warm", parameters=(torch.zeros(200_000),))
    for _ in range(3):
        warm.push([torch.ones(200_000).bfloat16()], wire_gradients="bfloat16", wire_parameters="bfloat16")
    raw.request("DELETE", warm.path)
    process = Process(server)
    own = raw.join("halves-large", parameters=parameters)
    begin = own.head(base=..., fields=["param"], initial=True)
    assert sent(server.url, "PUT", f"{own.path}/contents", begin, parameters) == 200
    own.last = 1

    def steps(count: int) -> None:
        for _ in range(count):
            head = own.head(wire_gradients="bfloat16", wire_parameters="bfloat16")
            assert sent(server.url, "POST", f"{own.path}/push", head, ones) == 200
            own.last += 1

    steps(3)
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK
    taken = 2 * SIZE + SIZE // 2
    for cut in range(3):  # an answer that was cut off leaves its memory to the collector, at most the last one's
        with ExitStack() as stack:
            for _ in range(3):
                sock = stack.enter_context(opened(server.url, buffer_bytes=1 << 14))
                asked = f"GET {own.path}/contents?wire_parameters=bfloat16 HTTP/1.1\r\nHost: localhost\r\n\r\n"
                sock.sendall(asked.encode())
                assert sock.recv(1000)
            most = taken + (SIZE // 2 if cut else 0) + SLACK
            assert process.settle(most) <= most
            assert raw.request("GET", own.path).document["bytes"]["versions"] == SIZE // 2
        steps(1)
        assert raw.request("GET", own.path).document["bytes"]["versions"] == 0
    assert process.settle(taken + SLACK) <= taken + SLACK
    raw.request("DELETE", own.path)


def test_sparse_values_come_in_16_bits(raw: RawClient) -> None:
    """Their indices stay int64."""
    (own,) = raw.begun("halves-sparse", parameters=(torch.zeros(10, 3),))
    dense = torch.zeros(10, 3)
    dense[4] = torch.tensor([1.0, 2.0, 3.0])
    sparse = dense.to_sparse(1).coalesce()
    half = torch.sparse_coo_tensor(
        sparse.indices(), sparse.values().half(), sparse.shape, check_invariants=True
    ).coalesce()
    assert sum(each.nbytes for each in payload_of([half])) == 8 + 3 * 2
    assert own.push([half], wire_gradients="float16").status == 200
    (other,) = raw.begun("halves-dense", parameters=(torch.zeros(10, 3),))
    assert other.push([dense.to_sparse(1)]).status == 200
    assert torch.equal(own.pull()[1][0], other.pull()[1][0])
