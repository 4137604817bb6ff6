"""What encoding leaves out of a gradient shares the fate of its push: added to the next one, forgotten, or in doubt."""

from __future__ import annotations

import torch
from torch import Tensor

from farstep.tensors import Encoder
from tests.codecs.table import TOYS, in_blocks
from tests.support.client.twins import drawn

FEEDBACK = next(row.codec for row in TOYS if row.codec.residual)
GRADIENTS = [gradient for seed in range(6) for gradient in drawn(seed, [(130,)])]


class Encoded:
    """An encoder of one parameter, and the bytes of its pushes."""

    def __init__(self) -> None:
        self.encoder = Encoder([torch.zeros(130)], FEEDBACK)

    def push(self, gradient: Tensor) -> Tensor:
        self.encoder.begin()
        return self.again(gradient)

    def again(self, gradient: Tensor) -> Tensor:
        encoded, arrived = self.encoder.encoded(0, gradient), torch.empty(130)
        FEEDBACK.decode_(encoded, arrived)
        return arrived


def left_by(gradient: Tensor) -> Tensor:
    return gradient - in_blocks(gradient)


def test_committed_is_added_to_the_next() -> None:
    """And only once: the next residual is what is then left out."""
    encoded = Encoded()
    left = torch.zeros(130)
    for gradient in GRADIENTS:
        arrived = encoded.push(gradient)
        assert torch.equal(arrived, in_blocks(gradient + left))
        left = gradient + left - arrived
        assert left.count_nonzero()
        encoded.encoder.commit(counts=True)


def test_refused_and_uncounted_are_forgotten() -> None:
    """The next push is encoded as if it had not been."""
    first, second, third, *_ = GRADIENTS
    encoded = Encoded()
    encoded.push(first)
    encoded.encoder.commit(counts=True)
    encoded.push(second)
    encoded.encoder.rollback()
    assert torch.equal(encoded.push(third), in_blocks(third + left_by(first)))
    encoded.encoder.commit(counts=False)
    assert torch.equal(encoded.push(third), in_blocks(third + left_by(first)))


def test_in_doubt_is_encoded_again_with_the_same_bytes() -> None:
    """So that the push can be repeated; committed then, it counts once."""
    first, second, *_ = GRADIENTS
    encoded = Encoded()
    arrived = encoded.push(first)
    encoded.encoder.doubt("first")
    assert torch.equal(encoded.push(first), arrived)
    encoded.encoder.commit(counts=True)
    assert not encoded.encoder.settle("first")
    assert torch.equal(encoded.push(second), in_blocks(second + left_by(first)))


def test_what_is_settled_is_the_push_that_was_in_doubt() -> None:
    """Another write that turns out to have been applied says nothing about it."""
    first, second, third, *_ = GRADIENTS
    encoded = Encoded()
    encoded.push(first)
    encoded.encoder.doubt("first")
    assert torch.equal(encoded.push(second), in_blocks(second))
    assert not encoded.encoder.settle("an edit")
    assert torch.equal(encoded.again(second), in_blocks(second))
    assert encoded.encoder.settle("first")
    assert torch.equal(encoded.again(second), in_blocks(second + left_by(first)))
    encoded.encoder.rollback()
    assert not encoded.encoder.settle("first")
    assert torch.equal(encoded.push(third), in_blocks(third + left_by(first)))


def test_a_codec_that_keeps_nothing_is_never_in_doubt() -> None:
    """Nothing is left out that would have to be added: its gradients are not encoded again."""
    encoder = Encoder([torch.zeros(130)], TOYS[0].codec)
    encoder.begin()
    encoder.encoded(0, GRADIENTS[0])
    encoder.doubt("first")
    assert not encoder.settle("first")
