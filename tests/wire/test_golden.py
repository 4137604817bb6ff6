"""Bytes that earlier releases wrote. They are never changed: every later release writes and reads them."""

import json
from pathlib import Path

import pytest
import torch

from farstep.protocol import Decoder, encode
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from tests.support.wire.driving import drive

GOLDEN = {
    f"{path.stem}: {message['name']}": message
    for path in sorted((Path(__file__).parent / "golden").glob("*.json"))
    for message in json.loads(path.read_text())
}


def tensors_of(message) -> list[torch.Tensor]:
    """Return the message's tensors; numbers are strings, so that JSON can say nan and inf."""
    made = []
    for each in message["tensors"]:
        kind = {"int64": int}.get(each["dtype"], complex if each["dtype"].startswith("complex") else float)
        numbers = [kind(number) for number in each["values"]]
        made.append(torch.tensor(numbers, dtype=TORCH_DTYPES[each["dtype"]]).reshape(each["shape"]))
    return made


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return [bytes(tensor_memory(each)) for each in a] == [bytes(tensor_memory(each)) for each in b]


@pytest.mark.promise("The documented bytes are what both sides write and read.", area="wire")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_are_written(name):
    """The message is written with the golden bytes."""
    message = GOLDEN[name]
    body = b"".join(encode(message["header"], list(map(tensor_memory, tensors_of(message)))))
    assert body.hex() == "".join(message["body"])


@pytest.mark.promise("The documented bytes are what both sides write and read.", area="wire")
@pytest.mark.parametrize("way", ["feed", "buffer"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_are_read(name, way):
    """The golden bytes are read as the message."""
    message = GOLDEN[name]
    expected = tensors_of(message)
    came = [torch.zeros_like(each) for each in expected]
    decoder = Decoder(lambda header: list(map(tensor_memory, came)))
    drive(decoder, bytes.fromhex("".join(message["body"])), pieces=[13], ways=[way])
    decoder.close()
    assert decoder.header == message["header"]
    assert same_bits(came, expected)
