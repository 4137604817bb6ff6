"""How far training in 16 bits ends up from the same training in float64: torch's for-loop, and fused kernels.

In 16 bits each step rounds by up to 1 in 256 (bfloat16) or 1 in 2,048 (float16), and a difference of one rounding stays
in the parameter, so two ways to compute a step drift apart whatever they do. Which of them is right is seen beside
float64 only. torch's for-loop rounds after every operation; a fused kernel computes a step in float32 and rounds once.

    distance(t) = p(t) - p of float64(t), after every step t, for every element
    rms, max    over all steps and elements
    further     a fused kernel's rms is beyond torch's by more than SLACK, or it has Inf or NaN where torch has none

Rprop in float16 is the one where a single learning rate shows little: its step sizes are products of a few numbers, the
small ones are subnormal and lose up to 3 % when they are stored, by either way, and grow again with that. Which of the
few values that all elements share are rounded well is luck, and differs from rate to rate (0.7 to 1.4 times torch's
distance). So there the promise is about many rates together.

All three start from the same values, have the same gradients, which are drawn in 16 bits, and the same options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import farstep
from farstep_service.optimizers import METHODS
from tests.parity.cases import NAMES, parameters_of, usual_options
from tests.parity.options import Options
from tests.parity.table import table
from tests.parity.ways import drawn

HALVES = (torch.bfloat16, torch.float16)
FUSED = tuple(name for name in NAMES if "fused" in METHODS[name].kernels)
SEEDS = 4
ELEMENTS = 4096
STEPS = 200
SLACK = 0.02
"""How much larger one rms may be than the other by chance: between two seeds the ratio of both moves by 0.01 or so."""

LUCK = {("Rprop", torch.float16): 0.5}
"""The same for one learning rate, where the rounding of a few values that all elements share decides."""
RATES = tuple(round(0.05 * 1.06**k, 4) for k in range(24))
"""Learning rates that are looked at together, in these cases."""

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Spread:
    """How far one training was from float64's.

    Attributes:
        rms, largest: over all steps and those elements that stayed finite for torch.
        lost: elements that are Inf or NaN at the end.
    """

    rms: float
    largest: float
    lost: int

    def __str__(self) -> str:
        lost = f", {self.lost:,} lost" if self.lost else ""
        return f"{self.rms:.3e} (max {self.largest:.1e}{lost})"


@dataclass(frozen=True)
class Distance:
    """The distances from float64 of both trainings, with one choice of options in one dtype.

    Attributes:
        name, options, dtype: what was trained, and how.
        torch, fused: both distances.
        rates: how many learning rates were taken together, 0 for that of the options.
    """

    name: str
    options: Options
    dtype: torch.dtype
    torch: Spread
    fused: Spread
    rates: int = 0

    @property
    def ratio(self) -> float:
        """Return how many times torch's distance the fused kernel's is; 1 where both are 0."""
        if self.torch.rms == self.fused.rms:
            return 1.0
        return self.fused.rms / self.torch.rms if self.torch.rms else float("inf")

    @property
    def further(self) -> bool:
        """Return whether the fused kernel is further away than torch, beyond what chance explains."""
        slack = SLACK if self.rates else LUCK.get((self.name, self.dtype), SLACK)
        return not (self.ratio <= 1 + slack and self.fused.lost <= self.torch.lost)

    @property
    def label(self) -> str:
        """Return the options in a few words."""
        rates = [f"{self.rates} rates, distances divided by them"] if self.rates else []
        return ", ".join([*rates, *(f"{option}={value}" for option, value in self.options.items())]) or "defaults"


def distance(
    name: str, options: Options, dtype: torch.dtype, fused: Make | None = None, *, steps: int = STEPS
) -> Distance:
    """Train three times, step by step, and return how far the two in 16 bits were from the one in float64.

    Args:
        name: the optimizer's.
        options: of its constructor.
        dtype: of 16 bits.
        fused: makes the optimizer that is compared with torch's; farstep's, embedded and fused, if not given.
        steps: how many.

    Raises:
        Unavailable: there is no C++ compiler for the kernel.
    """
    kind: Callable[..., torch.optim.Optimizer] = vars(torch.optim)[name]
    plain: dict[str, Any] = {"foreach": False} if "foreach" in parameters_of(vars(torch.optim)[name]) else {}
    ours: Callable[..., torch.optim.Optimizer] = vars(farstep.optim)[name]
    makes: tuple[Make, ...] = (
        lambda ps: kind(ps, **plain, **options),
        lambda ps: kind(ps, **plain, **options),
        fused or (lambda ps: ours(ps, **options, kernel="fused")),
    )
    starts = [drawn((ELEMENTS,), dtype, 0, seed) for seed in range(SEEDS)]
    trained = [[p.to(each, copy=True).requires_grad_() for p in starts] for each in (torch.float64, dtype, dtype)]
    optimizers = [make(ps) for make, ps in zip(makes, trained, strict=True)]
    at: list[list[Tensor]] = [[], []]
    try:
        for step in range(1, steps + 1):
            for ps, optimizer in zip(trained, optimizers, strict=True):
                for seed, p in enumerate(ps):
                    p.grad = drawn((ELEMENTS,), dtype, step, seed).to(p.dtype, copy=True)
                optimizer.step()
            reference, *narrow = (torch.cat([p.detach().double() for p in ps]) for ps in trained)
            for found, values in zip(at, narrow, strict=True):
                found.append(values - reference)
    finally:
        for optimizer in optimizers:
            if isinstance(optimizer, farstep.optim.RemoteOptimizer):
                optimizer.close()
    theirs, mine = map(torch.stack, at)
    kept = theirs.isfinite().all(0)
    return Distance(name, options, dtype, _spread(theirs, kept), _spread(mine, kept))


def _spread(found: Tensor, kept: Tensor) -> Spread:
    among = found[:, kept]
    rms, largest = among.square().mean().sqrt().item(), among.abs().max().item()
    return Spread(rms, largest, int((~found[-1].isfinite()).sum()))


def together(name: str, options: Options, dtype: torch.dtype) -> Distance:
    """Return the distances with all of `RATES`, each divided by its rate, as one."""
    found = [distance(name, {"lr": lr, **options}, dtype) for lr in RATES]
    theirs, mine = (
        Spread(
            (sum((each.rms / lr) ** 2 for each, lr in zip(spreads, RATES, strict=True)) / len(RATES)) ** 0.5,
            max(each.largest / lr for each, lr in zip(spreads, RATES, strict=True)),
            sum(each.lost for each in spreads),
        )
        for spreads in ([each.torch for each in found], [each.fused for each in found])
    )
    return Distance(name, options, dtype, theirs, mine, len(RATES))


def distances(
    names: Iterable[str], dtypes: Sequence[torch.dtype], steps: int, say: Callable[[str], None]
) -> Iterator[Distance]:
    """Compare some optimizers in some dtypes, with the defaults and with options that act on each other."""
    for name in names:
        say(name)
        for dtype in dtypes:
            for options in usual_options(name):
                yield distance(name, options, dtype, steps=steps)
            if (name, dtype) in LUCK:
                yield together(name, {"etas": (0.3, 1.5)}, dtype)


def render(found: Sequence[Distance]) -> str:
    """Return the Markdown of `docs/parity.md`."""
    rows = [
        [
            f"`{each.name}`",
            f"`{each.label}`",
            str(each.dtype).removeprefix("torch."),
            str(each.torch),
            str(each.fused),
            f"{each.ratio:.3f}" + (" **further**" if each.further else ""),
        ]
        for each in found
    ]
    return table(["optimizer", "options", "dtype", "torch, rms", "fused, rms", "ratio"], rows)
