"""Memory for gradients that are being sent: it holds what was copied, and finds every bit that differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farstep.overlap import plain
from farstep.overlap.stage import UNIT_BYTES, Stage
from farstep.protocol.codecs import codec_named
from farstep.tensors import Encoder
from tests.support.client.twins import drawn

SHAPES = [(300, 700), (5,), (0, 3), (), (131, 2)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def filled(gradients: list[Tensor], half: str | None = None) -> Stage:
    stage = Stage(gradients, Encoder(gradients, codec_named(half)))
    for unit in stage.units(range(len(gradients))):
        stage.fill_(unit, plain(gradients[unit.index]))
    return stage


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_holds_what_was_copied(dtype: torch.dtype) -> None:
    """The payload in any order is the gradients' bytes, and each counts as held."""
    gradients = drawn(1, SHAPES, dtype)
    stage = filled(gradients)
    order = [4, 0, 3, 2, 1]
    expected = b"".join(bytes(gradients[i].contiguous().view(-1).view(torch.uint8).numpy()) for i in order)
    assert b"".join(bytes(view) for view in stage.payload(order)) == expected
    assert stage.nbytes(order) == len(expected)
    assert all(stage.holds(i, g.numel(), plain(g)) for i, g in enumerate(gradients))


@pytest.mark.parametrize("half", [None, "bfloat16"])
def test_every_bit_counts(half: str | None) -> None:
    """A number that differs is found wherever it is, but not behind what was copied; -0.0 is not 0.0, NaN is NaN."""
    (gradient,) = drawn(1, [(3 * UNIT_BYTES // 4,)])
    gradient[7], gradient[-7] = float("nan"), 0.0
    count = gradient.numel()
    stage = filled([gradient], half)
    assert stage.holds(0, count, gradient.clone())
    for place in (0, UNIT_BYTES // 4, count - 1):
        other = gradient.clone()
        other[place] += 1.0
        assert not stage.holds(0, count, other)
        assert stage.holds(0, place, other)
    other = gradient.clone()
    other[-7] = -0.0
    assert not stage.holds(0, count, other)


def test_a_gradient_of_another_dtype_or_size_is_another() -> None:
    """Bytes that happen to be equal do not make it the same."""
    gradient = torch.zeros(6)
    stage = filled([gradient])
    assert stage.takes(0, gradient)
    assert not stage.takes(0, torch.zeros(6, dtype=torch.float64))
    assert not stage.takes(0, gradient.to_sparse())
    assert not stage.takes(0, torch.zeros(5))


def test_plain_gradients_are_not_copied() -> None:
    """A gradient whose memory has its elements in order is used as it is; others are copied as they show."""
    gradient = torch.arange(6.0).view(2, 3)
    assert plain(gradient).data_ptr() == gradient.data_ptr()
    assert plain(gradient.t()).tolist() == gradient.t().tolist()
    assert plain(gradient.t()).is_contiguous()
    assert plain(torch.tensor([1 + 2j]).conj()).view(torch.float32).tolist() == [1.0, -2.0]
