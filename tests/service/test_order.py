"""Pushes in an order of their own, by hand: what a server makes of them, what it refuses, and half of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, half_sent
from tests.support.service.raw import RawClient, RawWorker, gradient
from tests.support.service.servers import RunningServer

PARAMETERS = (torch.zeros(3, 4), torch.zeros(5, dtype=torch.float64), torch.zeros(6), torch.zeros(()))


@pytest.fixture
def workers(raw: RawClient, request: pytest.FixtureRequest) -> Iterator[tuple[RawWorker, RawWorker]]:
    """Return the workers of two sessions, one each."""
    pair = [raw.begun(f"order-{i}-{abs(hash(request.node.name))}", parameters=PARAMETERS)[0] for i in range(2)]
    yield pair[0], pair[1]
    for each in pair:
        raw.request("DELETE", each.path)


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [0, 1, 2, 3], [2, 3, 0, 1], [1, 3, 0, 2]])
@pytest.mark.parametrize("half", [None, "bfloat16"])
def test_each_gradient_goes_to_its_segment(
    workers: tuple[RawWorker, RawWorker], order: list[int], half: str | None
) -> None:
    """A session that gets them in another order, several dtypes among them, has the same parameters."""
    ordered, ascending = workers
    changes = {} if half is None else {"wire_gradients": half}
    for seed in range(3):
        sent = [g.bfloat16() if half and g.dtype is torch.float32 else g for g in gradient(seed, PARAMETERS)]
        assert ordered.push([sent[i] for i in order], order=order, segments=..., **changes).status == 200
        assert ascending.push(sent, **changes).status == 200
    assert all(map(torch.equal, ordered.pull()[1], ascending.pull()[1]))


def test_some_segments_in_an_order(workers: tuple[RawWorker, RawWorker]) -> None:
    """Those that have no gradient are not in it, and are not stepped."""
    ordered, ascending = workers
    sent = gradient(1, PARAMETERS)
    assert ordered.push([sent[3], sent[1]], order=[3, 1], segments=[1, 2, 3, 4]).status == 200
    assert ascending.push([None, sent[1], None, sent[3]]).status == 200
    assert all(map(torch.equal, ordered.pull()[1], ascending.pull()[1]))


@pytest.mark.parametrize(
    "order", [[0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 2, 4], [0, 1, 2, -1], [0, 0, 2, 3], [], "0123", [0, 1, 2, True], [0.0]]
)
def test_another_order_is_refused(workers: tuple[RawWorker, RawWorker], order: object) -> None:
    """By the header key, and nothing has changed."""
    worker, _ = workers
    answer = worker.push(gradient(1, PARAMETERS), order=order, segments=...)
    assert (answer.status, answer.code, answer.document["field"]) == (400, "invalid_request", "order")
    assert worker.version == 0
    assert worker.push(gradient(1, PARAMETERS)).status == 200


def test_sparse_gradients_have_no_order(workers: tuple[RawWorker, RawWorker]) -> None:
    """They are refused together, before any memory is taken."""
    worker, _ = workers
    answer = worker.push(gradient(1, PARAMETERS), order=[0, 1, 2, 3], sparse=[[0, 1, 2]], segments=...)
    assert (answer.status, answer.document["field"]) == (400, "order")


def test_a_retry_has_the_same_order(workers: tuple[RawWorker, RawWorker]) -> None:
    """The same bytes under a name that is known get the first receipt; the same gradients in another order do not."""
    worker, _ = workers
    sent, order = gradient(1, PARAMETERS), [3, 2, 1, 0]
    first = worker.push([sent[i] for i in order], order=order, segments=...)
    again = worker.push([sent[i] for i in order], order=order, segments=..., seq=worker.last)
    assert again.receipt == first.receipt
    assert again.header["duplicate"]
    assert worker.push(sent, seq=worker.last).code == "idempotency_mismatch"


def test_half_a_body_changes_nothing(raw: RawClient, server: RunningServer) -> None:
    """A push that was begun and never ended has used no sequence, and another connection takes the step meanwhile."""
    (worker,) = raw.begun("half-streamed", parameters=PARAMETERS)
    sent = gradient(1, PARAMETERS)
    body = b"".join(encode(*worker.message([sent[i] for i in (3, 2, 1, 0)], order=[3, 2, 1, 0])))
    headers = {"content-type": MSGPACK, "content-length": str(len(body))}
    with half_sent(server.url, "POST", f"{worker.path}/push", headers, [body[:-1]]):
        answer = worker.push(sent)
        assert answer.receipt["version"] == 1
        assert not answer.header["duplicate"]
    raw.request("DELETE", worker.path)
