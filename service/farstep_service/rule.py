"""The interface between the store, which has the memory, and the optimizers, which have the maths.

    Rule      what one optimizer does to a stretch of memory, as a pure function      optimizers/adagrad.py, ...
    Counts    what one segment has lived through: its steps, ASGD's eta and mu, and which state it has
    Form      what a rule is compiled for: an element type, and the optional state in use
    Call      the tensors and numbers of one application of a rule
    Kernel    carries a list of calls out, and can be stopped anywhere                optimizers/reference.py, fused.py
    KernelSource   chooses the kernel of a step                                       optimizers/kernels.py

A step computes, for each segment that has a gradient, `scalars(counts, hyper)` and the next counts; neighbours with
equal scalars become one call. Both the store and the optimizers import this module and not each other.

Some state exists with certain options only, as `max_exp_avg_sq` with `amsgrad`. Such fields are optional: a step uses
those that its options ask for, a segment has those that one of its steps has used, and memory is taken with the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.hyper import Hyper

Scalar = float | Tensor
"""A number of a step: a Python float in an eager kernel, a 0-dim float64 tensor in a compiled one."""

Fields = tuple[str, ...]
"""Names of element fields, in the order of `Rule.element_fields`."""

StateTensors = Mapping[str, Tensor]
"""Memory, or values, of the element fields in use, under their names and in their order."""

KernelName = Literal["reference", "fused"]
Kind = Literal["number", "element", "optional"]
H = TypeVar("H", bound=Hyper)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one segment has lived through. Rules with more numbers per segment derive from it.

    Attributes:
        step: steps taken. An int, since torch's float32 counter stops at 16,777,216.
        fields: the element fields that the segment has.
    """

    step: int = 0
    fields: Fields = field(default=(), kw_only=True)


class Form(NamedTuple):
    """What a compiled rule is made for.

    Attributes:
        dtype: the element type, under its wire name.
        optional: the optional element fields in use.
    """

    dtype: str
    optional: Fields = ()


class Rule(ABC, Generic[H]):
    """One optimizer: torch's names for its options and state, and its formula.

    A new rule is one file with a class like this and a place in `optimizers/rules.py`. Rules have no state.
    """

    name: ClassVar[str]
    """torch's class name."""
    element_fields: ClassVar[Fields]
    """State with one number per element, under torch's keys and in torch's order; the optional ones are among them."""
    optional_fields: ClassVar[Fields] = ()
    """Element fields that some options do without."""
    usual: ClassVar[tuple[Fields, ...]] = ((),)
    """Which optional fields are in use so often together that kernels for them are built ahead."""
    segment_fields: ClassVar[tuple[str, ...]] = ("step",)
    """State with one number per segment: the attributes of `counts`."""
    hyper: type[H]
    """The record of its options."""
    counts: ClassVar[type[Counts]] = Counts
    """The record of its numbers per segment."""
    eager: ClassVar[bool] = False
    """Whether a segment has state before its first step."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """Return every state field, numbers first, with what it is."""
        kinds: dict[str, Kind] = dict.fromkeys(self.segment_fields, "number")
        return kinds | {name: "optional" if name in self.optional_fields else "element" for name in self.element_fields}

    def optional(self, hyper: H) -> Fields:
        """Return the optional fields that a step with these options uses."""
        return ()

    def fields(self, optional: Iterable[str]) -> Fields:
        """Return the element fields of a segment that has these optional ones."""
        if not self.optional_fields:
            return self.element_fields
        chosen = set(optional)
        return tuple(name for name in self.element_fields if name not in self.optional_fields or name in chosen)

    def initial(self, field: str, hyper: H) -> float:
        """Return the number an element field is filled with before it is used."""
        return 0.0

    def first(self, hyper: H) -> Counts:
        """Return the counts of a segment whose first step is about to be taken with these options."""
        return self.counts()

    @abstractmethod
    def scalars(self, counts: Counts, hyper: H) -> tuple[float, ...]:
        """Return the numbers of the step that follows `counts`, in the order `update` takes them."""

    def advance(self, counts: Counts, hyper: H) -> Counts:
        """Return the counts after the step that follows `counts`."""
        return Counts(counts.step + 1, fields=counts.fields)

    @abstractmethod
    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Return new parameters and state, elementwise; change no argument and return none of them.

        Args:
            p, g: real tensors of one shape and dtype; complex ones come as pairs of reals.
            state: the element fields in use, like `p`. Which ones are there may be branched on.
            scalars: what `scalars()` returned, or the same as 0-dim float64 tensors when the rule is compiled. Nothing
                may branch in Python on a tensor: `arithmetic.py` has what to use.
        """

    def check_sparse(self, hyper: H) -> None:
        """Refuse a sparse gradient where torch does, in torch's words.

        Raises:
            FarstepError: the rule, or an option, does not go with sparse gradients.
        """
        raise TensorMismatch(
            f"{self.name} does not support sparse gradients",
            remedy="Send a dense gradient, or use an optimizer that takes sparse ones.",
        )

    def update_rows(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[float]
    ) -> tuple[Tensor, StateTensors]:
        """Return the new rows of parameters and state that a sparse gradient touches.

        Args:
            p: the touched rows, `(nnz, *dense shape)`, in the parameter's own dtype, complex included.
            g: the coalesced gradient's values, like `p`.
            state: the same rows of each element field in use.
            scalars: what `scalars()` returned.
        """
        raise NotImplementedError(f"{self.name} does not take sparse gradients.")


AnyRule = Rule[Any]
"""A rule whose kind of options is known to itself."""


class Call(NamedTuple):
    """One application of a rule to a stretch of memory.

    Attributes:
        p: parameters before the step, flat and real.
        g: gradients, like `p`.
        state: the element fields in use, changed in place.
        out: where the new parameters go; may be `p` itself.
        scalars: the numbers of this step.
    """

    p: Tensor
    g: Tensor
    state: StateTensors
    out: Tensor
    scalars: tuple[float, ...]


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


class At(NamedTuple):
    """A point in a list of calls: this many are done, and so many elements of the next.

    `writes` are computed and may be half carried out; whoever continues carries all of them out again, after which
    `then` is the point.
    """

    call: int = 0
    element: int = 0
    writes: tuple[Write, ...] = ()
    then: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Progress:
    """How far a list of calls has come: one attribute, so that no interrupt sees half of a change."""

    at: At = field(default_factory=At)

    def commit(self, writes: Iterable[Write], *, call: int, element: int = 0) -> None:
        """Carry writes out and move on to the point that follows them."""
        self.at = At(self.at.call, self.at.element, tuple(writes), (call, element))
        self.resume()

    def resume(self) -> None:
        """Carry out what was computed before an interruption."""
        if self.at.writes:
            for write in self.at.writes:
                write.commit()
            self.at = At(*self.at.then)


class Kernel(ABC):
    """Carries calls of one rule out."""

    name: KernelName

    @abstractmethod
    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Carry calls out from where `progress` stands.

        Whenever this returns or raises, by an interrupt from the keyboard too, `progress` is right: what it says is
        done is in memory, and nothing beyond it is.
        """


class KernelSource(ABC):
    """Where the kernel of a step comes from."""

    @abstractmethod
    def prepare(self, rule: AnyRule, forms: Iterable[Form], device: torch.device) -> None:
        """Begin to make ready what a session will need, without waiting for it."""

    @abstractmethod
    def choose(self, rule: AnyRule, forms: frozenset[Form], device: torch.device, wanted: KernelName | None) -> Kernel:
        """Return the kernel for a step over memory of these forms.

        Args:
            wanted: the kernel of the step that is being replayed, None for the best one ready.

        Raises:
            Unavailable: the kernel wanted cannot be had on this machine.
        """

    @abstractmethod
    def reference(self, rule: AnyRule) -> Kernel:
        """Return the kernel that is always there; it finishes interrupted steps."""
