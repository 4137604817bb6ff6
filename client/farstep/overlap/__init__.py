"""Pushes that are sent while the backward pass still computes their gradients."""

from farstep.overlap.backward_order import PAUSE_STEPS, STREAMED, WRONG_IN_A_ROW, BackwardOrder
from farstep.overlap.push import AGAIN, BROKEN, CHANGED, LEAST_BYTES, OTHERS, UNUSED, Overlapped, Overlapping
from farstep.overlap.stage import plain

__all__ = [
    "AGAIN",
    "BROKEN",
    "CHANGED",
    "LEAST_BYTES",
    "OTHERS",
    "PAUSE_STEPS",
    "STREAMED",
    "UNUSED",
    "WRONG_IN_A_ROW",
    "BackwardOrder",
    "Overlapped",
    "Overlapping",
    "plain",
]
