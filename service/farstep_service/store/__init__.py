"""The tensors of one session: versions of its parameters, its optimizer state, and atomic steps."""

from farstep_service.store.borrowed import BorrowedBuffers
from farstep_service.store.buffers import Buffers, FlatBuffers, HalfPrecisionBuffers, decode_, encode_, pieces
from farstep_service.store.decider import check_first_step
from farstep_service.store.gradients import Gradients
from farstep_service.store.optimizer_state import PARAMETERS, FieldValues
from farstep_service.store.plain import PlainStore
from farstep_service.store.step import Applied
from farstep_service.store.store import Store, StoreBytes
from farstep_service.store.versions import Held

__all__ = [
    "PARAMETERS",
    "Applied",
    "BorrowedBuffers",
    "Buffers",
    "FieldValues",
    "FlatBuffers",
    "Gradients",
    "HalfPrecisionBuffers",
    "Held",
    "PlainStore",
    "Store",
    "StoreBytes",
    "check_first_step",
    "decode_",
    "encode_",
    "pieces",
]
