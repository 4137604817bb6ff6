"""The container of session files: what the safetensors library writes and reads, and nothing that it would refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from farstep.errors import InvalidFile
from farstep.protocol import tensor_file
from farstep.protocol.memory import TORCH_DTYPES
from farstep.protocol.tensor_file import (
    CODES,
    LENGTH_BYTES,
    METADATA,
    Entry,
    FileHead,
    head_length,
    in_file_order,
    read_head,
    write_head,
)

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != METADATA)
ENTRIES = st.lists(
    st.builds(
        Entry,
        name=NAMES,
        dtype=st.sampled_from(list(CODES)),
        shape=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda entry: entry.name,
)


def split(file: bytes) -> tuple[FileHead, bytes]:
    """Read a whole file."""
    length = head_length(file[:LENGTH_BYTES], len(file))
    data = file[LENGTH_BYTES + length :]
    return read_head(file[LENGTH_BYTES : LENGTH_BYTES + length], len(data)), data


@given(ENTRIES, st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), max_size=20), max_size=3))
def test_the_library_reads_what_is_written(entries: list[Entry], metadata: dict[str, str]) -> None:
    """Names of any text, shapes with zeros and without dimensions, and every dtype arrive, each tensor aligned."""
    ordered = in_file_order(entries)
    data = bytes(index % 256 for index in range(sum(entry.nbytes for entry in ordered)))
    head = write_head(ordered, metadata)
    assert len(head) % 8 == 0
    found = dict(safetensors.deserialize(head + data))  # type: ignore[no-untyped-call]  # its stub says nothing
    at = 0
    for entry in ordered:
        own = found.pop(entry.name)
        assert (own["dtype"], tuple(own["shape"])) == (CODES[entry.dtype], entry.shape)
        assert bytes(own["data"]) == data[at : at + entry.nbytes]
        assert at % TORCH_DTYPES[entry.dtype].itemsize == 0
        at += entry.nbytes
    assert not found
    again, rest = split(head + data)
    assert (sorted(again.entries, key=str), again.metadata, rest) == (sorted(entries, key=str), metadata, data)


@given(ENTRIES)
def test_what_the_library_writes_is_read(entries: list[Entry]) -> None:
    """A file that went through the library's own writer, in its order, says the same."""
    tensors = {entry.name: torch.ones(entry.shape, dtype=TORCH_DTYPES[entry.dtype]) for entry in entries}
    head, data = split(safetensors.torch.save(tensors, {"a": "b"}))
    assert sorted(head.entries, key=str) == sorted(entries, key=str)
    assert head.metadata == {"a": "b"}
    assert len(data) == sum(entry.nbytes for entry in entries)


def test_bytes_of_a_file() -> None:
    """The format, byte by byte."""
    ordered = in_file_order([Entry("h", "float16", (1,)), Entry("w", "float32", (2, 1))])
    text = (
        b'{"__metadata__":{"k":"v"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"h":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}} '
    )
    assert len(text) % 8 == 0
    assert write_head(ordered, {"k": "v"}) == len(text).to_bytes(8, "little") + text


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


BAD: dict[str, Any] = {
    "no object": [1],
    "a tensor that is no object": {"w": 3},
    "a key too many": {"w": entry(more=1)},
    "a dtype that nobody knows": {"w": entry(dtype="F31")},
    "a dtype that is no text": {"w": entry(dtype=["F32"])},
    "integers": {"w": entry(dtype="I32")},
    "a shape that is none": {"w": entry(shape=2)},
    "a negative dimension": {"w": entry(shape=[-1, -2])},
    "a fraction": {"w": entry(shape=[2.0])},
    "a truth": {"w": entry(shape=[True, 2])},
    "an endless dimension": {"w": entry(shape=[2**61], data_offsets=[0, 2**63])},
    "too many dimensions": {"w": entry(shape=[1] * 65 + [2])},
    "another size than the shape's": {"w": entry(shape=[3])},
    "one offset": {"w": entry(data_offsets=[0])},
    "offsets backwards": {"w": entry(data_offsets=[8, 0])},
    "beyond the end": {"w": entry(data_offsets=[8, 16])},
    "a gap": {"v": entry(shape=[1], data_offsets=[0, 4]), "w": entry(shape=[0], data_offsets=[8, 8])},
    "an overlap": {"v": entry(), "w": entry(data_offsets=[4, 12])},
    "the same bytes twice": {"v": entry(), "w": entry()},
    "bytes that are no tensor's": {},
    "metadata that are no object": {"w": entry(), METADATA: "x"},
    "metadata that are no text": {"w": entry(), METADATA: {"x": 1}},
}


@pytest.mark.parametrize("document", BAD.values(), ids=BAD)
def test_a_head_that_lies_is_refused(document: Any) -> None:
    """Whatever does not fit the format or the eight bytes of data that follow is refused before it is used."""
    with pytest.raises(InvalidFile):
        read_head(json.dumps(document).encode(), 8)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b" {}",
        b"\xff{}",
        b"{}{}",
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b"[" * 3_000_003,
    ],
    ids=["nothing", "half", "blank", "no text", "two", "twice the name", "nan", "digits", "depth", "containers"],
)
def test_text_that_is_no_head_is_refused(text: bytes) -> None:
    """Neither half a text, nor one made to cost time, stack or memory, is read."""
    with pytest.raises(InvalidFile):
        read_head(text, 8)


@pytest.mark.parametrize(
    ("first", "file_bytes"),
    [
        (b"", 0),
        (b"\x02", 1),
        ((8).to_bytes(8, "little"), 15),
        (b"\xff" * 8, 2**62),
        ((10**8 + 1).to_bytes(8, "little"), 10**9),
    ],
    ids=["empty", "a byte", "shorter than its head", "no length", "huge"],
)
def test_a_length_that_cannot_be_is_refused(first: bytes, file_bytes: int) -> None:
    """A head longer than its file, or than a hundred million bytes, is refused before memory is taken for it."""
    with pytest.raises(InvalidFile):
        head_length(first, file_bytes)
    assert tensor_file.MAX_HEAD_BYTES == 10**8


WHOLE = write_head([Entry("w", "float32", (2,))], {"a": "b"}) + bytes(8)


@pytest.mark.promise(
    "A damaged, foreign or newer file is refused, and the culprit is named.",
    area="sessions and files",
)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=0, max_size=3), st.integers(0, 3))
def test_damage_is_refused_or_harmless(place: int, other: bytes, skipped: int) -> None:
    """A file changed anywhere is refused, or says something of its own that fits its length; nothing else happens."""
    damaged = WHOLE[:place] + other + WHOLE[place + skipped :]
    try:
        head, data = split(damaged)
    except InvalidFile:
        return
    assert sum(each.nbytes for each in head.entries) == len(data)
