"""`farstep.optim.LBFGS`: torch's signature, and the options of a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from farstep.errors import StateRolledBack
from farstep.optim.base import RemoteOptimizer
from farstep.optim.namesakes import explaining_namesake
from farstep.optim.options import check_parameters, check_types
from farstep.protocol.messages import Evaluation
from farstep.protocol.receipt import StepReport
from farstep.settings import RemoteOptions, WorkerSettings


class LBFGS(RemoteOptimizer):
    """L-BFGS: steps along the gradient times an inverse Hessian that is built from the last steps.

    The arguments are those of `torch.optim.LBFGS`, which checks them; the rest are `farstep.RemoteOptions`. A step is
    several exchanges, one for each evaluation of the closure; `version` counts them. All parameters are of one dtype.
    """

    torch_class = torch.optim.LBFGS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        **remote: Unpack[RemoteOptions],
    ) -> None:
        options = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        super().__init__(params, options, remote)

    def _overlaps(self, settings: WorkerSettings) -> bool:
        return False  # a push says in its head what the closure has returned

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super()._check_groups(groups)
        check_parameters(self.torch_class, self.param_groups, self.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]  # as torch's: the closure is needed
        """Perform one optimization step: evaluate the closure as often as the session asks, and update the parameters.

        An error in the closure ends the step: the parameters stay where the closure was to evaluate them, and the next
        step begins there.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: torch's own, for an unknown line search.
            FarstepError: the session refused the step, or `Unavailable`: no answer came within `timeout_s`. The
                parameters are as before that evaluation.
        """
        self._member()
        evaluate = torch.enable_grad()(closure)
        first = evaluate()
        if self.param_groups[0]["line_search_fn"] not in (None, "strong_wolfe"):
            raise RuntimeError("only 'strong_wolfe' is supported")
        report = self._push(Evaluation(float(first)))
        while report.again:
            report = self._push(Evaluation(float(evaluate()), continues=True))
        self.last_step = report
        return first

    def _push(self, evaluation: Evaluation) -> StepReport:
        """Send edits of the closure and one evaluation; receive the parameters of the next one."""
        member = self._member()
        check_types(self.torch_class, self.param_groups)
        with member.writing(), explaining_namesake(member.settings, member):
            try:
                self._settle(member)
                member.prepare()
                return member.push(self._options(), evaluation=evaluation)
            except StateRolledBack as exc:
                return self._accepted(member, exc)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the constructor's group, the only one.

        Raises:
            ValueError: torch's own, for a second group; torch itself adds it and refuses the next step.
        """
        if getattr(self, "_membership", None) is not None:
            raise ValueError("LBFGS doesn't support per-parameter options (parameter groups)")
        super().add_param_group(param_group)
