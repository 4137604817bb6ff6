"""Drop-in optimizers: the names of `torch.optim`, with the update in a session."""

from farstep.optim.adadelta import Adadelta
from farstep.optim.adafactor import Adafactor
from farstep.optim.adagrad import Adagrad
from farstep.optim.adam import Adam
from farstep.optim.adamax import Adamax
from farstep.optim.adamw import AdamW
from farstep.optim.asgd import ASGD
from farstep.optim.base import RemoteOptimizer
from farstep.optim.lbfgs import LBFGS
from farstep.optim.muon import Muon
from farstep.optim.nadam import NAdam
from farstep.optim.radam import RAdam
from farstep.optim.rmsprop import RMSprop
from farstep.optim.rprop import Rprop
from farstep.optim.sgd import SGD
from farstep.optim.sparse_adam import SparseAdam

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "RemoteOptimizer",
    "Rprop",
    "SparseAdam",
]
