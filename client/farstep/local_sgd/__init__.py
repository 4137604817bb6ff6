"""Train in rounds: many local steps, then one exchange of what they came to."""

from farstep.local_sgd.methods import DiLoCo, LocalSGD

__all__ = [
    "DiLoCo",
    "LocalSGD",
]
