"""The link to a session in the caller's own process: no server, no socket, no copy of the parameters.

The store works on the optimizer's own tensors, on any device, and the same session code applies the same rules. With
one worker and no network, a step needs no name and no receipt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import final

import torch
from torch import Tensor

from farstep.errors import NonFinite, invalid_option
from farstep.heartbeat import Heartbeat
from farstep.link import Link, Options, Parameter, SessionSpec, Start, in_ordinary_memory
from farstep.protocol.consistency import Consistency, to_options
from farstep.protocol.fields import PRESENT, FieldKind, State
from farstep.protocol.hyper import Hyper
from farstep.protocol.memory import TORCH_DTYPES
from farstep.protocol.messages import Evaluation
from farstep.protocol.receipt import StepReport
from farstep.settings import WorkerSettings
from farstep_service.coordinator import NoStep
from farstep_service.embedded.states import contents_of, states_of
from farstep_service.kernels import Kernels
from farstep_service.layout import SegmentSpec
from farstep_service.plan import KernelMode, Plan
from farstep_service.store import BorrowedBuffers, Gradients
from farstep_service.tensors import Steps, state_of
from farstep_service.tensors.contents import Contents


@cache
def _kernels(mode: KernelMode) -> Kernels:
    return Kernels(mode)


@final
class EmbeddedLink(Link):
    """A link to a session of this process.

    Raises:
        InvalidOption: the consistency mode waits for other workers, or the parameters are on several devices.
    """

    @in_ordinary_memory
    def __init__(
        self, spec: SessionSpec, parameters: Sequence[Tensor], settings: WorkerSettings, start: Start | None = None
    ) -> None:
        mode = settings.consistency
        _check_alone(mode)
        self._spec = spec
        self._worker = settings.worker
        self._parameters = list(parameters)
        self._device = _one_device(parameters)
        self._plan = Plan.build(
            name=spec.name,
            optimizer=spec.optimizer,
            groups=spec.groups,
            segments=[SegmentSpec(p.name, p.shape, p.dtype, p.group) for p in spec.parameters],
            consistency=to_options(mode),
            nonfinite=spec.nonfinite,
            kernel=spec.kernel,
            policy=spec.policies.to_options(),
        )
        layout, rule = self._plan.layout, self._plan.rule
        self._fields: dict[str, FieldKind] = rule.kinds
        self._gradients = BorrowedBuffers(layout, device=self._device)
        self._begin(start or Start())

    def _begin(self, start: Start) -> None:
        kernels = _kernels(self._plan.kernel)
        contents = None if start.state is None else contents_of(self._plan, dict(enumerate(start.state(self._fields))))
        state = state_of(self._plan, kernels=kernels, device=self._device)
        borrowed = BorrowedBuffers(self._plan.layout, self._parameters, device=self._device)
        state.adopt(borrowed, contents, start.version)
        self._borrowed = borrowed
        self._state = state
        self._steps = Steps(state)

    @property
    def version(self) -> int:
        return self._state.version

    @property
    def durability(self) -> str:
        return self._plan.level

    @property
    def fields(self) -> Mapping[str, FieldKind]:
        return self._fields

    @property
    def has_initial_state(self) -> bool:
        return self._plan.rule.has_initial_state

    @in_ordinary_memory
    def options_in_force(self) -> list[Options]:
        return [group.to_options() for group in self._state.groups]

    def push(
        self,
        gradients: Sequence[Tensor | None],
        groups: Mapping[int, Options],
        evaluation: Evaluation | None = None,
    ) -> StepReport:
        inside = torch.is_inference_mode_enabled() and any(p.is_inference() for p in self._parameters)
        push = self._push if inside else self._push_in_ordinary_memory  # those can be written to only inside
        try:
            return push(gradients, groups, evaluation)
        finally:
            if not self._state.pending:  # otherwise they are needed to finish the step
                self._gradients.release()

    def _push(
        self, gradients: Sequence[Tensor | None], groups: Mapping[int, Options], evaluation: Evaluation | None
    ) -> StepReport:
        began = time.perf_counter()
        self._state.check_evaluation(evaluation)
        self._state.check_base(self.version, evaluation)
        self._steps.finish()
        changed = self._state.changed(groups)
        if self._plan.nonfinite != "allow" and (nonfinite := self._nonfinite(gradients, evaluation)):
            return self._no_step(NoStep("nonfinite", nonfinite), changed)
        taken = self._steps.take(self._lent(gradients), (self._worker,), changed, evaluation, checked=True)
        if isinstance(taken, NoStep):
            return self._no_step(taken)
        ended = time.perf_counter()
        return StepReport(
            version=taken.version,
            contributors=taken.contributors,
            kernel=taken.kernel,
            again=taken.again,
            facts=dict(taken.facts),
            durability=self._plan.level,
            seconds={"total": ended - began, "kernel": ended - began},
        )

    _push_in_ordinary_memory = in_ordinary_memory(_push)

    def skip(self, groups: Mapping[int, Options]) -> StepReport:
        return self._no_step(NoStep("skipped"), self._state.changed(groups))

    def _no_step(self, no: NoStep, changed: Mapping[int, Hyper] | None = None) -> StepReport:
        """Return the report of gradients that make no step; their options take effect."""
        self._state.set_groups(changed or {})
        return StepReport(
            version=self.version, applied=False, reason=no.reason, detail=no.detail, durability=self._plan.level
        )

    def _lent(self, gradients: Sequence[Tensor | None]) -> Gradients:
        sparse: dict[int, tuple[Tensor, Tensor]] = {}
        missing, dense = False, list(gradients)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                missing = True
            elif gradient.is_sparse:
                sparse[index] = (gradient._indices(), gradient._values())
                dense[index], missing = None, True
        self._gradients.lend(dense)
        present = [each is not None for each in dense] if missing else None
        return Gradients(self._gradients, present, sparse, borrowed=True)

    def _nonfinite(self, gradients: Sequence[Tensor | None], evaluation: Evaluation | None) -> str:
        """Return which part of a push holds NaN or Inf, as a sentence; "" for none.

        Raises:
            NonFinite: the session refuses it.
        """
        if evaluation is not None and not math.isfinite(evaluation.loss):
            raise NonFinite(
                f"The loss is {evaluation.loss}; the step was refused.",
                remedy="Lower the learning rate; nonfinite='allow' takes such a loss.",
                field="loss",
                side="client",
            )
        for parameter, gradient in zip(self._spec.parameters, gradients, strict=True):
            if gradient is None:
                continue
            values = gradient._values() if gradient.is_sparse else gradient
            if bool(torch.isfinite(values).all()):
                continue
            if self._plan.nonfinite == "skip":
                return f"The gradient of {parameter.name!r} from worker {self._worker!r} holds NaN or Inf."
            raise NonFinite(
                f"The gradient of {parameter.name!r} holds NaN or Inf; the step was refused.",
                remedy="Skip the step or lower the loss scale; nonfinite='allow' takes such gradients.",
                field=parameter.name,
                side="client",
            )
        return ""

    def edited(self, addresses: list[int]) -> list[int]:
        return []

    @in_ordinary_memory
    def stand_in(self, index: int) -> Tensor | None:
        if self._plan.policies.views:  # its step reads the value of every parameter
            return None
        segment = self._plan.layout.segments[index]
        return torch.zeros((), dtype=TORCH_DTYPES[segment.dtype], device=self._device).expand(segment.shape)

    @in_ordinary_memory
    def rebind(self, parameters: Sequence[Tensor]) -> bool:
        if any(p.device != self._device for p in parameters):
            return False
        self._state.finish()
        self._borrowed.lend(parameters)
        self._parameters = list(parameters)
        return True

    def pull(self) -> int:
        return self.version

    @in_ordinary_memory
    def write(self, parameters: Sequence[int] = (), state: Mapping[int, State | None] | None = None) -> int:
        if state is not None:
            self._state.write(contents_of(self._plan, state))
        return self.version

    @in_ordinary_memory
    def append(self, options: Options, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> bool:
        everything = [*self._parameters, *tensors]
        _one_device(everything)
        plan = self._plan.append(options, [SegmentSpec(p.name, p.shape, p.dtype, p.group) for p in parameters])
        gradients = BorrowedBuffers(plan.layout, device=self._device)
        borrowed = BorrowedBuffers(plan.layout, everything, device=self._device)
        self._state.append(plan, borrowed)
        self._plan, self._gradients, self._parameters, self._borrowed = plan, gradients, everything, borrowed
        self._spec = replace(
            self._spec, groups=(*self._spec.groups, options), parameters=(*self._spec.parameters, *parameters)
        )
        return True

    def heartbeat(self, *, once: bool = False) -> Heartbeat:
        return Heartbeat(
            worker=self._worker,
            epoch=1,
            lapsed=False,
            lease_s=math.inf,
            live=1,
            version=self.version,
            consistency=self.consistency,
        )

    @property
    def consistency(self) -> Consistency:
        return self._plan.consistency

    def set_consistency(self, mode: Consistency) -> None:
        _check_alone(mode)
        plan = replace(self._plan, consistency=mode)
        plan.check_consistency()
        self._plan = self._state.plan = plan
        self._spec = replace(self._spec, consistency=mode)

    @in_ordinary_memory
    def stateful(self) -> tuple[int, list[bool]]:
        return self.version, [each is not None for each in self._state.copy((PRESENT,)).has() or ()]

    @in_ordinary_memory
    def read_state(self, indices: Sequence[int]) -> list[State | None]:
        contents = self._state.copy((*self._fields, PRESENT), indices)
        return states_of(contents, self._plan, indices, self._device)

    @in_ordinary_memory
    def read_view(self, view: str) -> list[Tensor]:
        contents = self._state.copy((view,))
        buffers = contents.elements[view]
        return [buffers.segment(i).to(self._device, copy=True) for i in range(len(self._parameters))]

    @in_ordinary_memory
    def write_view(self, view: str, values: Sequence[Tensor]) -> None:
        layout = self._plan.layout
        every = range(len(layout.segments))
        contents = Contents(layout, self._plan.rule, (view,), every, views=self._plan.policies.views)
        contents.allocate()
        for index in every:
            contents.elements[view].segment(index).copy_(values[index])
        self._state.write(contents)

    @in_ordinary_memory
    def rejoin(self, start: Start) -> bool:
        self._begin(start)
        return True

    def close(self) -> None:
        """Do nothing: the session ends with the optimizer."""


def _check_alone(mode: Consistency) -> None:
    """Refuse a mode in which a single worker would wait forever."""
    if mode.places not in (1, None):
        raise invalid_option(
            f"A {mode.mode} session of {mode.places} workers needs a server, and none is named.",
            remedy="Start one with `farstep serve` and give server=... or set FARSTEP_SERVER.",
            field="consistency",
        )


def _one_device(parameters: Sequence[Tensor]) -> torch.device:
    """Return the device of all parameters."""
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise invalid_option(
            f"The parameters are on {' and '.join(devices)}; an embedded session works on one device.",
            remedy="Use one optimizer per device, or a server.",
        )
    return torch.device(devices[0] if devices else "cpu")


def open_link(
    spec: SessionSpec, parameters: Sequence[Tensor], settings: WorkerSettings, start: Start | None = None
) -> EmbeddedLink:
    """Open an embedded session: the entry point `farstep.hosts:embedded`."""
    return EmbeddedLink(spec, parameters, settings, start)
