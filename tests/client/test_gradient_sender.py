"""Gradients on their way out: the bytes are those of the gradients, whichever of them are joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farstep.tensors import GradientSender, outgoing
from farstep.tensors.gradient_sender import SMALL_BYTES

LARGE = SMALL_BYTES // 4 + 1


def test_the_bytes_are_those_of_the_gradients_in_their_order() -> None:
    """Small ones of two dtypes, large ones between them, scalars and empty ones come out one after the other."""
    parameters = [
        torch.zeros(3, 4),
        torch.zeros(5),
        torch.zeros(LARGE),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(7),
    ]
    gradients = [torch.randn(p.shape).to(p.dtype) for p in parameters]
    payload = GradientSender(parameters).payload(gradients)
    assert isinstance(payload, list)
    assert b"".join(payload) == b"".join(map(outgoing, gradients))


def test_small_neighbours_are_one_buffer_and_large_ones_are_sent_from_where_they_lie() -> None:
    """However many small gradients there are, the socket is given one buffer; a large one is not copied."""
    parameters = [*(torch.zeros(16) for _ in range(60)), torch.zeros(LARGE)]
    gradients = [torch.randn(p.shape) for p in parameters]
    payload = GradientSender(parameters).payload(gradients)
    assert isinstance(payload, list)
    assert len(payload) == 2
    gradients[-1].fill_(1.5)
    assert bytes(payload[-1]) == bytes(outgoing(gradients[-1]))


@pytest.mark.parametrize(
    "odd",
    [
        torch.randn(4, 6).t(),
        torch.randn(12, 4)[::2],
        torch.randn(6, 4, dtype=torch.complex64).conj().imag,
    ],
    ids=["transposed", "strided", "negative"],
)
def test_gradients_that_do_not_lie_in_order_come_out_in_order(odd: Tensor) -> None:
    """A view that is transposed, has gaps, or shows the negative of its memory is joined as the values it shows."""
    parameters = [torch.zeros(6, 4), torch.zeros(3)]
    gradients = [odd, torch.randn(3)]
    payload = GradientSender(parameters).payload(gradients)
    assert isinstance(payload, list)
    assert len(payload) == 1
    assert bytes(payload[0]) == b"".join(map(outgoing, gradients))


def test_conjugates_come_out_as_the_values_they_show() -> None:
    """A lazily conjugated gradient is not sent as the memory behind it."""
    parameters = [torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex64)]
    gradients = [torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3, dtype=torch.complex64)]
    payload = GradientSender(parameters).payload(gradients)
    assert isinstance(payload, list)
    assert b"".join(payload) == b"".join(map(outgoing, gradients))


@pytest.mark.parametrize(
    "second",
    [None, torch.zeros(4).to_sparse(), torch.zeros(4, dtype=torch.float64)],
    ids=["missing", "sparse", "of another dtype"],
)
def test_what_is_not_all_there_and_dense_is_left_to_others(second: Tensor | None) -> None:
    """A missing gradient, a sparse one, and one of another dtype than its parameter are described one by one."""
    sender = GradientSender([torch.zeros(4), torch.zeros(4), torch.zeros(4)])
    assert sender.payload([torch.zeros(4), second, torch.zeros(4)]) is None
