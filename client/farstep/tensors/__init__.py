"""A worker's tensors in transit: outgoing gradients and state, incoming parameters and state, and edits in between."""

from farstep.tensors.edits import BackgroundCompare, Edited, Seen, is_plain, memcmp, same_bits
from farstep.tensors.encoder import Encoder
from farstep.tensors.gradient_sender import GradientSender
from farstep.tensors.half_precision_receiver import HalfPrecisionReceiver
from farstep.tensors.overlaps import overlapping, shares_with_itself
from farstep.tensors.parameter_receiver import DecodingReceiver, ParameterReceiver
from farstep.tensors.staging import StateArrivals, TensorMeta, outgoing, outgoing_contents, outgoing_gradients

__all__ = [
    "BackgroundCompare",
    "DecodingReceiver",
    "Edited",
    "Encoder",
    "GradientSender",
    "HalfPrecisionReceiver",
    "ParameterReceiver",
    "Seen",
    "StateArrivals",
    "TensorMeta",
    "is_plain",
    "memcmp",
    "outgoing",
    "outgoing_contents",
    "outgoing_gradients",
    "overlapping",
    "same_bits",
    "shares_with_itself",
]
