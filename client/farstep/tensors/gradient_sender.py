"""Outgoing gradients: small neighbours are joined in a buffer, large ones are sent from their own memory.

Making a view of a tensor's memory takes as long as copying some ten thousand bytes, and every buffer of a message costs
again on its way to the socket. So a step of many small gradients is one copy and one buffer.

    up to LARGE_BYTES in all    the payload is there before it is sent
    above                       it is made piece by piece while it is sent; what has to be encoded takes the memory
                                of one piece
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from farstep.protocol.memory import tensor_memory
from farstep.tensors.edits import BackgroundCompare
from farstep.tensors.encoder import Encoder
from farstep.tensors.staging import outgoing
from farstep.transport import Batch, StreamedBody
from farstep.transport.pieces import Payload

SMALL_BYTES: Final = 32 * 1024
"""Up to this size a gradient is copied."""
PIECE_BYTES: Final = 4 << 20
"""The size of pieces of a gradient sent from its own memory; with 256 KiB sending takes a third longer."""
ENCODED_BYTES: Final = 1 << 20
"""The size of pieces that are encoded, and sent while a cache has them."""
JOINED_BYTES: Final = 1 << 20
"""The largest buffer of joined gradients."""
LARGE_BYTES: Final = 4 << 20
"""From this size on a payload is made while it is sent."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """Neighbours that are copied, or encoded, into one buffer."""

    first: int
    staged: list[Tensor]
    memory: memoryview
    encoder: Encoder

    @property
    def nbytes(self) -> int:
        return len(self.memory)

    def made(self, gradients: list[Tensor]) -> Iterator[memoryview]:
        encoder = self.encoder
        chosen = gradients[self.first : self.first + len(self.staged)]
        if encoder.elementwise or not encoder.applies(self.first):
            torch._foreach_copy_(self.staged, chosen)
            if encoder.codec.limit is not None:
                for index, (encoded, gradient) in enumerate(zip(self.staged, chosen, strict=True), self.first):
                    encoder.check(index, encoded, gradient)
        else:
            for index, (into, gradient) in enumerate(zip(self.staged, chosen, strict=True), self.first):
                encoder.encode_(index, gradient, into)
        yield self.memory


@dataclass(frozen=True, slots=True)
class _Lying:
    """A gradient that is sent from its own memory."""

    index: int
    nbytes: int

    def made(self, gradients: list[Tensor]) -> Iterator[memoryview]:
        memory = outgoing(gradients[self.index])
        for start in range(0, self.nbytes, PIECE_BYTES):
            yield memory[start : start + PIECE_BYTES]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A gradient that is encoded piece by piece into the same scratch memory."""

    index: int
    elements: int
    piece: int
    nbytes: int
    scratch: Tensor
    encoder: Encoder

    def made(self, gradients: list[Tensor]) -> Iterator[memoryview]:
        gradient = gradients[self.index].detach().reshape(-1)
        for start in range(0, self.elements, self.piece):
            source = gradient[start : start + self.piece]
            into = self.scratch[: self.encoder.length(self.index, len(source))]
            self.encoder.encode_(self.index, source, into, start)
            yield tensor_memory(into)


@final
class GradientSender:
    """The sender of one optimizer's gradients.

    Args:
        parameters: whose gradients they are, in the session's order.
        encoder: encodes them; None if they are sent unchanged.

    Attributes:
        nbytes: size of the payload of all of them.
    """

    def __init__(self, parameters: Sequence[Tensor], encoder: Encoder | None = None) -> None:
        self._dtypes = [p.dtype for p in parameters]
        self._encoder = Encoder(parameters) if encoder is None else encoder
        self._scratch: Tensor | None = None
        self.nbytes = sum(self._encoder.nbytes(index) for index in range(len(parameters)))
        self._runs: list[_Joined | _Lying | _Encoded] = []
        first = size = 0
        for last, p in enumerate(parameters):
            size += p.nbytes
            if last and (size > JOINED_BYTES or not _joined(parameters[last - 1], p)):
                self._runs.append(self._run(parameters, first, last))
                first, size = last, p.nbytes
        if parameters:
            self._runs.append(self._run(parameters, first, len(parameters)))

    @property
    def large(self) -> bool:
        """Return whether the payload is made while it is sent."""
        return self.nbytes >= LARGE_BYTES

    def payload(
        self, gradients: Sequence[Tensor | None], looking: BackgroundCompare | None = None, *, at_once: bool = False
    ) -> Payload | None:
        """Return the payload of gradients that are complete and dense, None for others.

        The next payload overwrites it.

        Args:
            gradients: they must not change until the payload has been sent.
            looking: the search for edits that runs while a large payload is sent, and ends before the payload does.
            at_once: make the whole payload now, however large; only without encoding.

        Raises:
            NonFinite: see `Encoder.check`; a large payload raises it, and `Edited`, when it is made.
        """
        there = [each for each in gradients if each is not None and each.layout is torch.strided]
        if [each.dtype for each in there] != self._dtypes:
            return None
        if at_once or not self.large:
            return [piece for run in self._runs for piece in run.made(there)]
        return StreamedBody(partial(self._made, there, looking), self.nbytes)

    def _made(self, gradients: list[Tensor], looking: BackgroundCompare | None) -> Generator[Batch]:
        left = self.nbytes
        if looking is not None:
            looking.start()
        try:
            for run in self._runs:
                for piece in run.made(gradients):
                    left -= len(piece)
                    if looking is not None and left:
                        looking.glance()
                    elif looking is not None:
                        looking.finish()
                    yield [piece]
        finally:
            if looking is not None:
                looking.stop()

    def _run(self, parameters: Sequence[Tensor], first: int, last: int) -> _Joined | _Lying | _Encoded:
        encoder, members = self._encoder, range(first, last)
        encoded, dtype = encoder.applies(first), encoder.dtypes[first]
        if len(members) == 1 and not encoded:
            return _Lying(first, parameters[first].nbytes)
        elements = parameters[first].numel()
        piece = encoder.cut(first, ENCODED_BYTES // dtype.itemsize)
        if len(members) == 1 and self.large and encoder.codec.block is not None:
            if self._scratch is None:
                self._scratch = torch.empty(encoder.length(first, piece), dtype=dtype, device="cpu")
            return _Encoded(first, elements, piece, encoder.nbytes(first), self._scratch, encoder)
        sizes = [encoder.length(index) for index in members]
        flat = torch.empty(sum(sizes), dtype=dtype, device="cpu")
        pieces = list(torch.split(flat, sizes))
        if encoder.elementwise or not encoded:
            pieces = [piece.view(parameters[index].shape) for piece, index in zip(pieces, members, strict=True)]
        return _Joined(first, pieces, tensor_memory(flat), encoder)


def _joined(before: Tensor, here: Tensor) -> bool:
    return before.dtype == here.dtype and max(before.nbytes, here.nbytes) <= SMALL_BYTES
