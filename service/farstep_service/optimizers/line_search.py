"""A line search for the strong Wolfe conditions, turned inside out: a record that waits for the objective at `t`.

    φ(t)  = f(x + t·d),   φ'(t) = ∇f(x + t·d)·d
    φ(t)  ≤ φ(0) + c₁·t·φ'(0)      it descends enough      (c₁ = 1e-4)
    |φ'(t)| ≤ −c₂·φ'(0)            it has become flat      (c₂ = 0.9)

    bracketing    t grows until a point satisfies both, or an interval is known to hold one        no bracket yet
    zooming       the interval shrinks around its lower end, by cubic interpolation                a bracket

`Search.advance` takes what the objective is at `t` and returns the search that follows, or the point found. Nothing is
changed in place, so an evaluation that failed can be repeated.

Source: Nocedal, Wright, "Numerical Optimization" (2006), algorithms 3.5 and 3.6; names and order of operations as in
torch 2.13, `torch/optim/lbfgs.py::_strong_wolfe`. Step lengths are Python floats until an interpolation makes them
0-dim tensors, as there, since that decides how they are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from farstep.errors import InvalidOption, NonFinite

Number = float | Tensor
"""A Python number or a 0-dim tensor."""

C1 = 1e-4
C2 = 0.9


class Point(NamedTuple):
    """The objective at a step length.

    Attributes:
        t: the step length.
        f: the objective there.
        g: its gradient.
        gtd: its slope along the direction.
    """

    t: Number
    f: float
    g: Tensor
    gtd: Tensor


class Found(NamedTuple):
    """The end of a search: its best point, and how often the objective was evaluated."""

    point: Point
    evaluations: int


def check_evaluations(left: int) -> None:
    """Refuse a search that even the first evaluation is too much for, where torch ends in an UnboundLocalError.

    Raises:
        InvalidOption: that is so.
    """
    if left < 0:
        raise InvalidOption(
            "max_eval leaves no evaluation to the line search.", remedy="Use at least 1.", field="max_eval"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """A search that waits for the objective at `t`.

    Attributes:
        start: the objective at 0.
        d, d_norm: the direction, and its largest element.
        tolerance_change: the smallest bracket, as the largest change of a parameter in it.
        max_ls: evaluations after the first, at most.
        t: the step length that is tried.
        previous: while bracketing, the point before it.
        evaluations: how often the objective has been evaluated.
        bracket: once there is one, its two ends; the order is that in which they were found.
        low: which end is the lower one.
        stalled: whether the last trial was close to an end of the bracket.
    """

    start: Point
    d: Tensor
    d_norm: Tensor
    tolerance_change: float
    max_ls: int
    t: Number
    previous: Point
    evaluations: int = 0
    bracket: tuple[Point, ...] = ()
    low: int = 0
    stalled: bool = False

    @classmethod
    def begin(
        cls, t: Number, d: Tensor, f: float, g: Tensor, gtd: Tensor, *, tolerance_change: float, max_ls: int
    ) -> Search:
        """Return a search along `d` whose first trial is `t`.

        Raises:
            InvalidOption: there is no evaluation left for it.
        """
        check_evaluations(max_ls)
        start = Point(0, f, g, gtd)
        return cls(start, d, d.abs().max(), tolerance_change, max_ls, t, start)

    def advance(self, f: float, g: Tensor) -> Search | Found:
        """Return what follows an evaluation at `t`."""
        search = replace(self, evaluations=self.evaluations + 1)
        new = Point(self.t, f, g, g.dot(self.d))
        return search._narrow(new) if self.bracket else search._widen(new)

    @property
    def _iterations(self) -> int:
        return self.evaluations - 1

    def _too_high(self, new: Point) -> bool:
        return bool(new.f > (self.start.f + C1 * new.t * self.start.gtd))

    def _is_flat(self, new: Point) -> bool:
        return bool(abs(new.gtd) <= -C2 * self.start.gtd)

    # -- bracketing -------------------------------------------------------------------------------------------------

    def _widen(self, new: Point) -> Search | Found:
        """Bracket a point that satisfies the conditions, or go further."""
        previous = self.previous
        if self._iterations >= self.max_ls:
            return self._between(self.start, new)
        if self._too_high(new) or (self._iterations > 1 and new.f >= previous.f):
            return self._between(previous, new)
        if self._is_flat(new):
            if new.f != new.f:
                raise NonFinite("The line search met a loss that is NaN.", remedy="Lower the learning rate.")
            return Found(new, self.evaluations)
        if new.gtd >= 0:
            return self._between(previous, new)
        bounds = (new.t + 0.01 * (new.t - previous.t), new.t * 10)
        return replace(self, t=_cubic_interpolate(previous, new, bounds), previous=new)

    def _between(self, first: Point, second: Point) -> Search | Found:
        return replace(self, bracket=(first, second), low=_lower(first, second))._zoom()

    # -- zooming ----------------------------------------------------------------------------------------------------

    def _narrow(self, new: Point) -> Search | Found:
        """Put a point in the place of one end of the bracket."""
        ends = list(self.bracket)
        low, high = self.low, 1 - self.low
        if self._too_high(new) or new.f >= ends[low].f:
            ends[high] = new
            return replace(self, bracket=tuple(ends), low=_lower(*ends))._zoom()
        flat = self._is_flat(new)
        width: Number = ends[high].t - ends[low].t
        if not flat and new.gtd * width >= 0:
            ends[high] = ends[low]
        ends[low] = new
        return Found(new, self.evaluations) if flat else replace(self, bracket=tuple(ends))._zoom()

    def _zoom(self) -> Search | Found:
        """Choose the next trial inside the bracket, or end."""
        first, second = self.bracket
        if self._iterations >= self.max_ls or _size(second.t - first.t) * self.d_norm < self.tolerance_change:
            return Found(self.bracket[self.low], self.evaluations)
        lowest, highest, t = smaller(first.t, second.t), larger(first.t, second.t), _cubic_interpolate(first, second)
        margin: Number = 0.1 * (highest - lowest)
        stalled = bool(smaller(highest - t, t - lowest) < margin)
        if stalled and (self.stalled or t >= highest or t <= lowest):
            t = highest - margin if _size(t - highest) < _size(t - lowest) else lowest + margin
            stalled = False
        return replace(self, t=t, stalled=stalled)


def smaller(a: Number, b: Number) -> Number:
    """Return what Python's `min` returns, NaN included."""
    return b if b < a else a


def larger(a: Number, b: Number) -> Number:
    """Return what Python's `max` returns, NaN included."""
    return b if b > a else a


def _size(number: Number) -> Number:
    return number.abs() if isinstance(number, Tensor) else abs(number)


def _lower(first: Point, second: Point) -> int:
    return 0 if first.f <= second.f else 1


def _cubic_interpolate(one: Point, two: Point, bounds: tuple[Number, Number] | None = None) -> Number:
    """Return where the cubic through two points and slopes is lowest, within bounds: those points if none are given."""
    (x1, f1, _, g1), (x2, f2, _, g2) = one, two
    lower, upper = bounds if bounds is not None else ((x1, x2) if x1 <= x2 else (x2, x1))
    d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2)
    d2_square = d1**2 - g1 * g2
    if not d2_square >= 0:
        return (lower + upper) / 2.0
    d2 = d2_square.sqrt()
    if x1 <= x2:
        lowest = x2 - (x2 - x1) * ((g2 + d2 - d1) / (g2 - g1 + 2 * d2))
    else:
        lowest = x1 - (x1 - x2) * ((g1 + d2 - d1) / (g1 - g2 + 2 * d2))
    return smaller(larger(lowest, lower), upper)
