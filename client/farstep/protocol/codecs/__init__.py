"""Codecs: how elements become bytes on the wire."""

from farstep.protocol.codecs.codec import Codec
from farstep.protocol.codecs.elementwise import BFloat16, Float16, Full
from farstep.protocol.codecs.table import FULL, Wire, check_codec, codec_named, codecs, register, unregister

__all__ = [
    "FULL",
    "BFloat16",
    "Codec",
    "Float16",
    "Full",
    "Wire",
    "check_codec",
    "codec_named",
    "codecs",
    "register",
    "unregister",
]
