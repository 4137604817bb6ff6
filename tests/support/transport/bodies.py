"""Bodies of every shape, and reading them."""

import random

import httpx
import torch

from farstep.protocol.memory import tensor_memory
from farstep.transport import body_of
from farstep.transport.stream import MAX_BUFFERS


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def received(response: httpx.Response, *, at_once: int = 1 << 20) -> bytes:
    """Read a body through `readinto`."""
    body, whole, view = body_of(response), bytearray(), memoryview(bytearray(at_once))
    while count := body.readinto(view):
        whole += view[:count]
    return bytes(whole)


PIECE_LISTS = {
    "nothing": [],
    "only empty pieces": [b"", b""],
    "one byte": [b"a"],
    "zeros": [memoryview(bytes(1000)), memoryview(bytearray(70_000))],
    "empty pieces between": [b"", b"ab", memoryview(b""), b"c", bytearray()],
    "more pieces than one call takes": [bytes([i % 256]) * (i % 7) for i in range(3 * MAX_BUFFERS + 17)],
    "large and small in turn": [noise(each, each) for each in (10, 3_000_000, 1, 1_048_576, 0, 65_536, 2_000_001, 5)],
    "a whole tensor": [tensor_memory(torch.arange(1_000_000, dtype=torch.float32))],
    "tensors of several dtypes": [
        tensor_memory(torch.ones(shape, dtype=dtype))
        for shape, dtype in (((3, 5), torch.bfloat16), ((), torch.complex64), ((0, 4), torch.float64))
    ],
}
