"""Gradients cast to 16 bits on their way out, in one pass: the cast is the copy into the memory they are sent from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from farstep.errors import NonFinite
from farstep.wire.memory import TORCH_DTYPES


@final
class Narrowing:
    """Cast float32 gradients.

    Args:
        half: the wire's name of a 16-bit dtype.
        parameters: whose gradients they are.
    """

    def __init__(self, half: str, parameters: Sequence[Tensor]) -> None:
        self._dtype = TORCH_DTYPES[half]
        self.dtypes = [self._dtype if is_wide(p) else p.dtype for p in parameters]

    def values(self, index: int, values: Tensor) -> Tensor:
        """Return the gradient of a parameter, or the values of a sparse one, as it travels.

        Raises:
            NonFinite: see `check`.
        """
        if self.dtypes[index] == values.dtype:
            return values
        narrow = values.detach().to(self._dtype)
        self.check(index, narrow, values)
        return narrow

    def check(self, index: int, narrow: Tensor, wide: Tensor) -> None:
        """Refuse what float16 made infinite; bfloat16 reaches as far as float32. `narrow` is still in the cache.

        Raises:
            NonFinite: a finite number became infinite, which no policy of a session can know.
        """
        if self._dtype is not torch.float16 or bool(torch.isfinite(narrow.sum(dtype=torch.float32))):
            return
        if bool((torch.isinf(narrow).to(wide.device) & torch.isfinite(wide)).any()):
            raise NonFinite(
                f"The gradient of parameter {index} holds a finite number beyond {torch.finfo(torch.float16).max:g}, "
                "which float16 on the wire makes infinite; the step was not taken.",
                remedy="Use wire='bf16', which reaches as far as float32, or scale the loss down.",
                field="wire",
                side="client",
            )


def is_wide(tensor: Tensor) -> bool:
    """Say whether a tensor is of the dtype that is narrowed."""
    return tensor.dtype is torch.float32
