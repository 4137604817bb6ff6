"""Drop-in optimizers: the names of `torch.optim`, with the update in a session."""

from farstep.optim.adadelta import Adadelta
from farstep.optim.adagrad import Adagrad
from farstep.optim.adamax import Adamax
from farstep.optim.asgd import ASGD
from farstep.optim.base import RemoteOptimizer

__all__ = ["ASGD", "Adadelta", "Adagrad", "Adamax", "RemoteOptimizer"]
