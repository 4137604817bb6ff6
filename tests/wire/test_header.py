"""Reading the header: what is refused, how clearly, and at what cost."""

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import pytest

from farstep.errors import FarstepError, InvalidRequest, LimitExceeded, Truncated
from farstep.protocol import Limits, encode
from farstep.protocol.header import parse_header
from farstep.protocol.packing import pack_header
from tests.support.wire.driving import read

COMPILED = msgpack.Unpacker.__module__ != "msgpack.fallback"
NEST = b"\x81\xa1a" + b"\x91" * 7 + b"\xc0"  # depth 8


def header_of(body: bytes, *, piece: int = 1 << 20, **limits: int) -> dict:
    header, _ = read(body, [], pieces=[piece], limits=Limits(**limits))
    return header


LIMITS = [
    ("header_bytes", b"\x81\xa1a\xc4\x05hello", 10, 9, "larger than 9 bytes"),
    ("depth", NEST, 8, 7, "deeper than 7 levels"),
    ("depth", b"\x81\xa1a\x81\xa1b\x80", 3, 2, "deeper than 2 levels"),
    ("map_len", b"\x82\xa1a\x01\xa1b\x02", 2, 1, "a map of 2 pairs; at most 1"),
    ("array_len", b"\x81\xa1a\x93\x01\x02\x03", 3, 2, "an array of 3 elements; at most 2"),
    ("str_bytes", b"\x81\xa1a\xa3abc", 3, 2, "a string of 3 bytes; at most 2"),
    ("bin_bytes", b"\x81\xa1a\xc4\x03abc", 3, 2, "a binary value of 3 bytes; at most 2"),
    ("containers", b"\x81\xa1a\x93\x80\x90\x90", 5, 4, "more than 4 maps and arrays"),
]


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(("name", "body", "most", "less", "words"), LIMITS, ids=[each[0] for each in LIMITS])
def test_every_limit_is_kept_and_named(name, body, most, less, words, piece):
    """A header at a limit is read; one beyond it is refused with the limit's value and a sentence."""
    assert header_of(body, piece=piece, **{name: most}) == msgpack.unpackb(body)
    with pytest.raises(LimitExceeded, match=words) as caught:
        header_of(body, piece=piece, **{name: less})
    assert caught.value.limit == less
    assert caught.value.field == "header"
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (b"\x81\xa1x\x82\xa1b\x01\xa1b\x01", "'b' twice"),
        (b"\x81\x01\x02", "key that is not a string"),
        (b"\x81\xc4\x01a\x02", "key that is not a string"),
        (b"\x81\xc0\x02", "key that is not a string"),
        (b"\x81\x90\x02", "key that is not a string"),
        (b"\x81\x80\x02", "key that is not a string"),
        (b"\x81\xa1a\x81\xc4\x01a\x02", "key that is not a string"),
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "extension type"),
        (b"\x81\xa1a\xd7\xff" + bytes(8), "extension type"),
        (b"\x81\xa1a\xc7\x0c\xff" + bytes(12), "extension type"),
        (b"\x81\xa1a\xc7\x00\xff", "extension type"),
        (b"\x81\xa1a\xc7\x00\x05", "extension type"),
        (b"\x81\xa1a\xd4\x05x", "extension type"),
        (b"\x81\xa1a\xc8\x00\x01\x05x", "extension type"),
        (b"\x81\xa1a\xc9\x00\x00\x00\x01\x05x", "extension type"),
        (b"\x81\xa1a\xcf\x80" + bytes(7), "signed 64-bit"),
        (b"\x81\xa1a\x92\xa1b\xcf\xff" + bytes(7), "signed 64-bit"),
        (b"\x81\xa1a\xa2\xff\xfe", "not UTF-8"),
        (b"\x81\xa1a\xa3\xed\xa0\x80", "not UTF-8"),
        (b"\x81\xa1a\xc1", "0xc1"),
        (b"\xc1", "does not start with a msgpack map"),
        (b"\x90", "does not start with a msgpack map"),
        (b"\xc0", "does not start with a msgpack map"),
        (b"\xdd\xff\xff\xff\xff", "does not start with a msgpack map"),
        (b'{"v": 1}', "does not start with a msgpack map"),
        (b"\x80\x04\x95", "0x04"),  # a pickle, after its first byte
    ],
)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_what_the_protocol_has_no_place_for_is_refused(body, words, piece):
    """Repeated and foreign keys, extension types, huge integers, bad text and other objects are refused, and named."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        read(body, [1], pieces=[piece])
    assert type(caught.value) is InvalidRequest


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"\x81\xa1a\xcf\x7f" + b"\xff" * 7, 2**63 - 1),
        (b"\x81\xa1a\xd3\x80" + bytes(7), -(2**63)),
        (b"\x81\xa1a\xca\x3f\x80\x00\x00", 1.0),
        (b"\xdf\x00\x00\x00\x01\xdb\x00\x00\x00\x01a\xdd\x00\x00\x00\x02\xc2\xc0", [False, None]),
        (b"\xde\x00\x01\xda\x00\x01a\xdc\x00\x01\xd1\xff\xff", [-1]),
    ],
)
def test_every_width_of_msgpack_is_read(body, value):
    """Integers, floats, strings, maps and arrays may have any of msgpack's widths."""
    assert header_of(body) == {"a": value}


def test_other_garbage_is_an_invalid_request():
    """Whatever else the parser says about bytes that do not form one complete map, it is one of our errors."""
    for data, error in [
        (b"\x81\xa1a", Truncated),
        (b"", Truncated),
        (b"\x80\x80", InvalidRequest),
        (b"\x01", InvalidRequest),
    ]:
        with pytest.raises(error):
            parse_header(data)


@pytest.mark.parametrize("piece", [1, 3, 4096, 4097, 70_000, 1 << 20])
def test_large_headers_arrive_in_any_pieces(piece):
    """A header of many buffers is the same whether it comes whole or byte by byte."""
    header = {"v": 1, "segments": list(range(20_000)), "names": ["x" * 4096] * 3, "last": 7}
    body = b"".join(encode(header, []))
    assert header_of(body, piece=piece) == header


def test_reading_byte_by_byte_is_linear():
    """A header of 300 KB that comes byte by byte costs a second or so, where re-reading would cost minutes."""
    body = b"".join(encode({"segments": list(range(100_000, 160_000))}, []))
    assert len(body) > 300_000
    began = time.process_time()
    header_of(body, piece=1)
    assert time.process_time() - began < 10


def test_headers_end_at_their_limit():
    """A header of exactly 1 MiB is read; one that is longer is refused once 1 MiB has come."""
    body = b"\x81\xa1a\xdc\x01\x00" + (b"\xc5\x0f\xfd" + bytes(4093)) * 255
    body += b"\xc5\x0f\xf7" + bytes(4096 - 6 - 3)
    assert len(body) == 1 << 20
    assert len(header_of(body)["a"]) == 256
    longer = b"\x81\xa1a\xdc\x01\x00" + (b"\xc5\x10\x00" + bytes(4096)) * 256
    with pytest.raises(LimitExceeded, match="larger than 1048576"):
        header_of(longer, piece=65_536)


def test_limits_validate_themselves():
    """A limit that makes no sense is refused when it is set."""
    with pytest.raises(ValueError, match=r"Invalid depth=0. Must be at least 1."):
        Limits(depth=0)
    with pytest.raises(ValueError, match="4 GiB"):
        Limits(frame_bytes=1 << 32)


def nested(prefix: bytes, *, key: bytes = b"") -> bytes:
    """Return 1 MiB of containers, each inside the one before."""
    level = prefix + key
    return (b"\x81\xa1a" + level * ((1 << 20) // len(level)))[: 1 << 20]


def filled(element: bytes) -> bytes:
    """Return 1 MiB of this element, in arrays of the largest length allowed."""
    count = ((1 << 20) - 64) // len(element)
    arrays = [min(262_144, count - at) for at in range(0, count, 262_144)]
    return (
        b"\x81\xa1a"
        + bytes([0x90 + len(arrays)])
        + b"".join(b"\xdd" + struct.pack(">I", n) + element * n for n in arrays)
    )


MOST = struct.pack(">I", 0xFFFF_FFFF)
BOMBS = {
    "arrays that claim 4 G elements": nested(b"\xdd" + MOST),
    "arrays that claim the limit": nested(b"\xdd" + struct.pack(">I", 262_144)),
    "arrays that claim what was sent": nested(b"\xdd" + struct.pack(">I", 209_000)),
    "arrays of 10,000 each": nested(b"\xdd" + struct.pack(">I", 10_000)),
    "arrays of 65,535 each": nested(b"\xdc\xff\xff"),
    "arrays of one": nested(b"\x91"),
    "maps that claim 4 G pairs": nested(b"\xdf" + MOST, key=b"\xa1a"),
    "maps of 65,535 each": nested(b"\xde\xff\xff", key=b"\xa1a"),
    "maps of one": nested(b"\x81", key=b"\xa1a"),
    "maps as keys": nested(b"\x81"),
    "a string that claims 4 GiB": b"\x81\xa1a\xdb" + MOST,
    "a bin that claims 4 GiB": b"\x81\xa1a\xc6" + MOST,
    "an extension that claims 4 GiB": b"\x81\xa1a\xc9" + MOST + b"\x01",
    "a map that claims 4 G pairs": b"\xdf" + MOST,
    "a frame that claims 4 GiB": b"\x80\xc6" + MOST,
    "empty maps": filled(b"\x80"),
    "empty arrays": filled(b"\x90"),
    "nils": filled(b"\xc0"),
    "small strings": filled(b"\xa2ab"),
    "floats": filled(b"\xca\x3f\x80\x00\x00"),
}
EXPLODE = """
import resource, sys, time
from farstep.errors import InvalidRequest
from farstep.protocol import Decoder

now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
body = memoryview(sys.stdin.buffer.read())
began = time.process_time()
decoder = Decoder(lambda header: [memoryview(bytearray(8))])
try:
    for at in range(0, len(body), 65536):
        decoder.feed(body[at : at + 65536])
    decoder.close()
except InvalidRequest as refusal:
    outcome, detail = refusal.code, refusal.detail
seconds = time.process_time() - began
print(outcome)
assert "memory" not in detail, detail
assert seconds < 0.5, seconds
"""


@pytest.mark.promise(
    "Any bytes at all are read or refused with a documented error, and refusing bombs costs little time and memory.",
    area="bad input",
)
@pytest.mark.skipif(sys.platform != "linux", reason="measures its address space in /proc")
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.process
def test_bombs_do_not_go_off(name):
    """1 MiB made to be expensive costs under half a second, does not miss memory in 64 MiB of it, and is refused."""
    assert len(BOMBS[name]) <= 1 << 20
    done = subprocess.run([sys.executable, "-c", EXPLODE], input=BOMBS[name], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip() in (b"limit_exceeded", b"truncated", b"invalid_request")


@pytest.mark.process
def test_the_wire_needs_no_torch():
    """Importing the wire, as the command line does, does not import torch."""
    check = "import sys, farstep.protocol; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.skipif(COMPILED, reason="is about a msgpack without its C extension")
def test_rereading_is_bounded():
    """Where every piece means reading from the start, a large header in tiny pieces is refused before it costs much."""
    body = b"".join(encode({"names": ["x" * 4096] * 16}, []))
    assert header_of(body, piece=1000) == {"names": ["x" * 4096] * 16}
    with pytest.raises(LimitExceeded, match="too many pieces"):
        header_of(body, piece=1)


@pytest.mark.skipif(not COMPILED, reason="this is the run without the C extension")
@pytest.mark.process
def test_the_same_without_the_c_extension():
    """Where msgpack has no C extension the same headers are read and the same ones refused."""
    chosen = "every_limit or no_place_for or every_width or garbage or at_their_limit or rereading"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "MSGPACK_PUREPYTHON": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("filler", [0, 5000], ids=["short", "long"])
@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: "one"}, 2**63, [[[[[[[[]]]]]]]], {"at": msgpack.Timestamp(1)}, {"code": msgpack.ExtType(1, b"")}],
    ids=["tuple", "number as key", "wide int", "deep", "timestamp", "extension"],
)
def test_what_no_reader_accepts_is_not_written(value: object, filler: int) -> None:
    """A short header, which is not read back before it is sent, is held to the same rules as a long one."""
    with pytest.raises(FarstepError):
        pack_header({"filler": [0] * filler, "value": value})
