"""Tensors as memory: the only module of the protocol's core that needs torch.

The wire is little-endian, as is the memory of nearly every machine that torch supports; big-endian ones are refused
here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from farstep.protocol.dtypes import BYTES, DTYPES, Dtype

if sys.byteorder != "little":
    raise ImportError("farstep's wire is little-endian; this machine is not.")

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "int64": torch.int64,
}
"""torch's dtype under each name of the wire."""

MEMORY_DTYPES: Mapping[str, torch.dtype] = {**TORCH_DTYPES, BYTES.name: torch.uint8}
"""The same, with the dtype of encoded bytes."""

_BY_TORCH = {dtype: DTYPES[name] for name, dtype in TORCH_DTYPES.items()}


def wire_dtype(dtype: torch.dtype) -> Dtype | None:
    """Return the wire's element type for a dtype of torch, None if the wire has none."""
    return _BY_TORCH.get(dtype)


def tensor_memory(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes as a writable view that keeps the tensor alive.

    Nothing is copied. Writing through the view changes the tensor without autograd noticing, as `tensor.data` does.

    Args:
        tensor: a contiguous CPU tensor of any shape and dtype; no elements give an empty view.

    Raises:
        ValueError: another device or layout, not contiguous, or a lazily conjugated or negated view, whose memory does
            not hold the values it shows.
    """
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ValueError(
            f"A {tensor.layout} tensor on {tensor.device} has no memory to send; it must be dense and on cpu."
        )
    if not tensor.is_contiguous():
        raise ValueError(f"A tensor with strides {tensor.stride()} is not contiguous; send `tensor.contiguous()`.")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            "A lazily conjugated or negated tensor must be resolved first (`resolve_conj`, `resolve_neg`)."
        )
    if not tensor.numel():
        return memoryview(bytearray())
    array = _array_type(tensor.nbytes).from_address(tensor.data_ptr())
    array._owner = tensor  # type: ignore[attr-defined]  # the view keeps the array alive, and the array the tensor
    return memoryview(array).cast("B")


@lru_cache(maxsize=4096)
def _array_type(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * size  # making the type takes longer than everything else here
