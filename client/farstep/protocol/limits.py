"""The limits of what a reader accepts, which writers therefore observe.

Every bound is here and in the table of `PROTOCOL.md`; a test compares the two. A bound is checked before memory is
allocated, so that a body of a few bytes cannot claim more than it brings.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

CONTENT_TYPE = "application/msgpack"
MAX_HEADER_BYTES = 1 << 20
MAX_FRAME_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one reader; each is the largest accepted value.

    Attributes:
        header_bytes: size of the header map.
        frame_bytes: size of one frame's content, without its prefix.
        frames: frames of one message; bounds the work of very small frames.
        depth: nesting of the header; the header map itself is depth 1.
        map_len: pairs of one map.
        array_len: elements of one array; segment ranges of 100,000 segments fit.
        str_bytes: UTF-8 bytes of one string.
        bin_bytes: size of one binary value inside the header.
        containers: maps and arrays of the whole header; an empty one takes 1 byte on the wire and 64 in memory.
    """

    header_bytes: int = MAX_HEADER_BYTES
    frame_bytes: int = MAX_FRAME_BYTES
    frames: int = 262_144
    depth: int = 8
    map_len: int = 4_096
    array_len: int = 262_144
    str_bytes: int = 4_096
    bin_bytes: int = 4_096
    containers: int = 131_072

    def __post_init__(self) -> None:
        for each in fields(self):
            if (value := getattr(self, each.name)) < 1:
                raise ValueError(f"Invalid {each.name}={value}. Must be at least 1.")
        if self.frame_bytes > 0xFFFF_FFFF:
            raise ValueError(f"Invalid frame_bytes={self.frame_bytes}. A msgpack bin ends at 4 GiB - 1.")

    @property
    def least(self) -> int:
        """Return the size up to which a header cannot exceed any bound but `depth`."""
        return min(self.header_bytes, self.map_len, self.array_len, self.str_bytes, self.bin_bytes, self.containers)


DEFAULT_LIMITS = Limits()
