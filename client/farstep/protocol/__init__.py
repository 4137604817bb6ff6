"""The wire format of farstep: a msgpack header map, then the tensors' bytes in bin frames (see `PROTOCOL.md`).

Needs no torch; `farstep.protocol.memory` turns tensors into memory.
"""

from farstep.protocol.decoder import Decoder
from farstep.protocol.dtypes import DTYPES, SEGMENT_DTYPES, Dtype, segment_dtype
from farstep.protocol.frames import Frames, encode, encoded_size
from farstep.protocol.limits import CONTENT_TYPE, MAX_FRAME_BYTES, MAX_HEADER_BYTES, Limits
from farstep.protocol.packing import Names
from farstep.protocol.ranges import from_ranges, to_ranges

__all__ = [
    "CONTENT_TYPE",
    "DTYPES",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "SEGMENT_DTYPES",
    "Decoder",
    "Dtype",
    "Frames",
    "Limits",
    "Names",
    "encode",
    "encoded_size",
    "from_ranges",
    "segment_dtype",
    "to_ranges",
]
