"""A codec: how the elements of a tensor become bytes on the wire, and bytes elements again.

    worker                          wire                        server
    float32 gradients    ─ encode ─► encoded bytes ─ decode ──► float32 gradients, float32 parameters (the master)
    float32 parameters   ◄─ decode ─ encoded bytes ◄─ encode ───┘

A worker chooses a codec for each direction, and headers name it (`wire_gradients`, `wire_parameters`). Both sides ask
the same object how many bytes a segment takes, so a size is never guessed. Tensors to which a codec does not apply
travel as they are.

Each segment is encoded by itself, so that one without a gradient is left out and segments may come in any order. How
much a codec tells about itself decides how fast it is:

    element     one encoded element for each element, of a dtype that torch knows: kernels take encoded gradients as
                they came, and an answer is written in the pass of the step
    block       encoded block by block: a large gradient is encoded piece by piece, while it is sent
    neither     a segment is encoded whole
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

APPLIES_TO = "float32"
"""The dtype that lossy codecs encode: gradients and parameters of other dtypes travel as they are."""


class Codec(ABC):
    """Encode and decode float32 tensors. An instance has no state: what encoding left out is kept by its caller.

    `import farstep` imports every codec, and must not import torch: a codec that needs more than the methods of the
    tensors that it is given imports torch inside its own.

    Attributes:
        name: its name in headers.
        option: its name as `wire=`, and in FARSTEP_WIRE.
        element: the wire's name of the dtype of an encoded element, where there is one for each element; None for a
            codec that encodes to bytes (uint8).
        block: how many elements are encoded together. Encoding a tensor in pieces of whole blocks gives the bytes of
            encoding it at once. None where that is not so.
        residual: whether the worker adds what encoding left out of a gradient to its next one (error feedback).
        limit: the largest finite number that it can encode; None if there is none below the largest of float32.
    """

    name: str
    option: str
    element: str | None = None
    block: int | None = None
    residual: bool = False
    limit: float | None = None

    def applies_to(self, dtype: str) -> bool:
        """Return whether tensors of a dtype, named as on the wire, are encoded."""
        return dtype == APPLIES_TO

    @abstractmethod
    def encoded_bytes(self, elements: int) -> int:
        """Return exactly how many bytes so many elements take; 0 for none."""

    @abstractmethod
    def encode_(self, source: Tensor, into: Tensor) -> None:
        """Write a tensor's encoded form into memory that is there. The same numbers always give the same bytes.

        Args:
            source: float32; flat and on the CPU unless the codec has an `element`.
            into: of the element's dtype and the source's shape; without an element, flat uint8 of
                `encoded_bytes`, which may begin at any address.
        """

    @abstractmethod
    def decode_(self, source: Tensor, into: Tensor) -> None:
        """Write what encoded bytes stand for into flat float32 memory.

        The bytes come from another machine: any of the right number are decoded to some numbers, without an error.

        Args:
            source: as `encode_` writes it.
            into: float32, with the elements that were encoded.
        """

    def lost_finite(self, encoded: Tensor, source: Tensor) -> bool:
        """Return whether a finite number of the source is none in its encoded form; only where there is a `limit`."""
        return False

    def __repr__(self) -> str:
        return f"<codec {self.name}>"
