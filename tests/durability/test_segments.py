"""The bytes of a segment: another layout is another format, and what was written before could not be read."""

from __future__ import annotations

import struct

import pytest
import xxhash

from farstep.errors import DamagedJournal
from farstep_service.durability.reading import Reading
from farstep_service.durability.segments import NO_CHAIN, Place, Segment, boot_name, chained

SIZE = 1024
BOOT = boot_name(b"the boot of a test")
GOLDEN = bytes.fromhex(
    """
    666172737465704a010000001000000007000000000000003925215269f4cb323f11e7cae38405e0
    00000000000000000000000000000000671f3e4fcde9e0746673796e000000000200000000000000
    2b21a7a4004bd1d30000000000000000000000000000000000000000000000000000000000000000
    00000000000000006672656301000000050000000000000001000000000000000000000000000000
    5762b6a01eab2eadb7464a88b48d98acdf41b11b5d4b0dde00000000000000006669727374000000
    00000000000000000000000000000000000000000000000000000000000000000000000000000000
    00000000000000000000000000000000667265630200000046000000000000000001000000000000
    000000000000000000000000000000000000000000000000799d66d43fa20ea70000000000000000
    70707070707070707070707070707070707070707070707070707070707070707070707070707070
    70707070707070707070707070707070707070707070707070707070707000000000000000000000
    00000000000000000000000000000000000000000000000000000000000000000000000000000000
    00000000000000006672656301000000410000000000000002000000000000000100000000000000
    6c230a8092fa188c6ed98029cdb62086d50b3a8097f7595100000000000000007878787878787878
    78787878787878787878787878787878787878787878787878787878787878787878787878787878
    78787878787878787878787878787878780000000000000000000000000000000000000000000000
    00000000000000000000000000000000000000000000000000000000000000000000000000000000
    """
).ljust(SIZE, b"\0")
"""A segment as the first release of this format wrote it."""


def written() -> memoryview:
    """Write a segment with an event, a payload, an event that names it, and the mark of a sync."""
    memory = memoryview(bytearray(SIZE))
    segment = Segment(memory, 7, NO_CHAIN, BOOT)
    chain = chained(NO_CHAIN, 1, b"first")
    segment.append(b"first", 1, 0, chain)
    _, payload = segment.reserve(70)
    payload[:] = b"p" * 70
    segment.append(b"x" * 65, 2, 1, chained(chain, 2, b"x" * 65))
    segment.mark(2)
    return memory


def checksum(packed: bytes, seed: int = 0) -> bytes:
    return xxhash.xxh3_64_intdigest(packed, seed).to_bytes(8, "little")


def test_the_layout_of_a_segment() -> None:
    """Heads, mark, bodies, padding and the zeros behind them are at their offsets, each with its checksum."""
    file = bytes(written())
    salt = file[24:32]
    seed = int.from_bytes(salt, "little")
    head = struct.pack("<8sIIQ8s8s16s", b"farstepJ", 1, SIZE // 64, 7, salt, BOOT, bytes(16))
    mark = struct.pack("<4s4xQ", b"fsyn", 2)
    chain = chained(NO_CHAIN, 1, b"first")
    first = struct.pack("<4sB3xQQQ16s", b"frec", 1, 5, 1, 0, chain)
    extent = struct.pack("<4sB3xQQQ16s", b"frec", 2, 70, 256, 0, bytes(16))
    second = struct.pack("<4sB3xQQQ16s", b"frec", 1, 65, 2, 1, chained(chain, 2, b"x" * 65))
    assert file[0:64] == head + checksum(head)
    assert file[64:128] == (mark + checksum(mark, seed)).ljust(64, b"\0")
    assert file[128:192] == first + checksum(first, seed) + bytes(8)
    assert file[192:197] == b"first"
    assert file[256:320] == extent + checksum(extent, seed) + bytes(8)
    assert file[320:390] == b"p" * 70
    assert file[448:512] == second + checksum(second, seed) + bytes(8)
    assert file[512:577] == b"x" * 65
    assert file[640:704] == bytes(64)


def test_a_segment_of_the_first_release_is_read() -> None:
    """Every later release reads what the first one wrote: events, a payload, and what was known to be on the disk."""
    reading = Reading(memoryview(GOLDEN), "golden", 7, BOOT)
    assert (reading.begun, reading.chain, reading.same_boot) == (True, NO_CHAIN, True)
    found = [*reading.events(1, NO_CHAIN)]
    assert [(each.number, each.body, each.segment, each.end) for each in found] == [
        (1, b"first", 7, 256),
        (2, b"x" * 65, 7, 640),
    ]
    assert bytes(reading.extent(Place(7, 320, 70))) == b"p" * 70
    assert reading.is_end(640)
    assert reading.behind(128) == (2, 2)
    assert not Reading(memoryview(GOLDEN), "golden", 7, boot_name(b"another")).same_boot
    assert not Reading(memoryview(GOLDEN), "golden", 8, BOOT).begun  # it was number 7 before its file was used again


def test_a_segment_of_a_later_release_is_refused() -> None:
    """A format that this release does not know is not read as if it were known."""
    head = bytearray(GOLDEN[:56])
    head[8:12] = (2).to_bytes(4, "little")
    with pytest.raises(DamagedJournal, match=r"golden .* has the format 2, and this release reads 1"):
        Reading(memoryview(bytes(head) + checksum(bytes(head)) + GOLDEN[64:]), "golden", 7, BOOT)
