"""The interface between the store, which has the memory, and the optimizers, which have the maths: the rules.

    Method    one optimizer
    ├── Rule      what it does to memory in a step, as a pure function
    │   ├── ElementwiseRule   to any stretch of it, each element by itself            optimizers/adagrad.py, ...
    │   └── TensorRule        to one whole tensor at a time                           optimizers/muon.py, ...
    └── LBFGS     asks for the objective several times in a step                      optimizers/lbfgs.py
    RowRule   what a rule of either kind does to the rows that a sparse gradient names
    SegmentCounters    what one segment has lived through: its steps, ASGD's eta and mu, and which state it has
    KernelSignature      what a rule is compiled for: element types, and the optional state in use

A step computes, for each segment that has a gradient, `scalars(counts, hyper)` and the next counts; neighbours with
equal scalars become one call of an elementwise rule; `farstep_service.kernels.kernel` has the calls and
what runs them. The store and the kernels import this module; it knows neither.

Some state exists with certain options only, as `max_exp_avg_sq` with `amsgrad`. Such fields are optional: a step uses
those that its options ask for, a segment has those that one of its steps has used, and memory is taken with the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.fields import FieldKind, shape_of
from farstep.protocol.hyper import Hyper
from farstep_service.layout import Layout

Scalar = float | Tensor
"""A number of a step: a Python float in an eager kernel, a 0-dim float64 tensor in a compiled one."""

Fields = tuple[str, ...]
"""Names of tensor fields, in the order of `Rule.tensor_fields`."""

StateTensors = Mapping[str, Tensor]
"""Memory, or values, of the tensor fields in use, under their names and in their order."""

PRECISION = "precision"
"""The field of rules whose numbers have a dtype of their own: the bits of its significand."""

KernelName = Literal["reference", "fused"]
H = TypeVar("H", bound=Hyper)


@dataclass(frozen=True, slots=True)
class SegmentCounters:
    """What one segment has lived through. Rules with more numbers per segment derive from it.

    Attributes:
        step: steps taken. An int, since torch's float32 counter stops at 16,777,216.
        fields: the tensor fields that the segment has.
    """

    step: int = 0
    fields: Fields = field(default=(), kw_only=True)


class KernelSignature(NamedTuple):
    """What a compiled rule is made for.

    Attributes:
        dtype: the element type, under its wire name.
        optional: the optional tensor fields in use.
        gradient: the element type of the gradients, "" for the same.
        copy: the element type of a second copy of the new parameters, "" for none.
    """

    dtype: str
    optional: Fields = ()
    gradient: str = ""
    copy: str = ""


class Method(ABC, Generic[H]):
    """One optimizer: torch's names for its options and state, and what it does not take.

    A new one is one file with a class and a place in `optimizers/rules.py`. It has no state of its own.
    """

    name: ClassVar[str]
    """torch's class name."""
    tensor_fields: ClassVar[Fields]
    """State that is a tensor, under torch's keys and in torch's order."""
    optional_fields: ClassVar[Fields] = ()
    """Those of them, of the parameter's shape, that some options do without."""
    segment_fields: ClassVar[tuple[str, ...]] = ("step",)
    """State with one number per segment."""
    own_fields: ClassVar[tuple[str, ...]] = ()
    """Numbers per segment that are no entries of torch's state, behind all other fields."""
    special: ClassVar[Mapping[str, FieldKind]] = MappingProxyType({})
    """The kinds of fields that are neither 0-dim tensors nor of the parameter's shape."""
    kernels: ClassVar[tuple[KernelName, ...]] = ("reference",)
    """What can run it."""
    hyper: type[H]
    """The record of its options."""
    has_initial_state: ClassVar[bool] = False
    """Whether a segment has state before its first step."""

    @property
    def kinds(self) -> dict[str, FieldKind]:
        """Return every state field, torch's numbers first, with what it is."""
        kinds: dict[str, FieldKind] = dict.fromkeys(self.segment_fields, "number")
        kinds |= dict.fromkeys(self.tensor_fields, "element")
        kinds |= dict.fromkeys(self.optional_fields, "optional")
        kinds |= self.special
        return kinds | dict.fromkeys(self.own_fields, "precision")

    @property
    def number_fields(self) -> tuple[str, ...]:
        """Return the fields with one number per segment, whether torch's state has them or not."""
        return (*self.segment_fields, *self.own_fields)

    def state_bytes(self, layout: Layout, groups: Sequence[H]) -> int:
        """Return the bytes that the state of a session takes at most."""
        return len(self.tensor_fields) * layout.nbytes + 8 * len(self.number_fields) * len(layout.segments)

    def step_bytes(self, layout: Layout, groups: Sequence[H]) -> int:
        """Return the bytes whose processing takes as long as a step, but for the bookkeeping of segments."""
        return layout.nbytes

    def check_layout(self, layout: Layout) -> None:
        """Refuse parameters that torch's constructor refuses, in torch's words.

        Raises:
            TensorMismatch: naming the parameter.
        """

    def check_step(self, hyper: H) -> None:
        """Refuse options that pass torch's constructor and with which its steps fail; a rule's numbers show that.

        Raises:
            InvalidOption: naming the option.
        """

    def check_gradients(self, layout: Layout, groups: Sequence[H], dense: Iterable[int], sparse: Iterable[int]) -> None:
        """Refuse gradients where torch does, in torch's words.

        Args:
            layout, groups: the session's.
            dense: the segments with a dense gradient.
            sparse: those with a sparse one.

        Raises:
            TensorMismatch: the rule, or an option, does not go with one of them.
        """
        for index in sparse:
            self.check_sparse(groups[layout.segments[index].group])

    def check_sparse(self, hyper: H) -> None:
        """Refuse a sparse gradient where torch does, in torch's words; one that is accepted may be made dense.

        Raises:
            TensorMismatch: the rule, or an option, does not go with sparse gradients.
        """
        raise TensorMismatch(
            f"{self.name} does not support sparse gradients",
            remedy="Send a dense gradient, or use an optimizer that takes sparse ones.",
        )


class Rule(Method[H]):
    """An optimizer whose step is a formula: each push with its gradients is a step.

    Rules derive from one of the two classes below.
    """

    counts: ClassVar[type[SegmentCounters]] = SegmentCounters
    """The record of its numbers per segment, whose attributes are `number_fields`."""

    def optional(self, hyper: H) -> Fields:
        """Return the optional fields that a step with these options uses."""
        return ()

    def fields(self, optional: Iterable[str], shape: Sequence[int] = ()) -> Fields:
        """Return the tensor fields of a segment that has these optional ones.

        Args:
            optional: names of fields, others than the optional ones among them.
            shape: the segment's; it matters only to rules with fields that a parameter of some shape never has.
        """
        if not self.optional_fields and not self.special:
            return self.tensor_fields
        chosen, kinds = set(optional), self.kinds
        return tuple(
            name
            for name in self.tensor_fields
            if (name in chosen or name not in self.optional_fields) and shape_of(kinds[name], shape) is not None
        )

    def initial(self, field: str, hyper: H) -> float:
        """Return the number a tensor field is filled with before it is used."""
        return 0.0

    def first(self, hyper: H) -> SegmentCounters:
        """Return the counts of a segment whose first step is about to be taken with these options."""
        return self.counts()

    @abstractmethod
    def scalars(self, counts: SegmentCounters, hyper: H) -> tuple[float, ...]:
        """Return the numbers of the step that follows `counts`, in the order `update` takes them.

        Raises:
            InvalidOption: options with which torch fails in a step.
        """

    def advance(self, counts: SegmentCounters, hyper: H) -> SegmentCounters:
        """Return the counts after the step that follows `counts`."""
        return SegmentCounters(counts.step + 1, fields=counts.fields)

    @abstractmethod
    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        """Return new parameters and state; change no argument and return none of them.

        Args:
            p, g: tensors of one shape and dtype; which ones is said by the classes that derive from this one.
            state: the tensor fields in use. Which ones are there may be branched on.
            scalars: what `scalars()` returned.
        """


class ElementwiseRule(Rule[H]):
    """A rule whose every element is by itself, so that memory may be cut and joined anywhere, and compiled.

    `update` gets tensors of any one shape, and the state fields like them. They are real, as complex parameters come as
    pairs of reals; a rule with `complex_numbers` gets complex ones in the reference kernel. In a compiled kernel its
    scalars are 0-dim float64 tensors: nothing may branch in Python on a tensor, and `arithmetic.py` has what to use.
    """

    kernels: ClassVar[tuple[KernelName, ...]] = ("reference", "fused")
    usual: ClassVar[tuple[Fields, ...]] = ((),)
    """Which optional fields are in use so often together that kernels for them are built ahead."""
    complex_numbers: ClassVar[bool] = False
    """Whether torch computes with complex numbers as such; each part is then rounded otherwise than a real number."""


PASSES = 8
"""How often a rule that looks at whole tensors goes through them, about."""


class TensorRule(Rule[H]):
    """A rule that looks at a parameter as a whole, for its norm or its product with others.

    `update` gets one parameter in its shape and dtype, contiguous, and its state fields in theirs; its scalars are
    Python floats. A parameter without elements is left out.
    """

    def step_bytes(self, layout: Layout, groups: Sequence[H]) -> int:
        """Return more than the parameters' bytes: norms and products go through them several times."""
        return PASSES * layout.nbytes

    def check_gradients(self, layout: Layout, groups: Sequence[H], dense: Iterable[int], sparse: Iterable[int]) -> None:
        """Refuse gradients of complex parameters, which no such rule of torch takes, and sparse ones."""
        sparse = list(sparse)
        for index in (*dense, *sparse):
            if layout.segments[index].is_complex:
                raise TensorMismatch(
                    f"{self.name} does not support complex parameters",
                    field=layout.segments[index].name,
                    remedy="Give complex parameters to another optimizer.",
                )
        super().check_gradients(layout, groups, (), sparse)


class RowRule(Rule[H]):
    """A rule that knows what to do with the rows that a sparse gradient names."""

    def by_rows(self, hyper: H) -> bool:
        """Return whether a sparse gradient changes the rows it names and no other; if not, it is made dense."""
        return True

    @abstractmethod
    def update_rows(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[float]
    ) -> tuple[Tensor, StateTensors]:
        """Return the new rows of parameters and state that a sparse gradient touches.

        Args:
            p: the touched rows, `(nnz, *dense shape)`, in the parameter's own dtype, complex included.
            g: the coalesced gradient's values, like `p`.
            state: the same rows of each tensor field in use, which are all of the parameter's shape.
            scalars: what `scalars()` returned.
        """


AnyMethod = Method[Any]
AnyRule = Rule[Any]
"""A rule whose kind of options is known to itself."""
