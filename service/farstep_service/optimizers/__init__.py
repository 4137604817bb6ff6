"""The update rules: maths as pure functions."""

from farstep_service.optimizers.adadelta import Adadelta, AdadeltaHyper
from farstep_service.optimizers.adafactor import Adafactor, AdafactorHyper
from farstep_service.optimizers.adagrad import Adagrad, AdagradHyper
from farstep_service.optimizers.adam import Adam, AdamHyper
from farstep_service.optimizers.adamax import Adamax, AdamaxHyper
from farstep_service.optimizers.adamw import AdamW, AdamWHyper
from farstep_service.optimizers.asgd import ASGD, ASGDCounts, ASGDHyper
from farstep_service.optimizers.lbfgs import LBFGS, LBFGSHyper
from farstep_service.optimizers.muon import Muon, MuonHyper
from farstep_service.optimizers.nadam import NAdam, NAdamCounts, NAdamHyper
from farstep_service.optimizers.radam import RAdam, RAdamHyper
from farstep_service.optimizers.rmsprop import RMSprop, RMSpropHyper
from farstep_service.optimizers.rprop import Rprop, RpropHyper
from farstep_service.optimizers.rule import Rule
from farstep_service.optimizers.rules import METHODS, RULES
from farstep_service.optimizers.sgd import SGD, SGDHyper
from farstep_service.optimizers.sparse_adam import SparseAdam, SparseAdamHyper

__all__ = [
    "ASGD",
    "LBFGS",
    "METHODS",
    "RULES",
    "SGD",
    "ASGDCounts",
    "ASGDHyper",
    "Adadelta",
    "AdadeltaHyper",
    "Adafactor",
    "AdafactorHyper",
    "Adagrad",
    "AdagradHyper",
    "Adam",
    "AdamHyper",
    "AdamW",
    "AdamWHyper",
    "Adamax",
    "AdamaxHyper",
    "LBFGSHyper",
    "Muon",
    "MuonHyper",
    "NAdam",
    "NAdamCounts",
    "NAdamHyper",
    "RAdam",
    "RAdamHyper",
    "RMSprop",
    "RMSpropHyper",
    "Rprop",
    "RpropHyper",
    "Rule",
    "SGDHyper",
    "SparseAdam",
    "SparseAdamHyper",
]
