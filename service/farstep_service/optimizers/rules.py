"""Every update rule, under torch's class name. A new one is a file and a place in this list."""

from collections.abc import Mapping
from types import MappingProxyType

from farstep_service.optimizers.adadelta import Adadelta
from farstep_service.optimizers.adafactor import Adafactor
from farstep_service.optimizers.adagrad import Adagrad
from farstep_service.optimizers.adam import Adam
from farstep_service.optimizers.adamax import Adamax
from farstep_service.optimizers.adamw import AdamW
from farstep_service.optimizers.asgd import ASGD
from farstep_service.optimizers.lbfgs import LBFGS
from farstep_service.optimizers.muon import Muon
from farstep_service.optimizers.nadam import NAdam
from farstep_service.optimizers.radam import RAdam
from farstep_service.optimizers.rmsprop import RMSprop
from farstep_service.optimizers.rprop import Rprop
from farstep_service.optimizers.rule import AnyMethod, AnyRule
from farstep_service.optimizers.sgd import SGD
from farstep_service.optimizers.sparse_adam import SparseAdam

_ALL: tuple[AnyRule, ...] = (
    Adagrad(),
    Adadelta(),
    Adamax(),
    ASGD(),
    SGD(),
    Adam(),
    AdamW(),
    NAdam(),
    RAdam(),
    RMSprop(),
    Rprop(),
    Adafactor(),
    Muon(),
    SparseAdam(),
)

RULES: Mapping[str, AnyRule] = MappingProxyType({rule.name: rule for rule in _ALL})

METHODS: Mapping[str, AnyMethod] = MappingProxyType({**RULES, "LBFGS": LBFGS()})
"""Every optimizer: those that are rules, and the one that asks for the objective several times in a step."""
