"""The interface between the store, which has the memory, and the kernels, which run a rule over it.

    Call           the tensors and numbers of one application of a rule
    Progress       how far a list of calls has come: it can be stopped anywhere and continued
    Kernel         carries a list of calls out                                        kernels/reference.py, fused.py
    KernelSource   chooses the kernel of a step                                       kernels/kernels.py

A kernel computes the new values of a call, a `Write` each, and then commits them. A `Position` is a point between two
commits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from farstep.protocol.receipt import Ran
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature, StateTensors


class Call(NamedTuple):
    """One application of a rule to a stretch of memory.

    Attributes:
        p: parameters before the step: flat and real for an elementwise rule, one parameter in its own shape for others.
        g: gradients, like `p`, possibly in 16 bits: the rule gets them in the dtype of `p`.
        state: the tensor fields in use, changed in place.
        out: the target of the new parameters; may be `p` itself.
        scalars: the numbers of this step.
        copy: a second target, possibly in another dtype; may be `g` itself if it has that dtype.
        pairs: whether these are pairs of reals that the rule needs as complex numbers.
    """

    p: Tensor
    g: Tensor
    state: StateTensors
    out: Tensor
    scalars: tuple[float, ...]
    copy: Tensor | None = None
    pairs: bool = False


def cut(call: Call, start: int, stop: int) -> Call:
    """Return the call on the elements from `start` to before `stop`."""
    state = {name: field[start:stop] for name, field in call.state.items()}
    copy = None if call.copy is None else call.copy[start:stop]
    return Call(call.p[start:stop], call.g[start:stop], state, call.out[start:stop], call.scalars, copy, call.pairs)


class Write(NamedTuple):
    """New values to write into memory; writing twice has the same effect as once."""

    into: Tensor
    values: Tensor
    rows: Tensor | None = None

    def commit(self) -> None:
        """Write the values: to all of `into`, or to the named rows."""
        if self.rows is None:
            self.into.copy_(self.values)
        else:
            self.into.index_copy_(0, self.rows, self.values)


class Position(NamedTuple):
    """A position in a list of calls: the number of completed calls, and of completed elements of the next.

    `writes` are computed and may be partly done; to continue, all of them are done again, and then the position is
    `then`.
    """

    call: int = 0
    element: int = 0
    writes: tuple[Write, ...] = ()
    then: tuple[int, int] = (0, 0)


class Rerun(NamedTuple):
    """How a step ran, to run it again with the same bits.

    Attributes:
        kernel: the kernel that ran it.
        switched: of a mixed one, the call and the element where the reference kernel continued.
    """

    kernel: Ran
    switched: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Progress:
    """The progress of a list of calls: one attribute, so that an interrupt cannot see half of a change."""

    at: Position = field(default_factory=Position)

    def commit(self, writes: Iterable[Write], *, call: int, element: int = 0) -> None:
        """Do writes and move to the position after them."""
        self.at = Position(self.at.call, self.at.element, tuple(writes), (call, element))
        self.resume()

    def resume(self) -> None:
        """Do the writes that were computed before an interrupt."""
        if self.at.writes:
            for write in self.at.writes:
                write.commit()
            self.at = Position(*self.at.then)


class Kernel(ABC):
    """A kernel, which executes calls of one rule."""

    name: KernelName

    def takes(self, form: KernelSignature) -> bool:
        """Return whether it runs this form in one pass over memory; only then may a call have a copy."""
        return False

    @abstractmethod
    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Execute calls from `progress` on.

        When this returns or raises, also after a keyboard interrupt, `progress` is exact: everything up to it is in
            memory, and nothing beyond it.
        """


class KernelSource(ABC):
    """The source of a step's kernel."""

    @abstractmethod
    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Begin to prepare the kernels that a session will need, without waiting for them."""

    @abstractmethod
    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        """Return the kernel for a step over memory of these forms.

        Args:
            wanted: the kernel of a replayed step, None for the best one available.

        Raises:
            Unavailable: the wanted kernel is not available on this machine.
        """

    def improve(  # noqa: B027  # a source without such kernels does nothing
        self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device
    ) -> None:
        """Begin to prepare optional kernels that make steps faster, without waiting for them."""

    @abstractmethod
    def reference(self, rule: AnyRule) -> Kernel:
        """Return the kernel that is always available; it finishes interrupted steps."""
