"""A codec: how the elements of a tensor become bytes on the wire, and bytes elements again.

    worker                          wire                        server
    float32 gradients    ─ encode ─► encoded bytes ─ decode ──► float32 gradients, float32 parameters (the master)
    float32 parameters   ◄─ decode ─ encoded bytes ◄─ encode ───┘

A worker chooses a codec for each direction, and headers name it (`wire_gradients`, `wire_parameters`). Both sides ask
the same object for the encoded size of a segment. Tensors to which a codec does not apply are sent unchanged.

Each segment is encoded by itself, so that one without a gradient is left out and segments may come in any order. What a
codec declares decides how fast it is:

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
"""The dtype that lossy codecs encode; gradients and parameters of other dtypes are sent unchanged."""


class Codec(ABC):
    """Encode and decode float32 tensors. An instance has no state: the caller keeps the residual of lossy encoding.

    `import farstep` imports every codec, and must not import torch: a codec that needs more than the methods of its
    tensors imports torch inside its own methods.

    Attributes:
        name: its name in headers.
        option: its name as `wire=`, and in FARSTEP_WIRE.
        element: the wire's name of the dtype of an encoded element, if each element is encoded to one; None for a codec
            that encodes to bytes (uint8).
        block: the number of elements that are encoded together: a tensor encoded in pieces of whole blocks gives the
            same bytes as encoded at once. None if it cannot be cut.
        residual: whether the worker adds the encoding error of a gradient to its next one (error feedback).
        limit: the largest finite number that it can encode; None if it can encode every finite float32.
    """

    name: str
    option: str
    element: str | None = None
    block: int | None = None
    residual: bool = False
    limit: float | None = None

    def applies_to(self, dtype: str) -> bool:
        """Return whether the codec encodes tensors of a dtype, named as on the wire."""
        return dtype == APPLIES_TO

    @abstractmethod
    def encoded_bytes(self, elements: int) -> int:
        """Return the exact encoded size of this many elements; 0 for none."""

    @abstractmethod
    def encode_(self, source: Tensor, into: Tensor) -> None:
        """Write a tensor's encoded form into the given memory. The same numbers always give the same bytes.

        Args:
            source: float32; flat and on the CPU unless the codec has an `element`.
            into: of the element's dtype and the source's shape; without an element, flat uint8 of
                `encoded_bytes`, which may begin at any address.
        """

    @abstractmethod
    def decode_(self, source: Tensor, into: Tensor) -> None:
        """Write decoded elements into flat float32 memory.

        The bytes come from another machine: any bytes of the right length decode to some numbers, without an error.

        Args:
            source: as `encode_` writes it.
            into: float32, of the encoded elements' count.
        """

    def lost_finite(self, encoded: Tensor, source: Tensor) -> bool:
        """Return whether encoding made a finite number of the source infinite; only called with a `limit`."""
        return False

    def __repr__(self) -> str:
        return f"<codec {self.name}>"
