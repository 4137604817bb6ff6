"""L-BFGS: descent along −H·g, where H is built from the last steps s and the changes y of the gradient over them.

    y ← g − g_prev;  s ← t·d;  kept with ρ = 1/(yᵀs) if yᵀs > 1e-10, at most history_size of them
    q ← −g;   newest pair first:  α_i ← ρ_i·s_iᵀq;  q ← q − α_i·y_i
    d ← q·(yᵀs / yᵀy) of the newest pair;   oldest pair first:  d ← d + (α_i − ρ_i·y_iᵀd)·s_i
    p ← p + t·d,  t = min(1, 1/‖g‖₁)·lr in the first iteration, lr later, or what the line search finds

One step of torch asks for the objective up to `max_eval` times. Here it is turned inside out: a step is a record that
waits for an evaluation, `Turn`s lead from one to the next, and the caller evaluates at `Turn.x`.

    begin(memory, ...) ──► Turn(waiting) ──► resume(waiting, ...) ──► Turn(waiting) ──► ... ──► Turn(None)
                                 memory stays what it was before the step                  memory of the step

Records and their tensors are never changed in place, so an evaluation that failed can be repeated, and a step that was
given up leaves nothing behind. torch leaves its counters advanced then.

Source: Nocedal, "Updating Quasi-Newton Matrices with Limited Storage", Mathematics of Computation 35 (1980); names and
order of operations as in torch 2.13, `torch/optim/lbfgs.py`. Where torch ends in an IndexError, some time after
`history_size` was lowered, the oldest pairs go. The vectors hold all parameters one after the other, complex ones as
pairs of reals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farstep_service.optimizers.lbfgs import FIELDS, LBFGSHyper, check_history, check_search
from farstep_service.optimizers.line_search import Number, Search, smaller


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What a step leaves to the next, under torch's names; None before there is any.

    Attributes:
        func_evals, n_iter: evaluations and iterations so far.
        d, t: the last direction, and how far the last iteration went along it.
        old_dirs, old_stps, ro: changes of the gradient, the steps that made them, and one over their products.
        H_diag: the scale of the first approximation of the inverse Hessian; 1 before there is a pair.
        prev_flat_grad, prev_loss: the objective before the last iteration.
        al: the factors of the last direction, and None for each pair that there never was.
    """

    func_evals: int = 0
    n_iter: int = 0
    d: Tensor | None = None
    t: Number | None = None
    old_dirs: tuple[Tensor, ...] | None = None
    old_stps: tuple[Tensor, ...] | None = None
    ro: tuple[Tensor, ...] | None = None
    H_diag: Number | None = None
    prev_flat_grad: Tensor | None = None
    prev_loss: float | None = None
    al: tuple[Tensor | None, ...] | None = None

    def tensors(self) -> list[Tensor]:
        """Return every tensor in it."""
        values = [getattr(self, name) for name in FIELDS]
        flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
        return [each for each in flat if isinstance(each, Tensor)]


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A step that waits for the objective at the parameters its `Turn` gave.

    Attributes:
        memory: what the step has made of its memory so far.
        hyper: the options it began with.
        evaluations: how often the objective was evaluated before this iteration's search.
        iterations: iterations it has begun.
        x: the parameters at the beginning of the search.
        search: the search, None without one.
    """

    memory: Memory
    hyper: LBFGSHyper
    evaluations: int
    iterations: int
    x: Tensor
    search: Search | None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What follows an evaluation.

    Attributes:
        memory: what the next step begins with, if this one is over.
        x: the new parameters, None if they stay.
        waiting: the step that goes on with the objective at `x`, None if it is over.
    """

    memory: Memory
    x: Tensor | None
    waiting: Waiting | None


def begin(memory: Memory, hyper: LBFGSHyper, loss: float, flat_grad: Tensor, x: Tensor) -> Turn:
    """Begin a step with the objective at the present parameters `x`.

    Args:
        memory: what the step before left.
        hyper: options; they hold until the step is over.
        loss: the objective.
        flat_grad: its gradient, a contiguous vector in memory of its own, like `x`.
        x: the parameters.

    Raises:
        InvalidOption: options with which torch fails in a step.
    """
    memory = replace(memory, func_evals=memory.func_evals + 1)
    if flat_grad.abs().max() <= hyper.tolerance_grad:
        return Turn(memory, None, None)
    return _iterate(memory, hyper, 1, 0, loss, flat_grad, x, moved=False)


def resume(waiting: Waiting, loss: float, flat_grad: Tensor, x: Tensor) -> Turn:
    """Go on with the objective at `x`; see `begin`.

    Args:
        x: the parameters the objective was evaluated at. A search goes back to where it began; without one, what has
            been done to them since counts.

    Raises:
        NonFinite: a loss with which torch's line search fails.
    """
    memory, hyper, search = waiting.memory, waiting.hyper, waiting.search
    if search is None:
        return _conclude(waiting, 1, loss, flat_grad, x, moved=False)
    after = search.advance(loss, flat_grad)
    if isinstance(after, Search):
        trial = waiting.x.add(search.d, alpha=_plain(after.t))
        return Turn(memory, trial, replace(waiting, search=after))
    point = after.point
    memory = replace(memory, t=point.t)
    x = waiting.x.add(search.d, alpha=_plain(point.t))
    waiting = replace(waiting, memory=memory, hyper=hyper)
    return _conclude(waiting, after.evaluations, point.f, point.g, x, moved=True)


def _conclude(waiting: Waiting, evaluated: int, loss: float, flat_grad: Tensor, x: Tensor, *, moved: bool) -> Turn:
    """End an iteration whose step length is known: the step is over, or the next iteration begins."""
    memory, hyper = waiting.memory, waiting.hyper
    memory = replace(memory, func_evals=memory.func_evals + evaluated)
    evaluations = waiting.evaluations + evaluated
    assert memory.d is not None
    assert memory.t is not None
    assert memory.prev_loss is not None
    over = (
        waiting.iterations == hyper.max_iter
        or evaluations >= hyper.evaluations
        or flat_grad.abs().max() <= hyper.tolerance_grad
        or memory.d.mul(memory.t).abs().max() <= hyper.tolerance_change
        or abs(loss - memory.prev_loss) < hyper.tolerance_change
    )
    if over:
        return Turn(memory, x if moved else None, None)
    return _iterate(memory, hyper, evaluations, waiting.iterations, loss, flat_grad, x, moved=moved)


def _iterate(
    memory: Memory,
    hyper: LBFGSHyper,
    evaluations: int,
    iterations: int,
    loss: float,
    flat_grad: Tensor,
    x: Tensor,
    *,
    moved: bool,
) -> Turn:
    """Begin an iteration: choose a direction and move along it."""
    stay = x if moved else None
    if iterations >= hyper.max_iter:
        return Turn(memory, stay, None)
    iterations += 1
    memory = replace(memory, n_iter=memory.n_iter + 1)
    memory = _first_direction(memory, flat_grad) if memory.n_iter == 1 else _direction(memory, hyper, flat_grad)
    t: Number = hyper.lr
    if memory.n_iter == 1:
        t = smaller(1.0, 1.0 / flat_grad.abs().sum()) * hyper.lr
    memory = replace(memory, prev_flat_grad=flat_grad, prev_loss=loss, t=t)
    d = memory.d
    assert d is not None
    gtd = flat_grad.dot(d)
    if gtd > -hyper.tolerance_change:
        return Turn(memory, stay, None)
    search = None
    if hyper.line_search_fn is not None:
        check_search(hyper)
        left = hyper.evaluations - evaluations
        search = Search.begin(t, d, loss, flat_grad, gtd, tolerance_change=hyper.tolerance_change, max_ls=left)
    trial = x.add(d, alpha=_plain(t))
    waiting = Waiting(memory, hyper, evaluations, iterations, x, search)
    if search is None and iterations == hyper.max_iter:
        return Turn(memory, trial, None)
    return Turn(memory, trial, waiting)


def _first_direction(memory: Memory, flat_grad: Tensor) -> Memory:
    return replace(memory, d=flat_grad.neg(), old_dirs=(), old_stps=(), ro=(), H_diag=1)


def _direction(memory: Memory, hyper: LBFGSHyper, flat_grad: Tensor) -> Memory:
    """Return memory with the pair of the last iteration and the direction that follows."""
    old_dirs, old_stps, ro = memory.old_dirs or (), memory.old_stps or (), memory.ro or ()
    H_diag = memory.H_diag
    assert memory.prev_flat_grad is not None
    assert memory.d is not None
    assert memory.t is not None
    assert H_diag is not None
    y = flat_grad.sub(memory.prev_flat_grad)
    s = memory.d.mul(memory.t)
    ys = y.dot(s)
    if ys > 1e-10:
        check_history(hyper)
        kept = _kept(len(old_dirs), memory, hyper)
        old_dirs, old_stps, ro = (*old_dirs[kept], y), (*old_stps[kept], s), (*ro[kept], 1.0 / ys)
        H_diag = ys / y.dot(y)
    d, factors = _times_inverse_hessian(flat_grad, old_dirs, old_stps, ro, H_diag)
    before = (None,) * hyper.history_size if memory.al is None else memory.al
    al = (*factors, *before[len(factors) :])
    return replace(memory, d=d, old_dirs=old_dirs, old_stps=old_stps, ro=ro, H_diag=H_diag, al=al)


def _kept(pairs: int, memory: Memory, hyper: LBFGSHyper) -> slice:
    """Return which of the pairs stay when one is added.

    torch lets the oldest go if there are exactly `history_size`. If that was lowered below the pairs that there are,
    they stay and grow in number, until there is no factor for one more, and torch fails.
    """
    if pairs == hyper.history_size:
        return slice(1, None)
    factors = 0 if memory.al is None else len(memory.al)
    fits = pairs < max(factors, hyper.history_size)
    return slice(None) if fits else slice(pairs + 1 - hyper.history_size, None)


def _times_inverse_hessian(
    flat_grad: Tensor, old_dirs: Sequence[Tensor], old_stps: Sequence[Tensor], ro: Sequence[Tensor], H_diag: Number
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return −H·g by the two loops of the source, and their factors."""
    al: list[Tensor] = []
    q = flat_grad.neg()
    for y, s, r in zip(reversed(old_dirs), reversed(old_stps), reversed(ro), strict=True):
        al.append(s.dot(q) * r)
        q.add_(y, alpha=_plain(-al[-1]))
    al.reverse()
    d = torch.mul(q, H_diag)
    for y, s, r, factor in zip(old_dirs, old_stps, ro, al, strict=True):
        d.add_(s, alpha=_plain(factor - y.dot(d) * r))
    return d, tuple(al)


def _plain(number: Number) -> float:
    """Return a number as an operation takes its scalars: torch reads a 0-dim tensor there in the same way."""
    return float(number)
