"""The parameters as the session has them: memory that receives answers, and that edits are compared with.

Between steps this memory holds the session's values of the parameters, as far as this worker knows them, so a parameter
that differs was edited here. An answer that is cut off leaves the model unchanged:

    all parameters, and large    they arrive in spare memory and are copied as they arrive (`landing`); then the two
                                 memories change places
    other answers                arrive in the same memory, and are copied when they are complete

`DecodingReceiver` is for a codec that encodes to bytes: an answer is decoded when it is complete. This worker's value
of a parameter is the decoded one: an unedited parameter equals it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, final

import torch
from torch import Tensor

from farstep.protocol.codecs import Codec
from farstep.protocol.memory import tensor_memory
from farstep.tensors.edits import Check, Comparer, Edits
from farstep.tensors.encoder import applies
from farstep.tensors.streaming_copy import StreamingCopy

LARGE_BYTES: Final = 4 << 20
"""From this size on an answer is copied as it arrives; copying a smaller one takes no time."""


class _Memory:
    """Memory for all parameters, one flat tensor per dtype.

    Attributes:
        staged: each parameter's part of it.
        views: the whole memory, in the parameters' order.
        comparers: compare parameters with it, each with their indices; None until needed.
    """

    def __init__(
        self, parameters: Sequence[Tensor], dtypes: Sequence[torch.dtype], flat: Mapping[torch.dtype, Tensor] | None
    ) -> None:
        sizes: dict[torch.dtype, int] = {}
        places: list[tuple[torch.dtype, int]] = []
        for p, dtype in zip(parameters, dtypes, strict=True):
            offset = sizes.get(dtype, 0)
            places.append((dtype, offset))
            sizes[dtype] = offset + p.numel()
        if flat is None:
            flat = {dtype: torch.empty(size, dtype=dtype, device="cpu") for dtype, size in sizes.items()}
        self.staged = [
            flat[dtype][offset : offset + p.numel()].view(p.shape)
            for (dtype, offset), p in zip(places, parameters, strict=True)
        ]
        self.views = _merged(
            (flat[dtype], offset, p.numel()) for (dtype, offset), p in zip(places, parameters, strict=True)
        )
        self.comparers: list[tuple[Sequence[int], Comparer]] | None = None


class ParameterReceiver:
    """The receiver of one optimizer's parameters; `keep_` fills its memory first.

    Args:
        parameters: the tensors that arrive, in the session's order.
        dtypes: the dtype in which each arrives; its own by default.
        flat: memory to use, by dtype; allocated by default.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
        flat: Mapping[torch.dtype, Tensor] | None = None,
    ) -> None:
        self._dtypes = [p.dtype for p in parameters] if dtypes is None else list(dtypes)
        self._memory = _Memory(parameters, self._dtypes, flat)
        self._spare: _Memory | None = None
        self._landing: StreamingCopy | None = None
        self._lands = flat is None and sum(map(len, self._memory.views)) >= LARGE_BYTES
        self._overwritten = False
        self._differing: set[int] = set()
        self.rebind_(parameters)

    @property
    def _staged(self) -> list[Tensor]:
        return self._memory.staged

    def rebind_(self, parameters: Sequence[Tensor]) -> None:
        """Replace the parameters by other tensors of the same shapes and dtypes; received values stay."""
        self._parameters = list(parameters)
        # Lazily conjugated or negated views, which foreach operations do not take.
        self._lazy = any(p.is_conj() or p.is_neg() for p in parameters)
        self._inference = any(p.is_inference() for p in parameters)
        self._compare_anew_()

    def within(self, flat: Mapping[torch.dtype, Tensor] | None) -> ParameterReceiver:
        """Return a copy of this receiver in other memory: `flat`, or newly allocated."""
        moved = ParameterReceiver(self._parameters, flat=flat)
        copy_all(moved._staged, self._staged, lazy=False)
        moved._differing = set(self._differing)
        moved._overwritten = self._overwritten
        return moved

    def grown(self, parameters: Sequence[Tensor]) -> ParameterReceiver:
        """Return a receiver with more parameters, whose values the session has; known edits are kept."""
        count = len(self._parameters)
        grown = ParameterReceiver([*self._parameters, *parameters])
        copy_all(grown._staged[:count], self._staged, lazy=False)
        grown._differing = set(self._differing)
        grown.keep_(range(count, count + len(parameters)))
        return grown

    # -- edits ------------------------------------------------------------------------------------------------------

    def edited(self, addresses: list[int]) -> list[int]:
        """Return which parameters differ from the session's; see `Edits.found`."""
        found = set(self._differing)
        for members, comparer in self._comparing():
            found |= {members[place] for place in comparer.found(_of(addresses, members))}
        return sorted(found)

    def checks(self, addresses: list[int]) -> list[Check]:
        """Return the same comparison a part at a time; see `Edits.checks`."""
        checks: list[Check] = [lambda: bool(self._differing)]
        for members, comparer in self._comparing():
            checks += comparer.checks(_of(addresses, members))
        return checks

    def _comparing(self) -> list[tuple[Sequence[int], Comparer]]:
        if self._memory.comparers is None:
            self._memory.comparers = self._comparers()
        return self._memory.comparers

    def _comparers(self) -> list[tuple[Sequence[int], Comparer]]:
        return [(range(len(self._parameters)), Edits(self._parameters, self._staged))]

    def _compare_anew_(self) -> None:
        for memory in (self._memory, self._spare):
            if memory is not None:
                memory.comparers = None

    def keep_(self, indices: Sequence[int] | None = None, *, but: Sequence[int] = ()) -> None:
        """Record the values of some parameters (None for all) as the session's, as after sending them.

        Args:
            indices: which ones.
            but: those among them that are known to differ, though it is forgotten from what.
        """
        chosen = range(len(self._parameters)) if indices is None else indices
        copy_all([self._staged[i] for i in chosen], [self._parameters[i].detach() for i in chosen], self._lazy)
        self._kept_(indices, but)

    def _kept_(self, indices: Sequence[int] | None, but: Sequence[int]) -> None:
        chosen = range(len(self._parameters)) if indices is None else indices
        self._differing = (self._differing - set(chosen)) | set(but)
        self._overwritten = self._overwritten and indices is not None

    def stand_in(self, index: int) -> Tensor | None:
        """Return a copy of the session's value of a parameter, in its form; None if unknown."""
        if self._overwritten or index in self._differing:
            return None
        return self._known(index).clone()

    # -- answers ----------------------------------------------------------------------------------------------------

    def targets(self, indices: Sequence[int] | None, *, whole: bool = False) -> list[memoryview]:
        """Return the memory for the payload of these parameters, which is copied when it is complete.

        Args:
            indices: which ones; None for all of them.
            whole: they arrive without a codec, even if one was requested; see `HalfPrecisionReceiver`.
        """
        if indices is None:
            self._overwritten = True
            return self._memory.views
        self._overwritten |= bool(indices)
        return [tensor_memory(self._staged[i]) for i in indices]

    def landing(self) -> list[memoryview]:
        """Return the memory for the payload of all parameters, which is copied as it arrives (`advance_`) if large.

        The parameters must have the session's values.
        """
        if not self._lands or self._overwritten:
            return self.targets(None)
        if self._spare is None:
            self._spare = _Memory(self._parameters, self._dtypes, None)
        self._landing = StreamingCopy(self._parameters, self._spare.staged)
        return self._spare.views

    def advance_(self, received_bytes: int) -> None:
        """Record the total of bytes of an answer that have arrived."""
        if self._landing is not None:
            with self._writing():
                self._landing.advance(received_bytes)

    def undo_(self) -> None:
        """Restore the parameters after an answer that was cut off, or did not come at all."""
        if self._landing is not None:
            with self._writing():
                self._landing.undo([self._known(index) for index in range(len(self._parameters))])
            self._landing = None

    def give_up_(self, *, lost: bool = False) -> None:
        """Give up an answer: restore the parameters, and then the record of them here.

        Args:
            lost: the server may have written to this memory; the parameters have the session's values.
        """
        self.undo_()
        if self._overwritten or lost:
            self.keep_()

    def settle_(self, indices: Sequence[int] | None) -> None:
        """Copy a complete answer into the parameters: same storage, same strides, version counters bumped."""
        if self._landing is None:
            self._copy_(indices)
        else:
            with self._writing():
                self._landing.finish()
            self._landing = None
            assert self._spare is not None
            self._memory, self._spare = self._spare, self._memory
        self._overwritten = False
        self._differing = set() if indices is None else self._differing - set(indices)

    def _copy_(self, indices: Sequence[int] | None) -> None:
        targets, sources = self._parameters, self._staged
        if indices is not None:
            targets, sources = [targets[i] for i in indices], [sources[i] for i in indices]
        with self._writing():
            copy_all(targets, sources, self._lazy)

    def _writing(self) -> AbstractContextManager[object]:
        """Return a context for writing to the parameters: `torch.inference_mode` for those created in it."""
        return torch.inference_mode() if self._inference else torch.no_grad()

    def _known(self, index: int) -> Tensor:
        """Return the session's value of a parameter."""
        return self._staged[index]


def _of(addresses: list[int], members: Sequence[int]) -> list[int]:
    return addresses if len(members) == len(addresses) else [addresses[index] for index in members]


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


@final
class DecodingReceiver(ParameterReceiver):
    """A receiver of parameters that a codec encodes to bytes; see `ParameterReceiver`.

    Args:
        parameters: the tensors that arrive, in the session's order.
        codec: their codec, which has no element.
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
        return self.targets(None)  # decode nothing before all of it has arrived

    def settle_(self, indices: Sequence[int] | None) -> None:
        for index in self._coming:
            self._codec.decode_(self._encoded[index], self._staged[index].view(-1))
        self._coming = []
        super().settle_(indices)
