"""Training in rounds: many local steps, then one exchange of their result."""

from farstep.local_sgd.methods import DiLoCo, LocalSGD

__all__ = [
    "DiLoCo",
    "LocalSGD",
]
