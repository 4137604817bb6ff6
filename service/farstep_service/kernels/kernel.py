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
        p: parameters before the step, flat and real for an elementwise rule, one in its own shape for the others.
        g: gradients, like `p`, though maybe in 16 bits: the rule gets them in the dtype of `p`.
        state: the tensor fields in use, changed in place.
        out: where the new parameters go; may be `p` itself.
        scalars: the numbers of this step.
        copy: where they go as well, maybe in another dtype; may be `g` itself if that is in this dtype.
        pairs: whether all of these are pairs of reals which the rule wants as complex numbers.
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
    """New values on their way into memory; carrying it out twice is as good as once."""

    into: Tensor
    values: Tensor
    rows: Tensor | None = None

    def commit(self) -> None:
        """Put the values in their place: all of `into`, or the rows named."""
        if self.rows is None:
            self.into.copy_(self.values)
        else:
            self.into.index_copy_(0, self.rows, self.values)


class Position(NamedTuple):
    """A point in a list of calls: this many are done, and so many elements of the next.

    `writes` are computed and may be half carried out; whoever continues carries all of them out again, after which
    `then` is the point.
    """

    call: int = 0
    element: int = 0
    writes: tuple[Write, ...] = ()
    then: tuple[int, int] = (0, 0)


class Rerun(NamedTuple):
    """How a step is to run once more, so that it gives the same bits.

    Attributes:
        kernel: what ran it.
        switched: of a mixed one, the call and the element where the reference kernel went on.
    """

    kernel: Ran
    switched: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Progress:
    """How far a list of calls has come: one attribute, so that no interrupt sees half of a change."""

    at: Position = field(default_factory=Position)

    def commit(self, writes: Iterable[Write], *, call: int, element: int = 0) -> None:
        """Carry writes out and move on to the point that follows them."""
        self.at = Position(self.at.call, self.at.element, tuple(writes), (call, element))
        self.resume()

    def resume(self) -> None:
        """Carry out what was computed before an interruption."""
        if self.at.writes:
            for write in self.at.writes:
                write.commit()
            self.at = Position(*self.at.then)


class Kernel(ABC):
    """Carries calls of one rule out."""

    name: KernelName

    def takes(self, form: KernelSignature) -> bool:
        """Return whether it runs this form in one pass over memory; only then may a call ask for a copy."""
        return False

    @abstractmethod
    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Carry calls out from where `progress` stands.

        Whenever this returns or raises, by an interrupt from the keyboard too, `progress` is right: what it says is
        done is in memory, and nothing beyond it is.
        """


class KernelSource(ABC):
    """Where the kernel of a step comes from."""

    @abstractmethod
    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Begin to make ready what a session will need, without waiting for it."""

    @abstractmethod
    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        """Return the kernel for a step over memory of these forms.

        Args:
            wanted: the kernel of the step that is being replayed, None for the best one ready.

        Raises:
            Unavailable: the kernel wanted cannot be had on this machine.
        """

    def improve(  # noqa: B027  # a source without such kernels has nothing to do
        self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device
    ) -> None:
        """Begin to make ready what steps can do without, but would be faster with; never wait for it."""

    @abstractmethod
    def reference(self, rule: AnyRule) -> Kernel:
        """Return the kernel that is always there; it finishes interrupted steps."""
