"""The table of cases: optimizer x options x way to train x dtypes, and what is left out with the reason.

    defaults, each option alone, options together      every dtype
    groups, missing gradients, changes, sparse          every dtype
    options torch refuses                               float32, the same exception with the same words

Which options a class has is read from torch's own signature, so a newer torch makes the table longer, or
`test_completeness.py` fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import farstep
from tests.parity.options import (
    ALONE,
    IMPLEMENTATIONS,
    OWN,
    REFUSED,
    REFUSED_TOGETHER,
    SKIPPED,
    SKIPPED_TOGETHER,
    TOGETHER,
    Options,
)
from tests.parity.ways import (
    Changed,
    Closure,
    Groups,
    Missing,
    Sparse,
    Way,
    contiguous,
    embeddings,
    matrices,
    not_empty,
    strided,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

NAMES = tuple(sorted((name for name in farstep.optim.__all__ if name in vars(torch.optim)), key=str.lower))
"""What farstep has and this torch, too."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: of the optimizer.
        options: what its constructor gets.
        way: how it trains.
        dtypes: of its parameters, each a training of its own.
        instead: what torch's constructor gets in the place of these options.
        inexact: why not every bit can be torch's, empty where it is.
    """

    name: str
    options: Options = field(default_factory=dict)
    way: Way = field(default_factory=Way)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    instead: Options = field(default_factory=dict)
    inexact: str = ""

    @property
    def label(self) -> str:
        """Return way and options in a few words, and what else is not the optimizer's usual."""
        said = [self.way.label] if self.way.label else []
        if type(self.way) is Way and self.way.start is not WAY.get(self.name, Way()).start:
            said.append(self.way.start.__name__.replace("_", " "))
        said += [str(self.dtypes[0])] if len(self.dtypes) == 1 and self.dtypes[0] != torch.float32 else []
        said += [f"{option}={_short(value)}" for option, value in self.options.items()]
        return ", ".join(said) or "defaults"


@dataclass(frozen=True)
class Skip:
    """What has no case, and why."""

    name: str
    label: str
    reason: str


SINGLE = "torch computes in float32 with an option that is a float32 tensor, farstep in float64 with its value"


WIDER = "torch multiplies a scalar parameter in the dtype of a tensor lr, here the wider one"


def _inexact(name: str, options: Options) -> str:
    """Return why torch's bits cannot be had with some options, empty where they can."""
    values = [each for value in options.values() for each in (value if isinstance(value, tuple) else [value])]
    dtypes = {each.dtype for each in values if isinstance(each, Tensor)}
    return SINGLE if torch.float32 in dtypes else WIDER if name == "AdamW" and dtypes else ""


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    if not isinstance(value, Tensor):
        return str(value)
    numbers = [round(each, 6) for each in value.reshape(-1).tolist()]
    dtype = "" if value.dtype == torch.float32 else f", {str(value.dtype).removeprefix('torch.')}"
    return f"tensor({numbers if value.dim() else numbers[0]}{dtype})"


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return what a constructor takes beside the parameters that it trains, in order."""
    taken = dict(inspect.signature(kind).parameters)
    del taken["params"]
    return taken


WAY: dict[str, Way] = {
    "Adafactor": Way(not_empty),
    "LBFGS": Closure(contiguous),
    "Muon": Way(matrices),
    "SparseAdam": Sparse(embeddings),
}
"""How an optimizer trains that does not take parameters of any kind, dense gradients, or a step without a closure."""
REAL = tuple(dtype for dtype in DTYPES if not dtype.is_complex)
TAKEN: dict[str, tuple[torch.dtype, ...]] = {
    "Adafactor": REAL,
    "LBFGS": tuple(dtype for dtype in DTYPES if dtype not in (torch.float16, torch.bfloat16)),
    "Muon": REAL,
    "SparseAdam": REAL,
}
"""The dtypes of an optimizer that does not take all."""
STEPPED = tuple(name for name in NAMES if type(WAY.get(name)) is not Closure)
"""The optimizers that step along gradients, without a closure."""
ADDED_UP = "of a row that is named twice torch subtracts one gradient after the other, farstep their sum"
SPARSE: dict[str, list[Case]] = {
    "Adagrad": [
        Case("Adagrad", {"lr": 0.1}, Sparse()),
        Case("Adagrad", {"lr_decay": 0.1, "maximize": True, "initial_accumulator_value": 0.5}, Sparse()),
        Case("Adagrad", {"weight_decay": 0.1}, Sparse(), (torch.float32,)),
    ],
    "SGD": [
        Case("SGD", {"lr": 0.1}, Sparse(coalesced=True)),
        Case("SGD", {"momentum": 0.9}, Sparse(coalesced=True), tuple(each for each in DTYPES if each != torch.float16)),
        Case("SGD", {"lr": 0.1, "maximize": True}, Sparse(), inexact=ADDED_UP),
        Case("SGD", {"weight_decay": 0.1}, Sparse(), (torch.float32,)),
    ],
}
"""Sparse gradients, for the optimizers that take them."""


IN_MEMORY = "torch adds up along the parameter's memory, and that of a session is contiguous"
OTHER: dict[str, list[Case]] = {"Adafactor": [Case("Adafactor", {}, Way(strided), inexact=IN_MEMORY)]}
"""What else only some optimizers have."""
OF_NO_USE: dict[str, list[Case]] = {
    "LBFGS": [Case("LBFGS", {}, Groups(contiguous), (torch.float32,))],
    "Muon": [Case("Muon", {"lr": 0.1}, Way(), (torch.float32,))],
    "SparseAdam": [Case("SparseAdam", {}, Way(), (torch.float32,))],
}
"""Parameters, groups and gradients that only some optimizers refuse."""


def usual_options(name: str) -> list[Options]:
    """Return defaults and options together, for tests that look at something else than options."""
    return [{}, *TOGETHER.get(name, [])]


def trained(name: str) -> Iterator[Case]:
    """Return an optimizer's cases: defaults, each option alone, options together, and the ways to train."""
    for case in _trained(name):
        yield replace(case, dtypes=tuple(each for each in case.dtypes if each in TAKEN.get(name, DTYPES)))


def _trained(name: str) -> Iterator[Case]:
    way, taken = WAY.get(name, Way()), parameters_of(vars(torch.optim)[name])

    def alone(option: str) -> tuple[Options, ...]:
        return OWN.get((name, option), ALONE.get(option, ())) if option in taken else ()

    yield Case(name, way=way)
    for option, parameter in taken.items():
        if option in IMPLEMENTATIONS:
            yield Case(name, {option: True}, way, instead={option: parameter.default})
        for options in alone(option):
            yield Case(name, options, way, inexact=_inexact(name, options))
    for options in TOGETHER.get(name, []):
        yield Case(name, options, way)
    if type(way) is Way:
        for usual in (Groups, Missing, Changed):
            yield Case(name, {"lr": 0.1}, usual(way.start))
        # float16 rounds most defaults of eps to 0, and gradients that are computed would end as infinities.
        yield Case(name, {"lr": 0.1, **next(iter(alone("eps")), {})}, Closure(way.start))
    yield from SPARSE.get(name, [])
    yield from OTHER.get(name, [])


def refused(name: str) -> Iterator[Case]:
    """Return an optimizer's cases that torch refuses: options out of range or at odds, and gradients it cannot take."""
    way, taken = WAY.get(name, Way()), parameters_of(vars(torch.optim)[name])
    for option in taken:
        for options in REFUSED.get(option, ()):
            yield Case(name, options, way, (torch.float32,))
    for options in REFUSED_TOGETHER.get(name, ()):
        yield Case(name, options, way, (torch.float32,))
    if TAKEN.get(name) == REAL:
        yield Case(name, {}, way, (torch.complex64,))
    if type(way) is Way and name not in SPARSE:
        yield Case(name, {}, Sparse(embeddings), (torch.float32,))
    yield from OF_NO_USE.get(name, [])


def cases(names: tuple[str, ...] = NAMES) -> list[Case]:
    """Return all cases of some optimizers."""
    return [case for name in names for table in (trained, refused) for case in table(name)]


def skipped(names: tuple[str, ...] = NAMES) -> list[Skip]:
    """Return what some optimizers have no case for."""
    alone = [
        Skip(name, f"{option}=True", SKIPPED[option])
        for name in names
        for option in parameters_of(vars(torch.optim)[name])
        if option in SKIPPED
    ]
    return alone + [Skip(name, label, why) for (name, label), why in SKIPPED_TOGETHER.items() if name in names]
