"""L-BFGS as a session sees it: its options, its state, and what it takes. The steps are in `lbfgs_steps.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from farstep.errors import InvalidOption, TensorMismatch
from farstep.protocol.hyper import Hyper, in_range
from farstep_service.layout import Layout
from farstep_service.optimizers.line_search import check_evaluations
from farstep_service.optimizers.rule import Method

STRONG_WOLFE = "strong_wolfe"


@dataclass(frozen=True, kw_only=True)
class LBFGSHyper(Hyper):
    """Options of L-BFGS, with torch's names and defaults."""

    rule: ClassVar[str] = "LBFGS"

    lr: float = 1
    max_iter: int = 20
    max_eval: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    history_size: int = 100
    line_search_fn: str | None = None

    def check_ranges(self) -> None:
        """Refuse what torch's constructor refuses, in its words."""
        in_range(f"Invalid learning rate: {self.lr}", self.lr >= 0.0, field="lr")

    @property
    def evaluations(self) -> int:
        """Return after how many evaluations a step ends."""
        return self.max_iter * 5 // 4 if self.max_eval is None else self.max_eval


FIELDS = (
    "func_evals",
    "n_iter",
    "d",
    "t",
    "old_dirs",
    "old_stps",
    "ro",
    "H_diag",
    "prev_flat_grad",
    "prev_loss",
    "al",
)
"""What a step leaves to the next, under torch's names."""


MOST_PAIRS = 100
"""Pairs that a state may bring into a session that keeps fewer: as many as torch keeps by default."""


def most_pairs(hyper: LBFGSHyper) -> int:
    """Return how many pairs a state may have."""
    return max(MOST_PAIRS, hyper.history_size)


def check_search(hyper: LBFGSHyper) -> None:
    """Refuse a line search that there is not, in the words in which torch's step does.

    Raises:
        InvalidOption: it has another name than torch's only one.
    """
    if hyper.line_search_fn not in (None, STRONG_WOLFE):
        raise InvalidOption("only 'strong_wolfe' is supported", field="line_search_fn")


def check_history(hyper: LBFGSHyper) -> None:
    """Refuse a history of no pair, where torch ends in an IndexError.

    Raises:
        InvalidOption: it has no place for a pair.
    """
    if hyper.history_size < 1:
        raise InvalidOption(
            f"history_size={hyper.history_size} has no place for a pair.",
            remedy="Use at least 1.",
            field="history_size",
        )


class LBFGS(Method[LBFGSHyper]):
    """The optimizer above, as a session sees it: all parameters are one vector, and the state is the first one's."""

    name = "LBFGS"
    tensor_fields = FIELDS
    segment_fields = ()
    special = MappingProxyType(dict.fromkeys(FIELDS, "free"))
    hyper = LBFGSHyper

    def state_bytes(self, layout: Layout, groups: Sequence[LBFGSHyper]) -> int:
        """Return the bytes of all pairs and a few vectors more."""
        return (2 * most_pairs(groups[0]) + 2) * layout.nbytes + 32 * most_pairs(groups[0])

    def step_bytes(self, layout: Layout, groups: Sequence[LBFGSHyper]) -> int:
        """Return the bytes of a full history: each direction goes through all of it."""
        return (2 * groups[0].history_size + 2) * layout.nbytes

    def check_layout(self, layout: Layout) -> None:
        """Refuse more than one group in torch's words, and what is no vector of one dtype."""
        if layout.groups > 1:
            raise InvalidOption("LBFGS doesn't support per-parameter options (parameter groups)", field="groups")
        if len(layout.sizes) > 1:
            raise TensorMismatch(
                f"LBFGS keeps all parameters in one vector, and they are of {' and '.join(sorted(layout.sizes))}.",
                field="segments",
                remedy="Give it parameters of one dtype; torch would compute in the wider one.",
            )
        if not any(segment.length for segment in layout.segments):
            raise TensorMismatch("LBFGS has no element to optimize.", field="segments")

    def check_step(self, hyper: LBFGSHyper) -> None:
        """Refuse options with which torch's step fails as soon as it searches, or keeps a pair."""
        check_search(hyper)
        check_history(hyper)
        if hyper.line_search_fn is not None and hyper.max_iter > 0:
            check_evaluations(hyper.evaluations - 1)

    def check_sparse(self, hyper: LBFGSHyper) -> None:
        """Take every sparse gradient; it is made dense, as in torch."""
