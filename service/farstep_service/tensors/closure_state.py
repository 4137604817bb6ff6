"""Parameters and state of an optimizer that asks for the objective again and again within a step.

    push, begins         the unfinished step, if there is one, is given up; a step begins at the present parameters
    push, continues      what the step waited for
    ──► the parameters move, as one new version; the answer says whether the step wants another evaluation there

State is what the last complete step left, until the next one is complete. Other parameters may be written while a step
waits, as a closure does that keeps them within bounds. Other state gives the step up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from farstep.errors import InternalError, InvalidRequest, StepDiscarded, TensorMismatch
from farstep.protocol.fields import PRESENT, mask_of
from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import Evaluation, PutHead
from farstep_service.kernels.kernel import Rerun
from farstep_service.layout import Layout
from farstep_service.optimizers.lbfgs import LBFGSHyper, most_pairs
from farstep_service.optimizers.lbfgs_state import check_shapes, fields_of, memory_of
from farstep_service.optimizers.lbfgs_steps import Memory, Turn, Waiting, begin, resume
from farstep_service.plan import Plan
from farstep_service.store import Applied, Buffers, FlatBuffers, Gradients, Held, PlainStore
from farstep_service.tensors.contents import PARAM, Contents
from farstep_service.tensors.contribution import on_device
from farstep_service.tensors.state import NO_GROUPS, SessionState


@final
class ClosureState(SessionState):
    """Hold the tensors and options of a session of L-BFGS; see `SessionState`."""

    def __init__(self, plan: Plan, *, device: torch.device) -> None:
        super().__init__(plan, device=device)
        self._length = sum(segment.length for segment in plan.layout.segments)
        self._parameters: PlainStore | None = None
        self._memory: Memory | None = None
        self._waiting: Waiting | None = None

    @property
    def initialised(self) -> bool:
        return self._parameters is not None

    @property
    def version(self) -> int:
        return self._parameters.version if self._parameters else 0

    @property
    def pending(self) -> bool:
        return False

    @property
    def store(self) -> PlainStore:
        """Return the parameters; for errors see `check_initialised`."""
        self.check_initialised()
        assert self._parameters is not None
        return self._parameters

    # -- beginning --------------------------------------------------------------------------------------------------

    def adopt(self, parameters: Buffers, state: Contents | None = None, version: int = 0) -> None:
        store = PlainStore(self.plan.layout, device=self.device, parameters=parameters, version=version)
        self._memory = None if state is None else self._memory_in(state)
        self._parameters = store

    def begin(self, contents: Contents, version: int) -> None:
        self.adopt(on_device(contents.elements[PARAM], self.device), contents, version)

    @property
    def asked(self) -> object:
        return self._waiting

    def ask_again(self, asked: object) -> None:
        assert asked is None or isinstance(asked, Waiting)
        self._waiting = asked

    def append(self, plan: Plan, parameters: Buffers) -> None:
        self.plan.rule.check_layout(plan.layout)  # which has a second group, and is refused
        raise InternalError(f"{self.plan.rule.name} has no layout of several groups.")

    def check_step(self, changed: Mapping[int, Hyper]) -> None:
        for hyper in changed.values():
            self.plan.rule.check_step(hyper)

    # -- steps and writes -------------------------------------------------------------------------------------------

    def check_evaluation(self, evaluation: Evaluation | None) -> None:
        if evaluation is None:
            raise InvalidRequest(
                f"A push to {self.plan.rule.name} needs the loss, which is missing.",
                remedy="Send what the closure returned under the header key 'loss'.",
                field="loss",
            )

    def check_base(self, base: int, evaluation: Evaluation | None) -> None:
        super().check_base(base, evaluation)
        if evaluation is not None and evaluation.continues and (self._waiting is None or base != self.version):
            raise _discarded()

    def step(
        self,
        gradients: Gradients,
        changed: Mapping[int, Hyper],
        evaluation: Evaluation | None,
        lr_factor: float = 1.0,
        *,
        passing: Mapping[int, Hyper] = NO_GROUPS,
        rerun: Rerun | None = None,
    ) -> Applied:
        self.check_evaluation(evaluation)
        assert evaluation is not None
        store, groups = self.store, self._with(changed)
        with torch.no_grad():
            turn = self._turn(passing.get(0, groups[0]), evaluation, self._gradient(gradients), self._flat())
            moved = None if turn.x is None else self._buffers(turn.x)
            version = store.write(range(len(self.plan.layout.segments)), moved)
        self._waiting = turn.waiting
        if turn.waiting is None:
            self._memory = turn.memory
        self.groups = groups
        return Applied(version, "reference", 1, again=turn.waiting is not None)

    def _turn(self, hyper: Hyper, evaluation: Evaluation, gradient: Tensor, x: Tensor) -> Turn:
        if not evaluation.continues:
            assert isinstance(hyper, LBFGSHyper)
            return begin(self._memory or Memory(), hyper, evaluation.loss, gradient, x)
        if self._waiting is None:
            raise _discarded()
        return resume(self._waiting, evaluation.loss, gradient, x)

    def finish(self) -> Applied | None:
        return None

    def write(self, contents: Contents) -> None:
        memory = self._memory_in(contents)
        values = contents.elements.get(PARAM)
        self.store.write(contents.indices, values and on_device(values, self.device))
        if PRESENT in contents.numbers and 0 in contents.indices:
            self._memory, self._waiting = memory, None

    # -- reads and room for what arrives ----------------------------------------------------------------------------

    def intake(self, head: PutHead, layout: Layout) -> Contents:
        contents = super().intake(head, layout)
        self._check_shapes(contents)
        return contents

    def _check_shapes(self, contents: Contents) -> None:
        hyper = self.groups[0]
        assert isinstance(hyper, LBFGSHyper)
        check_shapes(contents.shapes, self._length, most_pairs(hyper))

    def parameters(self) -> Buffers:
        return self.store.buffers

    def hold(self) -> Held:
        return self.store.hold()

    def copy(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> Contents:
        store, names = self.store, tuple(self.plan.rule.kinds)
        chosen = range(len(self.plan.layout.segments)) if indices is None else indices
        own = fields_of(self._memory) if self._memory is not None and 0 in chosen else {}
        kept = [name for name in fields if name not in names or name in own]
        sent = {name: own[name] for name in kept if name in own}
        shapes = {name: tuple(each.shape) if isinstance(each, Tensor) else None for name, each in sent.items()}
        contents = Contents(self.plan.layout, self.plan.rule, kept, chosen, shapes)
        contents.allocate()
        if PARAM in contents.elements:
            contents.elements[PARAM].copy_(store.buffers, indices)
        if PRESENT in contents.numbers and 0 in chosen:
            contents.numbers[PRESENT][list(chosen).index(0)] = mask_of(own, names)
        for name, into in contents.free.items():
            value = own[name]
            into.copy_(value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu"))
        return contents

    def coming_bytes(self, growing: int = 0) -> int:
        pair = 2 * self.plan.layout.nbytes  # of the history, by each step
        return pair + self._parameters.coming_bytes if self._parameters else 0

    def nbytes(self) -> dict[str, int]:
        parameters, versions = self._parameters.nbytes if self._parameters else (0, 0)
        memories = [self._memory, self._waiting.memory if self._waiting else None]
        tensors = {id(each): each for memory in memories if memory for each in memory.tensors()}
        return {
            "parameters": parameters,
            "versions": versions,
            "state": sum(each.nbytes for each in tensors.values()),
        }

    # -- inside -----------------------------------------------------------------------------------------------------

    def _memory_in(self, contents: Contents) -> Memory | None:
        """Return the memory that contents bring, None where they bring none.

        Raises:
            TensorMismatch: another parameter than the first is said to have state, or the state is incomplete.
        """
        has = dict(zip(contents.indices, contents.has() or (), strict=False))
        if any(own is not None for index, own in has.items() if index):
            raise TensorMismatch(f"{self.plan.rule.name} keeps its state with the first parameter only.", field=PRESENT)
        own = has.get(0)
        if set(own or ()) != contents.free.keys():
            raise TensorMismatch("The state that is said to be present is not the one that came.", field=PRESENT)
        if own is None:
            return None
        self._check_shapes(contents)
        return memory_of(
            {
                name: each.item() if contents.shapes[name] is None else each.to(self.device)
                for name, each in contents.free.items()
            }
        )

    def _flat(self) -> Tensor:
        buffers = self.store.buffers
        return flat_of(buffers.segment(index) for index in range(len(self.plan.layout.segments)))

    def _gradient(self, gradients: Gradients) -> Tensor:
        """Return the gradient of all parameters, zeros where one has none."""
        layout = self.plan.layout
        dense = set(gradients.dense())
        tensors = []
        for index, segment in enumerate(layout.segments):
            if index in dense:
                tensors.append(gradients.buffers.segment(index))
            elif index in gradients.sparse:
                indices, values = gradients.sparse[index]
                whole = torch.sparse_coo_tensor(
                    indices, values, segment.shape, device=values.device, check_invariants=False
                )
                tensors.append(whole.to_dense())
            else:
                tensors.append(torch.zeros(segment.length, dtype=getattr(torch, segment.buffer), device=self.device))
        return flat_of(tensors)

    def _buffers(self, flat: Tensor) -> Buffers:
        """Return a vector of all parameters as the store takes it."""
        return scattered(flat, self.plan.layout, self.device)


def flat_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors one after the other in memory of its own, complex ones as pairs of reals."""
    parts = []
    for tensor in tensors:
        plain = tensor.detach().resolve_conj().resolve_neg()
        parts.append((torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1))
    return torch.cat(parts)


def scattered(flat: Tensor, layout: Layout, device: torch.device) -> Buffers:
    """Return a vector cut into the segments of a layout."""
    buffers = FlatBuffers(layout, device, zero=False)
    offset = 0
    for index, segment in enumerate(layout.segments):
        buffers.stretch(index, segment.length).copy_(flat[offset : offset + segment.length])
        offset += segment.length
    return buffers


def _discarded() -> StepDiscarded:
    return StepDiscarded(
        "The step that asked for this evaluation was given up: another one began, or other contents were written.",
        remedy="Take the step again; several workers share L-BFGS in a sync session only.",
        field="continues",
    )
