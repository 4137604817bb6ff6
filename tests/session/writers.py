"""Sessions without a network, and workers that write to them: heads, gradients and fingerprints made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farstep.errors import FarstepError, TensorMismatch
from farstep.protocol import to_ranges
from farstep.protocol.consistency import Consistency, to_options
from farstep.protocol.fields import Shapes
from farstep.protocol.growth import AppendHead, NewParameter
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from farstep.protocol.messages import Evaluation, PushHead, PutHead, Sparse, WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.kernels import Kernels
from farstep_service.kernels.kernel import KernelSource
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.session import Outcome, Outcomes, Session, SessionRecord

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (5,), "scale": (), "z": (2,)}
DTYPES: dict[str, str] = {"w": "float32", "b": "float32", "scale": "float64", "z": "complex64"}
ASYNC: dict[str, object] = {"mode": "async"}
Gradient = Tensor | None


def sync(workers: int, deadline_s: float = 10.0) -> dict[str, object]:
    return {"mode": "sync", "workers": workers, "deadline_s": deadline_s}


def new_session(
    *,
    optimizer: str = "Adagrad",
    consistency: Mapping[str, object] = ASYNC,
    names: Sequence[str] = ("w", "b", "scale", "z"),
    groups: Sequence[Mapping[str, object]] = ({"lr": 0.1},),
    group_of: Mapping[str, int] | None = None,
    nonfinite: str = "refuse",
    kernels: KernelSource | None = None,
    record: SessionRecord | None = None,
    **policy: object,
) -> Session:
    plan = Plan.build(
        name="s",
        optimizer=optimizer,
        groups=groups,
        segments=[SegmentSpec(name, SHAPES[name], DTYPES[name], (group_of or {}).get(name, 0)) for name in names],
        consistency=consistency,
        nonfinite=nonfinite,
        kernel="reference",
        policy=policy,
    )
    return Session(plan, incarnation="here", kernels=kernels or Kernels("reference"), device="cpu", record=record)


def values(session: Session, seed: int) -> list[Tensor]:
    """Return random tensors, one for each segment."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(segment.shape, generator=generator, dtype=TORCH_DTYPES[segment.dtype])
        for segment in session.plan.layout.segments
    ]


def parameters(session: Session) -> list[Tensor]:
    """Return a copy of every parameter."""
    held, _ = session.hold()
    copies = []
    with held:
        for index, segment in enumerate(session.plan.layout.segments):
            span = held.span(index, index + 1)
            assert span is not None
            own = span.clone()
            copies.append(
                torch.view_as_complex(own.view(*segment.shape, 2)) if segment.is_complex else own.view(segment.shape)
            )
    return copies


class Twin:
    """The same parameters under torch's own optimizer.

    Args:
        start: the parameters it begins with; they are copied.
        options: of the optimizer, one param group for all.
    """

    def __init__(self, start: Sequence[Tensor], optimizer: str = "Adagrad", **options: Any) -> None:
        self.parameters = [tensor.clone() for tensor in start]
        self.optimizer = getattr(torch.optim, optimizer)(self.parameters, foreach=False, **(options or {"lr": 0.1}))

    def step(self, gradients: Sequence[Gradient]) -> list[Tensor]:
        """Take a step and return the parameters."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()
        return self.parameters


def mean_of(*contributions: Sequence[Gradient]) -> list[Gradient]:
    """Return `(g0 + g1 + ...) / n` by segment, in the order given; an absent one is zero, and absent where all are."""
    means: list[Gradient] = []
    for own in zip(*contributions, strict=True):
        there = [each.to_dense() if each.is_sparse else each for each in own if each is not None]
        means.append(sum(there[1:], start=there[0]) / len(contributions) if there else None)
    return means


def equal(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal bit for bit."""
    return all(map(torch.equal, ones, others)) and len(ones) == len(others)


@dataclass
class Writer:
    """One worker of a session.

    Attributes:
        last: the sequence of its last committed write, as far as it knows.
    """

    session: Session
    name: str
    epoch: int = 0
    last: int = 0
    joined: Outcomes = field(default_factory=dict)

    @classmethod
    def join(cls, session: Session, name: str = "w0", now: float = 0.0, *, named: bool = True) -> Writer:
        epoch, outcomes = session.join(name, now, named=named)
        return cls(session, name, epoch, joined=outcomes)

    def named(self, sequence: int | None = None) -> WriteName:
        return WriteName(self.name, self.epoch, self.last + 1 if sequence is None else sequence)

    def push(
        self,
        gradients: Sequence[Gradient],
        *,
        sequence: int | None = None,
        now: float = 0.0,
        base: int | None = None,
        groups: Mapping[int, Mapping[str, Any]] | None = None,
        incarnation: str = "here",
        evaluation: Evaluation | None = None,
        skip: bool = False,
    ) -> Outcomes:
        """Push gradients, or skip the step; the next sequence is taken up when the outcome of this one is a receipt."""
        name = self.named(sequence)
        present = [index for index, each in enumerate(gradients) if each is not None]
        sparse = [
            Sparse(index, each.sparse_dim(), each._nnz())
            for index, each in enumerate(gradients)
            if each is not None and each.is_sparse
        ]
        head = PushHead(
            name,
            incarnation,
            self.session.version if base is None else base,
            segments=None if len(present) == len(gradients) else to_ranges(present),
            sparse=tuple(sparse),
            groups=groups or {},
            evaluation=evaluation,
            skip=skip,
        )
        self.session.check(name, incarnation)
        contribution = self.session.contribution(head)
        content = b"".join(map(_bytes, gradients))
        _fill(contribution.allocate(), content)
        outcomes = self.session.push(head, contribution, _digest(content, head.segments, groups, evaluation, skip), now)
        return self._noted(name, outcomes)

    def skip(self, **options: Any) -> Outcomes:
        """Push that the step is skipped; the options are those of `push`."""
        return self.push([None] * len(self.session.plan.layout.segments), skip=True, **options)

    def put(
        self,
        contents: Mapping[str, Sequence[Tensor] | Sequence[float]],
        *,
        sequence: int | None = None,
        segments: list[int] | None = None,
        initial: bool = False,
        version: int = 0,
        shapes: Shapes | None = None,
        incarnation: str = "here",
        now: float = 0.0,
    ) -> Outcomes:
        """Write contents: tensors by segment, or numbers."""
        name = self.named(sequence)
        head = PutHead(name, incarnation, tuple(contents), segments, initial, version, shapes or {})
        intake = self.session.intake(head)
        content = b"".join(
            _bytes(each if isinstance(each, Tensor) else torch.tensor(each, dtype=torch.float64))
            for field in contents.values()
            for each in field
        )
        _fill(intake.allocate(), content)
        return self._noted(name, self.session.put(head, intake, _digest(content, initial, version), now))

    def append(
        self,
        tensors: Mapping[str, Tensor],
        *,
        group: int | None = None,
        options: Mapping[str, Any] | None = None,
        sequence: int | None = None,
        incarnation: str = "here",
        now: float = 0.0,
    ) -> Outcomes:
        """Add a param group with these parameters, by default one more than there are."""
        name = self.named(sequence)
        index = len(self.session.plan.groups) if group is None else group
        announced = tuple(
            NewParameter(key, tuple(each.shape), str(each.dtype).removeprefix("torch."))
            for key, each in tensors.items()
        )
        head = AppendHead(name, incarnation, index, options or {"lr": 0.3}, announced)
        intake = self.session.addition(head)
        content = b"".join(map(_bytes, tensors.values()))
        _fill(intake.allocate(), content)
        return self._noted(name, self.session.append(head, intake, _digest(content, head), now))

    def _noted(self, name: WriteName, outcomes: Outcomes) -> Outcomes:
        own = outcomes.get(name)
        if own is not None and isinstance(own.result, Receipt) and name.sequence == self.last + 1:
            self.last += 1
        return outcomes


def begun(session: Session, *names: str, seed: int = 0) -> list[Writer]:
    """Let workers join, and the first of them send the first parameters."""
    writers = [Writer.join(session, name) for name in names or ("w0",)]
    writers[0].put({"param": values(session, seed)}, initial=True)
    return writers


def receipt(outcomes: Outcomes, name: WriteName) -> Receipt:
    """Return the receipt that a write got."""
    result = outcomes[name].result
    assert isinstance(result, Receipt), result
    return result


def error(outcome: Outcome) -> FarstepError:
    """Return the error that a write got."""
    assert isinstance(outcome.result, FarstepError), outcome
    return outcome.result


def _fill(views: Sequence[memoryview], content: bytes) -> None:
    if sum(map(len, views)) != len(content):
        raise TensorMismatch("The body does not fit.")
    at = 0
    for view in views:
        view[:] = content[at : at + len(view)]
        at += len(view)


def _bytes(tensor: Gradient) -> bytes:
    if tensor is None:
        return b""
    if tensor.is_sparse:
        return _bytes(tensor._indices()) + _bytes(tensor._values())
    return bytes(tensor_memory(tensor.detach().contiguous()))


def _digest(content: bytes, *others: object) -> str:
    return hashlib.sha256(content + repr(others).encode()).hexdigest()


NAMES = ("w0", "w1", "w2")


def started(mode: Consistency, *names: str, **options: Any) -> tuple[Session, list[Writer], Twin]:
    """Return a session with its workers, and torch's optimizer over the same parameters."""
    session = new_session(consistency=to_options(mode), **options)
    return session, begun(session, *(names or NAMES)), Twin(parameters(session))
