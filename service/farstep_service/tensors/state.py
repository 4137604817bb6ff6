"""What a session's steps change: its parameters, optimizer state and group options. The rest of a session orders the
steps.

    SessionState
    ├── KernelState     each push with its gradients is a step, which a kernel runs      kernel_state.py
    └── ClosureState    each push is an evaluation that a step has asked for             closure_state.py

An embedded optimizer needs no more than this: it is alone, and no answer of its gets lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from farstep.errors import InvalidOption, NotInitialised, TensorMismatch
from farstep.protocol.fields import PRESENT
from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import Evaluation, PutHead
from farstep.protocol.receipt import Receipt
from farstep_service.kernels.kernel import Rerun
from farstep_service.layout import Layout
from farstep_service.plan import Plan
from farstep_service.store import Applied, Buffers, FlatBuffers, Gradients, Held
from farstep_service.tensors.contents import PARAM, Contents
from farstep_service.tensors.snapshot import Snapshot

GroupChanges = Mapping[int, Mapping[str, Any]]
NO_GROUPS: Mapping[int, Hyper] = MappingProxyType({})


class SessionState(ABC):
    """Hold one session's tensors and options.

    Args:
        plan: what the session is.
        device: where parameters and state live.
    """

    takes_half_precision: ClassVar[bool] = False
    """Whether its steps take gradients in 16 bits as they came."""

    def __init__(self, plan: Plan, *, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.groups: Sequence[Hyper] = plan.groups

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def initialised(self) -> bool:
        """Return whether the first parameters have arrived."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Return the number of the last complete version."""

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Return whether a step failed midway and has to be finished."""

    def check_initialised(self) -> None:
        """Refuse what needs parameters.

        Raises:
            NotInitialised: the first parameters have not arrived.
        """
        if not self.initialised:
            raise self.without_parameters()

    def without_parameters(self) -> NotInitialised:
        """Return the error for what needs parameters before the first have arrived."""
        return NotInitialised(
            f"Session {self.plan.name!r} has no parameters yet.",
            remedy="Wait for the worker that creates it, or send them.",
        )

    @property
    def held_bytes(self) -> int:
        """Return the memory taken, all kinds together."""
        return sum(self.nbytes().values())

    # -- beginning --------------------------------------------------------------------------------------------------

    @abstractmethod
    def adopt(self, parameters: Buffers, state: Contents | None = None, version: int = 0) -> None:
        """Begin with these parameters, in their own memory, and with what state there is."""

    @abstractmethod
    def begin(self, contents: Contents, version: int) -> None:
        """Begin with contents that arrived; their memory belongs to the session from now on.

        Raises:
            TensorMismatch: a state that no session can have; there is still nothing then.
        """

    def restore(self, snapshot: Snapshot) -> None:
        """Begin with a snapshot, whose memory belongs to the session from now on; for errors see `begin`.

        Raises:
            InvalidOption: with the options that it says are in force the next step could not be taken.
        """
        self.begin(snapshot.contents, snapshot.version)
        self.set_groups(dict(enumerate(snapshot.groups)))

    @property
    def asked(self) -> object:
        """Return the step that waits for an evaluation of its objective, None for none."""
        return None

    def ask_again(self, asked: object) -> None:
        """Go on with a step that waited for an evaluation when it was recorded."""
        if asked is not None:
            raise TypeError(f"{self.plan.rule.name} has no step that waits.")

    # -- growing ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def append(self, plan: Plan, parameters: Buffers) -> None:
        """Grow by the param group that a plan has more, as one new version; for the arguments see `Store.append`.

        Raises:
            NotInitialised: the first parameters have not arrived.
            InvalidOption: the optimizer has one group only.
        """

    def append_arrived(self, plan: Plan, arrived: Contents) -> None:
        """Grow by a param group whose parameters arrived, in a layout of their own."""
        parameters, own = FlatBuffers(plan.layout, self.device, zero=False), arrived.elements[PARAM]
        for place, index in enumerate(range(len(self.plan.layout.segments), len(plan.layout.segments))):
            parameters.segment(index).copy_(own.segment(place))
        self.append(plan, parameters)

    # -- steps and writes -------------------------------------------------------------------------------------------

    def changed(self, changes: GroupChanges) -> dict[int, Hyper]:
        """Check changed options and return the groups they lead to.

        Raises:
            InvalidOption: an unknown group or option, or a value of a wrong type.
        """
        if not changes:
            return {}
        changed = {}
        self._check_groups(changes)
        for index, options in changes.items():
            current = self.groups[index]
            changed[index] = type(current).from_options({**current.to_options(), **options}, edited=True)
        return changed

    def given(self, changes: GroupChanges) -> dict[int, Hyper]:
        """Check options that are given by themselves and return the groups they lead to.

        torch's ranges hold for them, which options that come with a push may leave, as in torch.

        Raises:
            InvalidOption: see `changed`; or an option out of range.
        """
        changed = self.changed(changes)
        for index, options in changes.items():
            now, created = self.groups[index], self.plan.groups[index]
            try:
                type(now).from_options({**now.to_options(), **options})
            except InvalidOption:  # perhaps about others, which a push has put out of range
                type(now).from_options({**created.to_options(), **options})
        return changed

    @abstractmethod
    def check_step(self, changed: Mapping[int, Hyper]) -> None:
        """Refuse changed groups with which the next step could not be taken.

        Raises:
            InvalidOption: naming what stands in the way.
        """

    def whole(self, groups: GroupChanges) -> dict[int, Hyper]:
        """Check groups of which all options are named, and return them; those that are missing have torch's defaults.

        Raises:
            InvalidOption: an unknown group or option, or a value of a wrong type.
        """
        if not groups:
            return {}
        self._check_groups(groups)
        kind = self.plan.rule.hyper
        return {index: kind.from_options(options, edited=True) for index, options in groups.items()}

    def _check_groups(self, groups: GroupChanges) -> None:
        if (last := max(groups, default=0)) >= len(self.groups):
            raise InvalidOption(
                f"There is no param group {last}; the session has {len(self.groups)}.",
                field="groups",
                limit=len(self.groups),
            )

    def set_groups(self, changed: Mapping[int, Hyper]) -> None:
        """Put changed groups into force without a step, from the next one on.

        Options that are wrong are refused with the step that they come with. Without one they would stay, and every
        later push would be refused; so the next step has to be possible.

        Raises:
            InvalidOption: see `check_step`; nothing has changed then.
        """
        self.check_step(changed)
        self.groups = self._with(changed)

    def _with(self, changed: Mapping[int, Hyper], passing: Mapping[int, Hyper] = NO_GROUPS) -> Sequence[Hyper]:
        """Return the groups with changes, and in the place of some those of one step."""
        if not changed and not passing:
            return self.groups
        return [passing.get(index) or changed.get(index, group) for index, group in enumerate(self.groups)]

    @abstractmethod
    def check_evaluation(self, evaluation: Evaluation | None) -> None:
        """Refuse a push that comes without what its optimizer asks for, or with what it does not.

        Raises:
            InvalidRequest: the loss is missing, or there is one.
        """

    def check_base(self, base: int, evaluation: Evaluation | None) -> None:
        """Refuse a push whose gradients were computed on parameters that do not go with it.

        Raises:
            TensorMismatch: a version that does not exist.
            StepDiscarded: the step that the push continues was given up.
        """
        if base > self.version:
            raise TensorMismatch(
                f"The gradient claims version {base}, but the session is at {self.version}.",
                field="base",
                limit=self.version,
            )

    @abstractmethod
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
        """Take one step with changed groups, which stay in force if it is taken.

        Args:
            gradients: what to step along.
            changed: groups that have other options from now on.
            evaluation: what the closure returned.
            lr_factor: what each group's learning rate is multiplied by for this step alone.
            passing: groups that have other options in this step alone, whatever is in force.
            rerun: how it ran before, for a replay; None for the first time.

        Raises:
            FarstepError: the step is refused; nothing has changed.
            StepInterrupted: a kernel failed midway; the step is pending.
        """

    @abstractmethod
    def finish(self) -> Applied | None:
        """Complete a step that failed midway; return None if there was none."""

    @abstractmethod
    def write(self, contents: Contents) -> None:
        """Replace contents, as one new version."""

    # -- reads and room for what arrives ----------------------------------------------------------------------------

    def intake(self, head: PutHead, layout: Layout) -> Contents:
        """Return memory for contents that a header announces, in the layout that its worker knows.

        Raises:
            InvalidOption, InvalidRequest, TensorMismatch: the header names what the session does not have.
        """
        if head.initial and (head.segments is not None or PARAM not in head.fields):
            raise TensorMismatch(
                "The first contents must hold every parameter.", field="fields", remedy="Send `param` whole."
            )
        chosen, views = layout.chosen(head.segments), self.plan.policies.views
        return Contents(layout, self.plan.rule, head.fields, chosen, head.shapes, views=views)

    def put(self, head: PutHead, contents: Contents) -> Receipt:
        """Replace contents, or begin with them; first ones that come second change nothing."""
        base = self.version
        if not head.initial:
            self.write(contents)
            return Receipt(self.version, base)
        if self.initialised:
            return Receipt(base, base, applied=False)
        self.begin(contents, head.version)
        return Receipt(head.version, head.version)

    @abstractmethod
    def parameters(self) -> Buffers:
        """Return the memory of the current version, to be copied before the next step."""

    @abstractmethod
    def hold(self) -> Held:
        """Hold the current version, which stays unchanged until it is released."""

    @abstractmethod
    def copy(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> Contents:
        """Copy fields of the current version, of some segments or of all, but for those that none of them has.

        Raises:
            InvalidOption: a field the optimizer does not have.
            NotInitialised: the first parameters have not arrived.
        """

    @property
    def views(self) -> tuple[str, ...]:
        """Return the names of the views beside parameters and optimizer state."""
        return ()

    def snapshot(self) -> Snapshot:
        """Copy all of the current version, and the options now in force."""
        contents = self.copy((PARAM, *self.plan.rule.kinds, *self.views, PRESENT))
        return Snapshot(self.plan, tuple(self.groups), contents, self.version)

    @abstractmethod
    def coming_bytes(self, growing: int = 0) -> int:
        """Return the bytes that the next write may take beside what is there, and beside what it brings.

        Args:
            growing: bytes of parameters by which the session grows: all of it is then there twice, for a moment.
        """

    @abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Return the memory taken, in bytes by kind."""


def with_lr_times(group: Hyper, factor: float) -> Hyper:
    """Return the options of a group with its learning rate multiplied."""
    options = group.to_options()
    lr = options["lr"]
    assert isinstance(lr, (int, float))
    return type(group).from_options({**options, "lr": lr * factor}, edited=True)
