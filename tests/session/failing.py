"""Kernels that fail in the middle of a step, at the block that a test says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from farstep_service.kernels.kernel import Kernel, KernelSource
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.optimizers.rule import AnyRule, ElementwiseRule, KernelName, KernelSignature, Scalar, StateTensors


class Fault:
    """Decides which block of a step fails: the k-th, or none."""

    def __init__(self) -> None:
        self.at: int | None = None

    def pass_block(self) -> None:
        if self.at is not None:
            self.at -= 1
            if self.at < 0:
                raise RuntimeError("the device is on fire")


class _Failing(ElementwiseRule[Any]):
    """A rule whose arithmetic fails where it is told to."""

    def __init__(self, rule: AnyRule, fault: Fault) -> None:
        self._rule, self._fault = rule, fault

    def scalars(self, counts: Any, hyper: Any) -> tuple[float, ...]:
        return self._rule.scalars(counts, hyper)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        self._fault.pass_block()
        return self._rule.update(p, g, state, scalars)


class FailingKernels(KernelSource):
    """Reference kernels in blocks of four elements, which fail where `fault` says; those that finish a step do not.

    Args:
        finish_fails: how many attempts to finish a step fail, too.
    """

    def __init__(self, finish_fails: int = 0) -> None:
        self.fault = Fault()
        self.finish_fails = finish_fails

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Nothing has to be built."""

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        return ReferenceKernel(_Failing(rule, self.fault), block=4)

    def reference(self, rule: AnyRule) -> Kernel:
        if self.finish_fails:
            self.finish_fails -= 1
            again = Fault()
            again.at = 0
            return ReferenceKernel(_Failing(rule, again), block=4)
        return ReferenceKernel(rule, block=4)
