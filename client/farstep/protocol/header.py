"""Reading the header map, the only msgpack in a message that is built into objects.

Reading takes two passes. The first only finds the end of the map (`Unpacker.skip`): it builds nothing and resumes where
bytes were missing, so it costs the same whether the header arrives whole or byte by byte. Only a complete map is built,
so every array and map in it is paid for with at least one byte per element, and nested arrays that promise millions of
elements cost nothing. (`unpackb` on such a nest of 5 KB takes 45 ms and 70 MB with msgpack 1.2.4, because each level is
allocated when its length is read.)

The built map is then checked: unique string keys, plain values, depth, integers of 64 bits.

Without its C extension, msgpack rereads a header from the start at each piece. This is bounded: a header in too many
small pieces is then refused.

msgpack raises many errors for invalid bytes: `ValueError` and its subclasses, `OutOfData` and `BufferFull`, which are
none, and `RecursionError` or `MemoryError` for bytes made to cause them. Each is translated into a farstep error.

`Header` then takes one checked key of the map after the other, and none may remain. Each map names its protocol version
(`farstep/protocol/PROTOCOL.md`); `farstep.protocol.messages` defines the keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Never

import msgpack

from farstep.errors import FarstepError, InvalidRequest, LimitExceeded, ProtocolMismatch, Side, Truncated
from farstep.protocol.limits import DEFAULT_LIMITS, Limits

_PASSED = re.compile(r"(\d+) exceeds max_(str|bin|array|map|ext)_len\((\d+)\)")
_UNITS = {
    "str": "a string of {} bytes",
    "bin": "a binary value of {} bytes",
    "array": "an array of {} elements",
    "map": "a map of {} pairs",
}

FOREIGN = (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException)
"""The errors that msgpack raises for invalid bytes."""


def translate(exc: BaseException, limits: Limits, side: Side) -> InvalidRequest:
    """Return the farstep error for an error of msgpack's, one of `FOREIGN`."""
    if isinstance(exc, (msgpack.StackError, RecursionError)):
        return too_deep(limits, side)
    if isinstance(exc, msgpack.BufferFull):
        return too_long(limits, side)
    if isinstance(exc, MemoryError):
        return LimitExceeded("The header does not fit in the memory that is left.", field="header", side=side)
    if isinstance(exc, msgpack.OutOfData) or "incomplete input" in str(exc):
        return Truncated("The header ends early.", field="header", side=side)
    if isinstance(exc, msgpack.ExtraData):
        return InvalidRequest("Bytes follow the header where there should be none.", field="header", side=side)
    if isinstance(exc, UnicodeDecodeError):
        return InvalidRequest("The header holds a string that is not UTF-8.", field="header", side=side)
    if isinstance(exc, msgpack.FormatError):
        return InvalidRequest("The header holds the byte 0xc1, which is not msgpack.", field="header", side=side)
    if found := _PASSED.search(str(exc)):
        size, kind, most = found.groups()
        if kind == "ext":
            return extension(side)
        what = _UNITS[kind].format(size)
        return LimitExceeded(f"The header holds {what}; at most {most}.", field="header", limit=int(most), side=side)
    if "map key" in str(exc):
        return InvalidRequest("The header has a key that is not a string.", field="header", side=side)
    if "timestamp" in str(exc).lower():
        return extension(side)
    return InvalidRequest("The header is not valid msgpack.", field="header", side=side)


def too_long(limits: Limits, side: Side) -> LimitExceeded:
    """Return the error for a header of too many bytes."""
    most = limits.header_bytes
    return LimitExceeded(f"The header is larger than {most} bytes.", field="header", limit=most, side=side)


def too_deep(limits: Limits, side: Side) -> LimitExceeded:
    """Return the error for a header nested too deep."""
    most = limits.depth
    return LimitExceeded(f"The header is nested deeper than {most} levels.", field="header", limit=most, side=side)


def extension(side: Side) -> InvalidRequest:
    """Return the error for a header with an extension type."""
    return InvalidRequest(
        "The header holds a msgpack extension type (a timestamp is one).",
        field="header",
        remedy="Send plain values only.",
        side=side,
    )


_FIRST_PIECE = 4 << 10
_LARGEST_PIECE = 64 << 10
_COMPILED = msgpack.Unpacker.__module__ != "msgpack.fallback"
_MAX_REREAD_BYTES = 16 << 20
_INT64_MAX = (1 << 63) - 1
_SCALARS = frozenset({str, int, float, bool, type(None), bytes})
_CONTAINERS = frozenset({dict, list})
_PLAIN = _SCALARS | _CONTAINERS
_TEXT = frozenset({str})


def parse_header(data: bytes | memoryview, *, limits: Limits = DEFAULT_LIMITS, side: Side = "server") -> dict[str, Any]:
    """Return the header in `data`, which holds nothing else.

    Args:
        data: one complete msgpack map; allocation is bounded by its length, see the module.

    Raises:
        InvalidRequest: not a map, repeated or non-string keys, extension types, integers beyond 64 bits, bad UTF-8.
        LimitExceeded: a bound of `limits` is exceeded; `field` and `limit` name it.
        Truncated: the map is not complete.
    """
    build = _Build(limits, side)
    may_pass = len(data) > limits.containers
    try:
        header: dict[str, Any] = msgpack.unpackb(
            data,
            strict_map_key=True,
            object_pairs_hook=build.mapping,
            list_hook=build.sequence if may_pass else None,
            ext_hook=build.extension,
            max_ext_len=0,
            max_str_len=limits.str_bytes,
            max_bin_len=limits.bin_bytes,
            max_array_len=limits.array_len,
            max_map_len=limits.map_len,
        )
    except FarstepError:
        raise
    except FOREIGN as exc:
        raise translate(exc, limits, side) from exc
    check_tree(header, limits, side, wide=b"\xcf" in bytes(data))
    return header


class HeaderReader:
    """Find and read the header at the start of a stream that arrives in pieces.

    Attributes:
        header: the header, once it is complete.
        seen: bytes read so far.
    """

    def __init__(self, limits: Limits, side: Side) -> None:
        self.header: dict[str, Any] | None = None
        self.seen = 0
        self._limits = limits
        self._side: Side = side
        self._scan = msgpack.Unpacker(read_size=_FIRST_PIECE, max_buffer_size=max(limits.header_bytes, _FIRST_PIECE))
        self._kept = bytearray()
        self._piece = _FIRST_PIECE
        self._reread = 0

    def feed(self, chunk: memoryview) -> int:
        """Read on and return how many bytes of `chunk` belong to the header.

        Raises:
            InvalidRequest, LimitExceeded: see `parse_header`; raised as early as possible.
        """
        if not self.seen and chunk:
            self._check_first(chunk[0])
        taken = 0
        while self.header is None and taken < len(chunk):
            room = self._limits.header_bytes - self.seen
            piece = chunk[taken : taken + min(self._piece, room)]
            end = self._find_end(piece)
            if end is None:
                if len(piece) == room:
                    raise too_long(self._limits, self._side)
                self._kept += piece
                taken += len(piece)
                self._piece = min(2 * self._piece, _LARGEST_PIECE)
            else:
                self.header = self._parse(piece[:end])
                taken += end
        return taken

    def _find_end(self, piece: memoryview) -> int | None:
        before, self.seen = self.seen, self.seen + len(piece)
        try:
            self._scan.feed(piece)
            self._scan.skip()
        except msgpack.OutOfData:
            self._count_reread()
            return None
        except FOREIGN as exc:
            raise translate(exc, self._limits, self._side) from exc
        return int(self._scan.tell()) - before

    def _count_reread(self) -> None:
        self._reread += 0 if _COMPILED else self.seen
        if self._reread > _MAX_REREAD_BYTES:
            raise LimitExceeded(
                "The header comes in too many pieces for a msgpack without its C extension.",
                field="header",
                remedy=f"Install msgpack's wheel on the {self._side}.",
                side=self._side,
            )

    def _parse(self, last: memoryview) -> dict[str, Any]:
        if not self._kept:
            return parse_header(last, limits=self._limits, side=self._side)
        self._kept += last
        with memoryview(self._kept) as whole:
            return parse_header(whole, limits=self._limits, side=self._side)

    def _check_first(self, marker: int) -> None:
        if marker & 0xF0 != 0x80 and marker not in (0xDE, 0xDF):
            raise InvalidRequest(
                f"The body does not start with a msgpack map (its first byte is 0x{marker:02x}).",
                field="header",
                remedy="Send a header map, then the frames; PROTOCOL.md has examples.",
                side=self._side,
            )


class _Build:
    """The hooks that msgpack calls for every map, list and extension."""

    __slots__ = ("_left", "_limits", "_side")

    def __init__(self, limits: Limits, side: Side) -> None:
        self._limits = limits
        self._side: Side = side
        self._left = limits.containers

    def mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._left -= 1
        if self._left < 0:
            raise self._too_many()
        built = dict(pairs)
        if len(built) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InvalidRequest(
                f"The header has the key {twice[:64]!r} twice in one map.", field="header", side=self._side
            )
        return built

    def sequence(self, items: list[Any]) -> list[Any]:
        self._left -= 1
        if self._left < 0:
            raise self._too_many()
        return items

    def extension(self, code: int, data: bytes) -> Never:
        raise extension(self._side)

    def _too_many(self) -> LimitExceeded:
        most = self._limits.containers
        return LimitExceeded(
            f"The header holds more than {most} maps and arrays.", field="header", limit=most, side=self._side
        )


def check_tree(header: object, limits: Limits, side: Side, *, wide: bool, flat: frozenset[type] = frozenset()) -> None:
    """Refuse what msgpack accepts and the protocol does not, level by level.

    Args:
        wide: whether an integer beyond 32 bits may be present; only then are values checked. Integers below -2**63
            cannot be written in msgpack.
        flat: types that stand for a list of scalars each, which was checked before.
    """
    lists = _CONTAINERS | flat

    def refuse(detail: str) -> Never:
        raise InvalidRequest(detail, field="header", side=side)

    if type(header) is not dict:
        refuse("The header is not a map.")
    level: list[Any] = [header]
    for _ in range(limits.depth):
        values: list[Any] = []
        for each in level:
            if type(each) is dict:
                if not _TEXT.issuperset(map(type, each)):
                    refuse("The header has a key that is not a string.")
                values += each.values()
            else:
                values += each
        types = set(map(type, values))
        if not types - flat <= _PLAIN:  # the hooks leave none; a later msgpack may have another type
            refuse("The header holds a value that is not a map, array, string, number, bool, nil or binary.")
        if wide and int in types:
            ints = values if types == {int} else [value for value in values if type(value) is int]
            if max(ints) > _INT64_MAX:
                refuse("The header holds an integer that does not fit in a signed 64-bit one.")
        if types.isdisjoint(lists):
            return
        level = [value for value in values if type(value) in _CONTAINERS]
    raise too_deep(limits, side)


VERSION = 1


class Header:
    """Read a received header map, one checked key after the other."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        if type(version := values.get("v")) is not int or version != VERSION:  # 1.0 and true are equal to 1
            raise ProtocolMismatch(
                f"The message is of protocol version {version!r:.80}; this side speaks {VERSION}.",
                remedy="Bring client and server to releases that share a protocol version.",
                field="v",
                limit=VERSION,
            )
        self._values = dict(values)
        del self._values["v"]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def is_empty(self) -> bool:
        """Return whether every key has been taken."""
        return not self._values

    def integer(self, key: str, *, least: int = 0, most: int = 2**63 - 1, default: int | None = None) -> int:
        value = self._values.pop(key, default)
        if type(value) is not int or not least <= value <= most:
            raise InvalidRequest(
                f"Header key {key!r} is {value!r:.80}; it must be an int of at least {least}.", field=key
            )
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._values.pop(key, default)
        if type(value) is not str or not 0 < len(value) <= 128 or not value.isprintable():
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a printable name.", field=key)
        return value

    def flag(self, key: str) -> bool:
        value = self._values.pop(key, False)
        if type(value) is not bool:
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a bool.", field=key)
        return value

    def number(self, key: str) -> float | None:
        value = self._values.pop(key, None)
        if value is not None and type(value) not in (int, float):
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a number.", field=key)
        return None if value is None else float(value)

    def listing(self, key: str) -> list[Any] | None:
        value = self._values.pop(key, None)
        if value is not None and type(value) is not list:
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a list.", field=key)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._values.pop(key, None)
        if value is None:
            return {}
        if type(value) is not dict:
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a map.", field=key)
        return value

    def nothing_left(self) -> None:
        """Refuse unknown keys: an option that is not understood is never ignored."""
        if self._values:
            key = sorted(map(str, self._values))[0]
            raise InvalidRequest(f"Unknown header key {key!r:.80}.", field=key[:80])
