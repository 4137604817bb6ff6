"""A worker's tensors on their way: gradients and state out, parameters and state in, and what was edited between."""

from farstep.tensors.arrivals import Arrivals
from farstep.tensors.bits import Seen, same_bits
from farstep.tensors.decoded_arrivals import DecodedArrivals
from farstep.tensors.departures import Departures
from farstep.tensors.edits import is_plain, memcmp
from farstep.tensors.encoder import Encoder
from farstep.tensors.looking import Edited, Looking
from farstep.tensors.narrow_arrivals import NarrowArrivals
from farstep.tensors.overlaps import overlapping, shares_with_itself
from farstep.tensors.staging import Form, StateArrivals, outgoing, outgoing_contents, outgoing_gradients

__all__ = [
    "Arrivals",
    "DecodedArrivals",
    "Departures",
    "Edited",
    "Encoder",
    "Form",
    "Looking",
    "NarrowArrivals",
    "Seen",
    "StateArrivals",
    "is_plain",
    "memcmp",
    "outgoing",
    "outgoing_contents",
    "outgoing_gradients",
    "overlapping",
    "same_bits",
    "shares_with_itself",
]
