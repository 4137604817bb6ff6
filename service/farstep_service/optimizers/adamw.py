"""AdamW: Adam whose weight decay shrinks the parameters instead of joining the gradient.

It is Adam with `decoupled_weight_decay`, and with another default decay, as in torch 2.13, `torch/optim/adamw.py`.

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101 (2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from farstep_service.optimizers.adam import Adam, AdamHyper


@final
@dataclass(frozen=True, kw_only=True)
class AdamWHyper(AdamHyper):
    """Options of AdamW, with torch's names and defaults; `decoupled_weight_decay` is in its groups only."""

    rule: ClassVar[str] = "AdamW"

    weight_decay: float = 1e-2
    decoupled_weight_decay: bool = True


@final
class AdamW(Adam):
    """The rule of Adam under these options."""

    name = "AdamW"
    hyper = AdamWHyper
