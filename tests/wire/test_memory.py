"""Element types, and tensors as memory."""

import gc
import weakref

import pytest
import torch

from farstep.errors import TensorMismatch
from farstep.protocol import DTYPES, SEGMENT_DTYPES, segment_dtype
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory, wire_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_the_table_agrees_with_torch(name):
    """Name, size, real type and number of parts of each dtype are torch's own."""
    each, dtype = DTYPES[name], TORCH_DTYPES[name]
    assert str(dtype) == f"torch.{each.name}"
    assert dtype.itemsize == each.itemsize == each.parts * DTYPES[each.real].itemsize
    assert dtype.is_complex == (each.parts == 2)
    assert dtype.to_real() == TORCH_DTYPES[each.real] if dtype.is_complex else each.real == name
    assert wire_dtype(dtype) is each


def test_other_dtypes_have_no_name():
    """A dtype that the wire does not have is not given another one's name."""
    assert wire_dtype(torch.int32) is None
    assert set(DTYPES) == set(TORCH_DTYPES)


@pytest.mark.parametrize("name", ["int64", "float8_e4m3fn", "", "Float32", 4, None, ["float32"], {}])
def test_segments_have_floating_dtypes(name):
    """A segment's dtype is one of six; any other is refused with the list of those."""
    with pytest.raises(TensorMismatch, match="Use one of float32, float64, bfloat16, float16, complex64, complex128"):
        segment_dtype(name)
    assert [segment_dtype(each).name for each in SEGMENT_DTYPES] == list(SEGMENT_DTYPES)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1,) * 16, (0,), (2, 0, 3)], ids=str)
def test_memory_is_the_tensors_own(dtype, shape):
    """The view has the tensor's size, shows its bytes, and writing to it changes the tensor."""
    tensor = torch.zeros(shape, dtype=dtype)
    memory = tensor_memory(tensor)
    assert (len(memory), memory.format, memory.ndim, memory.readonly) == (tensor.nbytes, "B", 1, False)
    memory[:] = bytes(memoryview(bytes([0, 0x40] * 999))[: len(memory)])
    if tensor.numel():
        assert tensor.flatten()[-1] != 0
    assert bytes(tensor_memory(tensor.clone())) == bytes(memory)


def test_memory_starts_where_the_tensor_does():
    """A contiguous slice shows its own bytes only."""
    tensor = torch.arange(10, dtype=torch.int64)
    assert bytes(tensor_memory(tensor[3:5])) == bytes([3, *[0] * 7, 4, *[0] * 7])


def test_memory_keeps_the_tensor_alive():
    """The tensor lives as long as any part of its memory is in use, and no longer."""
    tensor = torch.ones(4)
    watch = weakref.ref(tensor)
    part = tensor_memory(tensor)[4:8]
    del tensor
    gc.collect()
    assert watch() is not None
    assert bytes(part) == b"\x00\x00\x80\x3f"
    del part
    gc.collect()
    assert watch() is None


def test_parameters_have_memory():
    """A parameter that wants a gradient has memory like any other tensor."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    tensor_memory(parameter)[3] = 0x40
    assert parameter.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(4, 4).t(), "strides"),
        (torch.zeros(8)[::2], "strides"),
        (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), "strides"),
        (torch.ones(3).expand(2, 3), "strides"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "resolved"),
        (torch.zeros(3, dtype=torch.complex64).conj().imag, "strides"),
        (torch._neg_view(torch.ones(3)), "resolved"),
        (torch.zeros(3, device="meta"), "on meta"),
        (torch.zeros(3).to_sparse(), "sparse"),
    ],
    ids=["transposed", "strided", "channels_last", "expanded", "conj", "imag", "negated", "meta", "sparse"],
)
def test_memory_that_does_not_show_the_values_is_refused(tensor, words):
    """Strided, lazily changed, sparse and remote tensors are refused: their bytes would be other numbers."""
    with pytest.raises(ValueError, match=words):
        tensor_memory(tensor)
