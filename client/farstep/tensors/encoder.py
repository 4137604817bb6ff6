"""The encoder of gradients, which also keeps the residuals of lossy codecs.

A codec that rounds coarsely loses small values. With error feedback they are only delayed: the encoding error of a
gradient is added to the next one. This residual belongs to a write, and shares its outcome:

    begin      of a push: the residual is added to its gradients, and what is left out of those is noted
    commit     its gradients count: the note is the residual from now on
    rollback   it was refused: the residual is what it was
    doubt      it got no answer: the residual is what it was, so that the same gradients give the same bytes and the
               push can be repeated. If another one follows, the server says whether the first was applied; then its
               note is the residual (`settle`)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from farstep.errors import NonFinite
from farstep.protocol.codecs import FULL, Codec
from farstep.protocol.memory import TORCH_DTYPES


@final
class Encoder:
    """The encoder for the gradients of some parameters.

    Args:
        parameters: the parameters, in the session's order.
        codec: the codec of those that it applies to.

    Attributes:
        codec: as above.
        dtypes: the dtype in which each gradient is sent: its own, or that of encoded elements or bytes.
    """

    def __init__(self, parameters: Sequence[Tensor], codec: Codec = FULL) -> None:
        self.codec = codec
        self._applies = [applies(codec, p) for p in parameters]
        encoded = torch.uint8 if codec.element is None else TORCH_DTYPES[codec.element]
        self.dtypes = [encoded if own else p.dtype for own, p in zip(self._applies, parameters, strict=True)]
        self._sizes = [p.numel() for p in parameters]
        self._residuals: dict[int, Tensor] = {}
        self._noted: dict[int, Tensor] = {}
        self._doubtful: tuple[object, dict[int, Tensor]] | None = None

    def applies(self, index: int) -> bool:
        """Return whether a gradient is encoded."""
        return self._applies[index]

    @property
    def elementwise(self) -> bool:
        """Return whether encoding a gradient is just copying it to memory of another dtype."""
        return self.codec.element is not None and not self.codec.residual

    @property
    def streams(self) -> bool:
        """Return whether a push can begin before all its gradients are known.

        It cannot if numbers may be out of range, which is checked before anything is sent, or with residuals, which
        belong to one push at a time.
        """
        return self.codec.block is not None and self.codec.limit is None and not self.codec.residual

    def length(self, index: int, elements: int | None = None) -> int:
        """Return the length, in its dtype, of this many encoded elements of a gradient, None for all of them."""
        count = self._sizes[index] if elements is None else elements
        whole = self._applies[index] and self.codec.element is None
        return self.codec.encoded_bytes(count) if whole else count

    def nbytes(self, index: int) -> int:
        """Return the encoded size of a dense gradient in bytes."""
        return self.length(index) * self.dtypes[index].itemsize

    def cut(self, index: int, elements: int) -> int:
        """Return the elements of a piece of a gradient: at most `elements`, or all if its codec cannot be cut."""
        block = self.codec.block if self._applies[index] else 1
        return max(1, self._sizes[index]) if block is None else max(1, elements // block) * block

    # -- encoding ---------------------------------------------------------------------------------------------------

    def encode_(self, index: int, source: Tensor, into: Tensor, first: int = 0) -> None:
        """Encode a gradient, or a piece of it that begins at element `first`.

        Args:
            index: of the parameter.
            source: dense, of any strides, on any device.
            into: memory on the CPU, of its dtype in `dtypes`; of the source's shape, or flat if not `elementwise`.
            first: the first element of a piece; see `cut`.

        Raises:
            NonFinite: see `check`.
        """
        if not self._applies[index] or self.elementwise:
            into.copy_(source)
        else:
            self._encode_(index, _flat(source), into, first)
        self.check(index, into, source)

    def _encode_(self, index: int, source: Tensor, into: Tensor, first: int) -> None:
        codec, last = self.codec, first + source.numel()
        if not codec.residual:
            codec.encode_(source, into)
            return
        if (before := self._residuals.get(index)) is not None:
            source = source + before[first:last]
        codec.encode_(source, into)
        if index not in self._noted:
            self._noted[index] = torch.zeros(self._sizes[index], dtype=torch.float32, device="cpu")
        left = self._noted[index][first:last]
        codec.decode_(into, left)
        torch.sub(source, left, out=left)

    def encoded(self, index: int, values: Tensor, *, sparse: bool = False) -> Tensor:
        """Return an encoded gradient, or the encoded values of a sparse one.

        A sparse gradient leaves no residual: its rows differ each time.

        Raises:
            NonFinite: see `check`.
        """
        if not self._applies[index]:
            return values
        values = values.detach()
        if self.elementwise:
            encoded = values.to(self.dtypes[index])
            self.check(index, encoded, values)
            return encoded
        flat = _flat(values)
        length = self.length(index, flat.numel())
        into = torch.empty(length, dtype=self.dtypes[index], device="cpu")
        if sparse:
            self.codec.encode_(flat, into)
            self.check(index, into, flat)
        else:
            self.encode_(index, flat, into)
        return into

    def check(self, index: int, encoded: Tensor, source: Tensor) -> None:
        """Refuse a gradient that encoding made infinite. `encoded` is still in the cache.

        Raises:
            NonFinite: a finite number became infinite, which the session's policy cannot detect.
        """
        if self.codec.limit is None or not self._applies[index] or not self.codec.lost_finite(encoded, source):
            return
        raise NonFinite(
            f"The gradient of parameter {index} holds a finite number beyond {self.codec.limit:g}, "
            f"which {self.codec.name} on the wire makes infinite; the step was not taken.",
            remedy="Use wire='bf16', which reaches as far as float32, or scale the loss down.",
            field="wire",
            side="client",
        )

    # -- what encoding leaves out -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin to encode the gradients of another push."""
        self._noted = {}

    def commit(self, *, counts: bool) -> None:
        """Record that the push was answered, and whether its gradients count."""
        if counts:
            self._residuals |= self._noted
        self._noted, self._doubtful = {}, None

    def rollback(self) -> None:
        """Record that the push was refused, and drop its residual."""
        self._noted = {}

    def doubt(self, push: object) -> None:
        """Record that a push got no answer; `push` identifies it until it is settled."""
        self._doubtful, self._noted = (push, self._noted), {}

    def settle(self, push: object) -> bool:
        """Record that a push in doubt was applied; return whether this changes how gradients are encoded."""
        if self._doubtful is None or self._doubtful[0] is not push or not self._doubtful[1]:
            return False
        self._residuals |= self._doubtful[1]
        self._noted, self._doubtful = {}, None
        return True

    def forget(self) -> None:
        """Drop all residuals: the next push does not continue the earlier ones."""
        self._residuals, self._noted, self._doubtful = {}, {}, None

    def grown(self, parameters: Sequence[Tensor]) -> Encoder:
        """Return an encoder with the same residuals for more parameters, which begin with these."""
        grown = Encoder(parameters, self.codec)
        grown._residuals, grown._doubtful = self._residuals, self._doubtful
        return grown


def applies(codec: Codec, tensor: Tensor) -> bool:
    """Return whether a codec applies to tensors of this dtype."""
    return codec.applies_to(str(tensor.dtype).removeprefix("torch."))


def _flat(source: Tensor) -> Tensor:
    """Return the elements in row-major order on the CPU; the same memory if it has that order."""
    return source.detach().to("cpu").reshape(-1)
