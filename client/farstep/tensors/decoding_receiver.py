"""Parameters that arrive encoded as bytes: decoded when all of an answer is there, into what is known of the session.

What a codec makes of a parameter is what this worker has of it: an unedited parameter is the decoded one, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from farstep.codecs import Codec
from farstep.tensors.encoder import applies
from farstep.tensors.parameter_receiver import ParameterReceiver, copy_all
from farstep.wire.memory import tensor_memory


@final
class DecodingReceiver(ParameterReceiver):
    """Staging memory for parameters of which a codec without an element encodes some; see `ParameterReceiver`.

    Args:
        parameters: the tensors that arrive, in the session's order.
        codec: how they are encoded.
    """

    def __init__(self, parameters: Sequence[Tensor], codec: Codec) -> None:
        self._codec = codec
        self._encoded = {
            index: torch.empty(codec.encoded_bytes(p.numel()), dtype=torch.uint8, device="cpu")
            for index, p in enumerate(parameters)
            if applies(codec, p)
        }
        self._coming: list[int] = []
        super().__init__(parameters)

    def grown(self, parameters: Sequence[Tensor]) -> DecodingReceiver:
        count = len(self._parameters)
        grown = DecodingReceiver([*self._parameters, *parameters], self._codec)
        copy_all(grown._staged[:count], self._staged, lazy=False)
        grown._differing = set(self._differing)
        grown.keep_(range(count, count + len(parameters)))
        return grown

    def targets(self, indices: Sequence[int] | None, *, whole: bool = False) -> list[memoryview]:
        views = super().targets(indices)
        chosen = range(len(self._parameters)) if indices is None else indices
        self._coming = [] if whole else [index for index in chosen if index in self._encoded]
        return views if whole else [tensor_memory(self._encoded.get(i, self._staged[i])) for i in chosen]

    def landing(self) -> list[memoryview]:
        return self.targets(None)  # nothing is decoded before all of it is there

    def settle_(self, indices: Sequence[int] | None) -> None:
        for index in self._coming:
            self._codec.decode_(self._encoded[index], self._staged[index].view(-1))
        self._coming = []
        super().settle_(indices)
