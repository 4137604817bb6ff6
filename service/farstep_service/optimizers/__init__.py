"""The update rules and what runs them."""

from farstep_service.optimizers.adadelta import Adadelta, AdadeltaHyper
from farstep_service.optimizers.adagrad import Adagrad, AdagradHyper
from farstep_service.optimizers.adamax import Adamax, AdamaxHyper
from farstep_service.optimizers.asgd import ASGD, ASGDCounts, ASGDHyper
from farstep_service.optimizers.kernels import MODES, Kernels, Mode, PackageStatus, warm_up
from farstep_service.optimizers.rules import RULES
from farstep_service.rule import Rule

__all__ = [
    "ASGD",
    "MODES",
    "RULES",
    "ASGDCounts",
    "ASGDHyper",
    "Adadelta",
    "AdadeltaHyper",
    "Adagrad",
    "AdagradHyper",
    "Adamax",
    "AdamaxHyper",
    "Kernels",
    "Mode",
    "PackageStatus",
    "Rule",
    "warm_up",
]
