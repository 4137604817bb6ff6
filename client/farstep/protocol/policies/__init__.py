"""What a session does around a step: one interface, the policies behind it, and their order."""

from farstep.protocol.policies.clipping import GRAD_NORM, ClipNorm, ClipValue
from farstep.protocol.policies.policy import Facts, Gradients, Policy, check_positive, is_number
from farstep.protocol.policies.stateful import EMA, Accumulate, Average
from farstep.protocol.policies.table import (
    NO_POLICIES,
    Policies,
    default_options,
    facts,
    policies,
    register,
    unregister,
)

__all__ = [
    "EMA",
    "GRAD_NORM",
    "NO_POLICIES",
    "Accumulate",
    "Average",
    "ClipNorm",
    "ClipValue",
    "Facts",
    "Gradients",
    "Policies",
    "Policy",
    "check_positive",
    "default_options",
    "facts",
    "is_number",
    "policies",
    "register",
    "unregister",
]
