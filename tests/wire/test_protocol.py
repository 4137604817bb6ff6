"""PROTOCOL.md is true: its examples are executed, its tables compared with the code."""

import json
import re
from dataclasses import asdict, replace
from typing import get_args

import pytest
import torch

from farstep import errors
from farstep import protocol as wire
from farstep.protocol.fields import NUMBERS, FieldKind, shape_of, shapes_from_header, shapes_to_header
from farstep.protocol.growth import AppendHead
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from farstep.protocol.messages import PushHead, PutHead
from farstep.protocol.policies import facts
from farstep.protocol.receipt import Reason, Receipt
from tests.support.wire.driving import read
from tests.support.wire.page import DOCUMENT, Block, blocks


def from_hex(text: str) -> bytes:
    """Return the bytes of a listing; `61*4097` repeats one."""
    listing = re.sub(r"#.*", "", text)
    return b"".join(
        bytes.fromhex(byte) * int(times or 1) for byte, times in re.findall(r"([0-9a-f]{2})(?:\*(\d+))?", listing)
    )


def examples() -> dict[str, dict[str, Block]]:
    grouped: dict[str, dict[str, Block]] = {}
    for block in blocks():
        if block.info[1] in ("header", "payload", "body", "readable"):
            grouped.setdefault(block.title, {})[block.info[1]] = block
    return grouped


def parts(example: dict[str, Block]) -> tuple[dict, bytes]:
    return json.loads(example["header"].text), from_hex(example["payload"].text) if "payload" in example else b""


EXAMPLES = examples()
REFUSED = [block for block in blocks() if block.info[1] == "refused"]


def written(receipt: Receipt) -> dict:
    """Return a receipt as its reader has it."""
    header, _ = read(b"".join(wire.encode({"receipt": receipt.to_header()}, [])), [], pieces=[1 << 20])
    return header["receipt"]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table whose heading line starts so."""
    table = DOCUMENT[DOCUMENT.index(f"\n| {heading} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_there_are_examples():
    """The document has the examples that these tests are about."""
    assert {"A push", "The reply to a push", "A sparse gradient", "Contents going up", "Another writer"} <= set(
        EXAMPLES
    )
    assert len(REFUSED) >= 14


@pytest.mark.promise("The documented bytes are what both sides write and read.", area="wire")
@pytest.mark.parametrize("title", [title for title, each in EXAMPLES.items() if "body" in each])
def test_examples_are_written(title):
    """What farstep writes is exactly the bytes of the example."""
    body = EXAMPLES[title]["body"]
    options = dict(option.split("=") for option in body.info[2:])
    limits = wire.Limits(**{name: int(value) for name, value in options.items()})
    header, payload = parts(EXAMPLES[title])
    assert b"".join(wire.encode(header, [memoryview(payload)], limits=limits)) == from_hex(body.text)


@pytest.mark.parametrize("way", ["feed", "buffer"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("title", EXAMPLES)
def test_examples_are_read(title, piece, way):
    """The example's bytes are read as its header and payload, in whatever pieces they come."""
    example = EXAMPLES[title]
    header, payload = parts(example)
    body = from_hex((example.get("body") or example["readable"]).text)
    assert read(body, [len(payload)], pieces=[piece], ways=[way]) == (header, [payload])


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: re.sub(r"[\s\S]*?# (.*)[\s\S]*", r"\1", block.text))
def test_refused_examples_are_refused(block):
    """A body that the document calls refused is refused with that code."""
    with pytest.raises(errors.FarstepError) as caught:
        read(from_hex(block.text), [4])
    assert caught.value.code == block.info[2]


def test_limits_are_those_of_the_code():
    """The table of limits has the decoder's own names and values."""
    assert {name.strip("`"): int(value) for name, value, _ in rows("limit")} == asdict(wire.Limits())


def test_dtypes_are_those_of_the_code():
    """The table of dtypes has every dtype, its size, and the bytes torch stores for the value shown."""
    table = {name.strip("`"): (int(size), from_hex(example.strip("`"))) for name, size, _, example in rows("dtype")}
    assert {name: size for name, (size, _) in table.items()} == {
        name: each.itemsize for name, each in wire.DTYPES.items()
    }
    for name, (_, data) in table.items():
        value = complex(1.5, -2) if name.startswith("complex") else -2 if name == "int64" else 1.5
        assert bytes(tensor_memory(torch.tensor([value], dtype=TORCH_DTYPES[name]))) == data


def test_kinds_are_those_of_the_code():
    """The table of kinds has every kind of state field, and the shape that the code computes for each segment shown."""
    heading, *_ = re.findall(r"^\| kind \|.*$", DOCUMENT, re.MULTILINE)
    segments = [tuple(json.loads(each)) for each in re.findall(r"`(\[.*?\])`", heading)]
    table = {name.strip("`"): cells for name, *cells in rows("kind")}
    assert tuple(table) == get_args(FieldKind)
    for kind in get_args(FieldKind):
        sent, *shapes, _ = table[kind]
        assert sent.startswith("number" if kind in NUMBERS else "tensor")
        shown = [None if each == "-" else tuple(json.loads(each.strip("`"))) for each in shapes]
        assert shown == [shape_of(kind, segment) for segment in segments]


def test_codes_are_those_of_the_code():
    """Its two tables of error codes name every code that there is, once, with its status, and no other."""
    listed = [(code.strip("`"), int(status)) for code, status, _ in rows("code")]
    listed += [(code, int(status)) for status, codes in rows("status") for code in re.findall(r"`(\w+)`", codes)]
    assert sorted(listed) == sorted((kind.code, kind.status) for kind in errors.BY_CODE.values())


def test_ranges_are_the_ones_shown():
    """The ranges shown stand for the segments named beside them."""
    assert "`[0, 3, 7, 8]` is segments 0, 1, 2 and 7" in DOCUMENT
    assert wire.from_ranges([0, 3, 7, 8], 8) == [0, 1, 2, 7]


@pytest.mark.parametrize(
    "title",
    [
        "A push",
        "A sparse gradient",
        "An evaluation",
        "A step that is skipped",
        "A push with options of its own",
        "A push in 16 bits",
        "A push in an order of its own",
    ],
)
def test_pushes_are_what_the_server_reads(title):
    """The header of a push in the document is one the server understands, key for key."""
    header, _ = parts(EXAMPLES[title])
    assert PushHead.from_header(header).to_header() == header


def test_contents_are_what_the_server_reads():
    """The header of contents in the document is one the server understands, key for key."""
    for title in ("Contents going up", "An average going up"):
        header, _ = parts(EXAMPLES[title])
        assert PutHead.from_header(header).to_header() == header


def test_param_groups_are_what_the_server_reads():
    """The header of a param group in the document is one the server understands, key for key."""
    header, _ = parts(EXAMPLES["A param group"])
    assert AppendHead.from_header(header).to_header() == header


def test_a_receipt_that_tells_why_nothing_was_applied_is_what_the_client_reads():
    """Such receipts in the document are ones the client understands, and the reasons listed are the code's."""
    for title in (
        "The reply to a push that was not applied",
        "The reply to a push that another worker's NaN undid",
        "The reply to a push whose step was clipped",
        "The reply to pushes with different options",
    ):
        header, _ = parts(EXAMPLES[title])
        assert written(Receipt.from_header(header["receipt"])) == header["receipt"]
    ((meaning,),) = [cells for key, _, *cells in rows("key of `receipt`") if key == "`reason`"]
    assert set(re.findall(r"`(\w+)`", meaning)) == set(get_args(Reason)) - {""}


def test_receipts_are_what_the_client_reads():
    """The receipt in the document is one the client understands, key for key."""
    header, _ = parts(EXAMPLES["The reply to a push"])
    assert written(Receipt.from_header(header["receipt"])) == header["receipt"]
    listed = [key for key, _, _ in rows("key of `receipt`")]
    assert [key.strip("`*") for key in listed if key.endswith("*")] == list(header["receipt"])
    everything = replace(
        Receipt.from_header(header["receipt"]),
        again=True,
        reason="nonfinite",
        detail="NaN.",
        weight=0.5,
        facts=tuple((name, 1.5) for name in facts()),
        disagreement="lr.",
    ).to_header()
    assert [key.strip("`*") for key in listed] == list(everything)


@pytest.mark.promise(
    "What a later server adds to an answer is passed over; another protocol version is refused.",
    area="wire",
)
def test_receipts_may_say_more_than_the_client_knows():
    """A key that a later server adds is ignored, as the document says of replies."""
    header, _ = parts(EXAMPLES["The reply to a push"])
    assert written(Receipt.from_header({**header["receipt"], "later": 1})) == header["receipt"]


def test_shapes_are_what_both_sides_read():
    """The shapes in the document are read as they are written; what is no shape is refused by name."""
    header, _ = parts(EXAMPLES["Contents of shapes of their own"])
    shapes = shapes_from_header(header["shapes"])
    assert (shapes["d"], shapes["t"], shapes["n_iter"]) == ((3,), (), None)
    assert shapes_to_header(shapes) == header["shapes"]
    for wrong in (3, "3", [1.0], [True], [-1], [2**60], {"0": 1}):
        with pytest.raises(errors.InvalidRequest, match="'shapes'"):
            shapes_from_header({"d": wrong})
