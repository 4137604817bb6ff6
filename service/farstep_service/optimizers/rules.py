"""Every update rule, under torch's class name. A new one is a file and a place in this list."""

from collections.abc import Mapping
from types import MappingProxyType

from farstep_service.optimizers.adadelta import Adadelta
from farstep_service.optimizers.adagrad import Adagrad
from farstep_service.optimizers.adamax import Adamax
from farstep_service.optimizers.asgd import ASGD
from farstep_service.rule import AnyRule

RULES: Mapping[str, AnyRule] = MappingProxyType({rule.name: rule for rule in (Adagrad(), Adadelta(), Adamax(), ASGD())})
