"""The parameters as the session has them: where answers arrive, and what edits are found by.

Answers arrive here and are copied into the parameters when they are complete, so that an answer that is cut off leaves
the model as it was. What has arrived stays. Between steps it is what the session has of each parameter as far as this
worker knows, so a parameter that differs from it was edited here since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from farstep.edits import Edits
from farstep.wire.memory import tensor_memory


class Arrivals:
    """Staging memory for the parameters of one optimizer, one flat tensor per dtype; `keep_` fills it first.

    Args:
        parameters: the tensors that arrive, in the session's order.
        dtypes: what each arrives as, if not as it is.
        flat: memory to use, by dtype as large as these take; without it, memory of its own.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
        flat: Mapping[torch.dtype, Tensor] | None = None,
    ) -> None:
        sizes: dict[torch.dtype, int] = {}
        places: list[tuple[torch.dtype, int]] = []
        for p, dtype in zip(parameters, dtypes or [p.dtype for p in parameters], strict=True):
            offset = sizes.get(dtype, 0)
            places.append((dtype, offset))
            sizes[dtype] = offset + p.numel()
        if flat is None:
            flat = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
        self._staged = [
            flat[dtype][offset : offset + p.numel()].view(p.shape)
            for (dtype, offset), p in zip(places, parameters, strict=True)
        ]
        self._all = _merged(
            (flat[dtype], offset, p.numel()) for (dtype, offset), p in zip(places, parameters, strict=True)
        )
        self._differing: set[int] = set()
        self.rebind_(parameters)

    def rebind_(self, parameters: Sequence[Tensor]) -> None:
        """Take other tensors of the same shapes and dtypes in the parameters' place; what has arrived stays."""
        self._parameters = list(parameters)
        # Views shown as the conjugate or the negative of their memory, which foreach operations do not take.
        self._lazy = any(p.is_conj() or p.is_neg() for p in parameters)
        self._edits = Edits(self._parameters, self._staged)

    def within(self, flat: Mapping[torch.dtype, Tensor] | None) -> Arrivals:
        """Return the same in other memory: `flat`, or memory of its own."""
        moved = Arrivals(self._parameters, flat=flat)
        copy_all(moved._staged, self._staged, lazy=False)
        moved._differing = set(self._differing)
        return moved

    def grown(self, parameters: Sequence[Tensor]) -> Arrivals:
        """Return memory for more parameters behind these, taken for what the session has; edits of these stay known."""
        count = len(self._parameters)
        grown = Arrivals([*self._parameters, *parameters])
        copy_all(grown._staged[:count], self._staged, lazy=False)
        grown._differing = set(self._differing)
        grown.keep_(range(count, count + len(parameters)))
        return grown

    def edited(self, addresses: list[int]) -> list[int]:
        """Return which parameters differ from what the session has of them; see `Edits.found`."""
        found = self._edits.found(addresses)
        return sorted({*found, *self._differing}) if self._differing else found

    def keep_(self, indices: Sequence[int] | None = None, *, but: Sequence[int] = ()) -> None:
        """Take some parameters (None: all of them) for what the session has, as after they were sent.

        Args:
            indices: which ones.
            but: those among them that are known to differ, though it is forgotten from what.
        """
        chosen = range(len(self._parameters)) if indices is None else indices
        copy_all([self._staged[i] for i in chosen], [self._parameters[i].detach() for i in chosen], self._lazy)
        self._differing = (self._differing - set(chosen)) | set(but)

    def targets(self, indices: Sequence[int] | None, *, whole: bool = False) -> list[memoryview]:
        """Return where the payload of these parameters goes.

        Args:
            indices: which ones; None for all of them.
            whole: they come as they are, whatever was asked for; see `NarrowArrivals`.
        """
        if indices is None:
            return self._all
        return [tensor_memory(self._staged[i]) for i in indices]

    def settle_(self, indices: Sequence[int] | None) -> None:
        """Copy what has arrived into the parameters: same storage, same strides, version counters bumped."""
        targets, sources = self._parameters, self._staged
        if indices is not None:
            targets, sources = [targets[i] for i in indices], [sources[i] for i in indices]
        with torch.no_grad():
            copy_all(targets, sources, self._lazy)
        self._differing = set() if indices is None else self._differing - set(indices)


def _merged(spans: Iterable[tuple[Tensor, int, int]]) -> list[memoryview]:
    """Return the memory of consecutive spans, neighbours of one tensor joined into one view."""
    merged: list[tuple[Tensor, int, int]] = []
    for flat, offset, length in spans:
        if merged and merged[-1][0] is flat and merged[-1][2] == offset:
            merged[-1] = (flat, merged[-1][1], offset + length)
        else:
            merged.append((flat, offset, offset + length))
    return [tensor_memory(flat[start:stop]) for flat, start, stop in merged]


def copy_all(targets: list[Tensor], sources: list[Tensor], lazy: bool) -> None:
    """Copy each source into its target, converted if their dtypes differ."""
    if targets and not lazy:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
