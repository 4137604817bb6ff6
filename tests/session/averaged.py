"""torch's average of parameters, and a session's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from farstep_service.session import Session
from tests.session.writers import Twin

DECAY = 0.9


def averaged(model: nn.Module) -> AveragedModel:
    """Return torch's average of a model."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]


class Averaged(Twin):
    """torch's optimizer, and torch's average of its parameters."""

    def __init__(self, start: Sequence[Tensor], optimizer: str = "Adagrad", **options: Any) -> None:
        super().__init__(start, optimizer, **options)
        self._model = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in self.parameters)
        self._averages = averaged(self._model)

    def step(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        super().step(gradients)
        self._averages.update_parameters(self._model)
        return self.parameters

    @property
    def averages(self) -> list[Tensor]:
        return list(self._averages.parameters())


def averages(session: Session) -> list[Tensor]:
    contents, _ = session.copy(("ema",))
    return [contents.elements["ema"].segment(index) for index in range(len(session.plan.layout.segments))]
