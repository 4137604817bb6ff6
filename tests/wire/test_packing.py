"""Writing headers that share a list of names."""

from __future__ import annotations

import msgpack
import pytest

from farstep.errors import InvalidRequest, LimitExceeded
from farstep.protocol import Limits, Names
from farstep.protocol.packing import pack_header

MANY = [f"worker-{number}" for number in range(1000)]


def nested(value: object, levels: int) -> dict:
    """Return a header with a value below so many maps."""
    for _ in range(levels):
        value = {"in": value}
    return {"head": value, "after": 1.5}


@pytest.mark.parametrize("names", [[], ["w0"], MANY], ids=["none", "one", "many"])
@pytest.mark.parametrize("levels", [0, 1, 6])
def test_names_are_a_list_to_the_reader(names: list[str], levels: int):
    """The bytes are those of the header with a list in their place, wherever that is, also of several."""
    header = {"first": 1, **nested(Names(names), levels), "again": Names(names), "last": "x"}
    plain = {"first": 1, **nested(names, levels), "again": names, "last": "x"}
    assert pack_header(header) == pack_header(plain) == msgpack.packb(plain)


def test_a_string_that_looks_like_an_empty_list_is_no_gap():
    """Where names go is known by place, and not by what the bytes around them look like."""
    header = {"\x90": b"\x90\x90", "names": Names(MANY), "list": [], "tail": b"\x90"}
    assert pack_header(header) == msgpack.packb({**header, "names": MANY})


def test_names_are_packed_once():
    """Every header gets the same bytes, which are made for the first one."""
    names = Names(MANY)
    first = pack_header({"names": names})
    packed = names.packed
    assert first.endswith(packed)
    assert pack_header({"more": 1, "names": names}).endswith(packed)
    assert names.packed is packed


@pytest.mark.parametrize(
    ("names", "words"),
    [(Names(["x" * 4097]), "a string of 4097 bytes"), (Names([""] * 262_145), "262145 elements")],
    ids=["long", "many"],
)
def test_names_are_held_to_the_readers_limits(names: Names, words: str):
    """What a reader would refuse of a list, the writer refuses of names."""
    with pytest.raises(LimitExceeded, match=words):
        pack_header({"names": names})


def test_names_count_in_the_headers_size_and_depth():
    """A header is as long with them as it is on the wire, and one level deeper than the map they are in."""
    size = len(pack_header({"names": MANY}))
    assert len(pack_header({"names": Names(MANY)}, limits=Limits(header_bytes=size))) == size
    with pytest.raises(LimitExceeded, match=f"larger than {size - 1} bytes"):
        pack_header({"names": Names(MANY)}, limits=Limits(header_bytes=size - 1))
    with pytest.raises(LimitExceeded, match="deeper than 8"):
        pack_header(nested(Names(["w0"]), 7))


@pytest.mark.parametrize("value", [("w0",), Names([("w0",)])], ids=["tuple", "tuple within"])  # type: ignore[list-item]
def test_other_tuples_are_foreign_to_a_header(value: object):
    """Only names stand for a list, and they hold strings."""
    with pytest.raises(InvalidRequest, match="holds a value that is not"):
        pack_header({"value": value})


def test_names_may_be_within_a_list():
    """As a list may."""
    assert pack_header({"all": [Names(MANY), 1, Names(["w0"])]}) == msgpack.packb({"all": [MANY, 1, ["w0"]]})
