"""Bad payloads: tensors that do not fit, rows that cannot be, and numbers that are not finite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from tests.support.service.bad_input.refusing import PARAMETERS, refused
from tests.support.service.raw import RawClient, RawWorker, gradient, payload_of, zeros


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


@pytest.mark.promise(
    "A gradient with NaN or Inf is refused, naming tensor and worker, and nothing is applied.",
    area="NaN, clipping and averages",
)
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
