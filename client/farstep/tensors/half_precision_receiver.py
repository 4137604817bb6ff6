"""Parameters that arrive in 16 bits (codecs with an element): widened in the copy into the model, and compared exactly.

arrived in 16 bits      this worker's value is the widened one, though the session has more bits: an unedited parameter
                        equals it
sent by this worker     the session has the float32 values, which are kept until the parameter arrives again
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from farstep.protocol.codecs import Codec
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from farstep.tensors.edits import Check, Comparer, Edits, is_plain, memcmp, same_bits
from farstep.tensors.encoder import applies
from farstep.tensors.parameter_receiver import ParameterReceiver, copy_all

BLOCK = 2**19
"""Elements that are widened at once to be compared: 25 M took 4.8 ms so, 7.2 with half as many, 9.3 with 2**16."""


@final
class HalfPrecisionReceiver(ParameterReceiver):
    """A receiver of float32 parameters in 16 bits; see `ParameterReceiver`.

    Args:
        parameters: the parameters, in the session's order.
        codec: their codec, which has an element.
    """

    def __init__(self, parameters: Sequence[Tensor], codec: Codec) -> None:
        assert codec.element is not None
        self._codec, narrow = codec, TORCH_DTYPES[codec.element]
        self._narrow = {index for index, p in enumerate(parameters) if applies(codec, p)}
        self._whole: dict[int, Tensor] = {}
        super().__init__(parameters, [narrow if i in self._narrow else p.dtype for i, p in enumerate(parameters)])

    def rebind_(self, parameters: Sequence[Tensor]) -> None:
        super().rebind_(parameters)
        self._lazy = True  # one by one: foreach operations do not convert faster

    def grown(self, parameters: Sequence[Tensor]) -> HalfPrecisionReceiver:
        count = len(self._parameters)
        grown = HalfPrecisionReceiver([*self._parameters, *parameters], self._codec)
        copy_all(grown._staged[:count], self._staged, lazy=False)
        grown._whole = dict(self._whole)
        grown._differing = set(self._differing)
        grown.keep_(range(count, count + len(parameters)))
        return grown

    def _comparers(self) -> list[tuple[Sequence[int], Comparer]]:
        every = range(len(self._parameters))
        widened = [index for index in every if index in self._narrow and index not in self._whole]
        as_is = sorted(set(every) - set(widened))
        here, there = self._parameters, [self._known(index) for index in every]
        comparers: list[tuple[Sequence[int], Comparer]] = []
        for members, kind in ((as_is, Edits), (widened, WideEdits)):
            if members:
                comparers.append((members, kind([here[i] for i in members], [there[i] for i in members])))
        return comparers

    def _known(self, index: int) -> Tensor:
        return self._whole.get(index, self._staged[index])

    def keep_(self, indices: Sequence[int] | None = None, *, but: Sequence[int] = ()) -> None:
        chosen = range(len(self._parameters)) if indices is None else indices
        for index in chosen:
            if index in self._narrow:
                self._whole[index] = torch.empty(self._parameters[index].shape, dtype=torch.float32, device="cpu")
            self._known(index).copy_(self._parameters[index].detach())
        self._compare_anew_()
        self._kept_(indices, but)

    def stand_in(self, index: int) -> Tensor | None:
        found = super().stand_in(index)
        return found.to(torch.float32) if found is not None and index in self._narrow else found

    def targets(self, indices: Sequence[int] | None, *, whole: bool = False) -> list[memoryview]:
        chosen = range(len(self._parameters)) if indices is None else indices
        for index in chosen:
            if whole and index in self._narrow:
                self._whole[index] = torch.empty(self._parameters[index].shape, dtype=torch.float32, device="cpu")
                self._compare_anew_()
            elif self._whole.pop(index, None) is not None:
                self._compare_anew_()
        views = super().targets(indices)
        return [tensor_memory(self._known(index)) for index in chosen] if whole else views

    def settle_(self, indices: Sequence[int] | None) -> None:
        if self._landing is not None and self._whole:
            self._whole = {}
            self._compare_anew_()
        super().settle_(indices)

    def _copy_(self, indices: Sequence[int] | None) -> None:
        chosen = range(len(self._parameters)) if indices is None else indices
        with self._writing():
            for index in chosen:
                self._parameters[index].copy_(self._known(index))


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbours that are widened together, and the addresses for their comparison."""

    narrow: Tensor
    wide: Tensor
    members: Sequence[int]
    compared: tuple[Sequence[ctypes.c_void_p], Sequence[ctypes.c_void_p], Sequence[ctypes.c_size_t]]


@final
class WideEdits:
    """Byte-by-byte comparison of float32 tensors with widened 16-bit copies; see `Edits`.

    Args:
        tensors: the tensors; one may be given other memory.
        copies: 16-bit ones, contiguous, on the CPU.
    """

    def __init__(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies = list(copies)
        self._scratch = torch.empty(min(BLOCK, sum(map(Tensor.numel, copies))), dtype=torch.float32, device="cpu")
        self._addresses: list[int] | None = None

    def found(self, addresses: list[int]) -> list[int]:
        """Return the indices of those that differ; `addresses` is where their memory begins now."""
        if addresses != self._addresses:
            self._look_again_(addresses)
        found = {index for index in self._odd if self._odd_differs(index)}
        for block in self._blocks:
            if _block_differs(block):
                differ = map(memcmp, *block.compared)
                found |= {index for index, how in zip(block.members, differ, strict=True) if how}
        return sorted(found)

    def checks(self, addresses: list[int]) -> list[Check]:
        """Return the same comparisons a part at a time; they hold as long as the tensors are not given other memory."""
        if addresses != self._addresses:
            self._look_again_(addresses)
        odd: list[Check] = [partial(self._odd_differs, index) for index in self._odd]
        return odd + [partial(_block_differs, block) for block in self._blocks]

    def _odd_differs(self, index: int) -> bool:
        return not same_bits(self._tensors[index].detach().cpu(), self._copies[index].to(torch.float32))

    def _look_again_(self, addresses: list[int]) -> None:
        """Cut the copies into blocks, after the memory of some tensors has changed."""
        self._addresses = addresses
        self._odd = [index for index, tensor in enumerate(self._tensors) if not is_plain(tensor)]
        odd = set(self._odd)
        self._blocks: list[_Block] = []
        pieces: list[tuple[int, int, int]] = []  # a tensor, its first element, how many
        length, after = 0, 0
        for index, copy in enumerate(self._copies):
            if index in odd:
                continue
            first, left = 0, copy.numel()
            while left:
                if pieces and (length == BLOCK or (not first and copy.data_ptr() != after)):
                    self._blocks.append(self._block(pieces))
                    pieces, length = [], 0
                count = min(left, BLOCK - length)
                pieces.append((index, first, count))
                first, left, length = first + count, left - count, length + count
            after = copy.data_ptr() + copy.nbytes
        if pieces:
            self._blocks.append(self._block(pieces))

    def _block(self, pieces: Sequence[tuple[int, int, int]]) -> _Block:
        (index, first, _), *_ = pieces
        length = sum(count for _, _, count in pieces)
        copy = self._copies[index]
        narrow = copy.as_strided((length,), (1,), copy.storage_offset() + first)
        wide = self._scratch[:length]
        size, at = wide.element_size(), wide.data_ptr()
        here, there, sizes = [], [], []
        assert self._addresses is not None
        for index, first, count in pieces:
            here.append(ctypes.c_void_p(self._addresses[index] + size * first))
            there.append(ctypes.c_void_p(at))
            sizes.append(ctypes.c_size_t(size * count))
            at += size * count
        return _Block(narrow, wide, [index for index, _, _ in pieces], (here, there, sizes))


def _block_differs(block: _Block) -> bool:
    block.wide.copy_(block.narrow)
    return any(map(memcmp, *block.compared))
