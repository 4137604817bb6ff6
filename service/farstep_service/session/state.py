"""What a session's steps change: its parameters, optimizer state and group options. The rest of a session orders the
steps.

An embedded optimizer needs no more than this: it is alone, and no answer of its gets lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from farstep.errors import InvalidOption, NotInitialised, TensorMismatch
from farstep.fields import EVERYWHERE
from farstep.hyper import Hyper
from farstep.messages import PutHead
from farstep.presence import PRESENT, mask_of
from farstep.wire import from_ranges
from farstep_service.contents import PARAM, Contents
from farstep_service.durability import Snapshot
from farstep_service.gradients import on_device
from farstep_service.plan import Plan
from farstep_service.rule import KernelSource
from farstep_service.store import Applied, Buffers, Gradients, Held, Store

GroupChanges = Mapping[int, Mapping[str, Any]]


@final
class SessionState:
    """Hold one session's tensors and options.

    Args:
        plan: what the session is.
        kernels: runs the update rule.
        device: where parameters and state live.
    """

    def __init__(self, plan: Plan, *, kernels: KernelSource, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.groups: Sequence[Hyper] = plan.groups
        self._kernels = kernels
        self._store: Store | None = None

    @property
    def initialised(self) -> bool:
        """Say whether the first parameters have arrived."""
        return self._store is not None

    @property
    def version(self) -> int:
        """Return the number of the last complete version."""
        return self._store.version if self._store else 0

    @property
    def pending(self) -> bool:
        """Say whether a step failed midway and has to be finished."""
        return self._store is not None and self._store.pending

    @property
    def crowded(self) -> bool:
        """Say whether the next step would need more than twice the memory of the parameters."""
        return self._store is not None and self._store.crowded

    @property
    def store(self) -> Store:
        """Return the store.

        Raises:
            NotInitialised: the first parameters have not arrived.
        """
        if self._store is None:
            raise NotInitialised(
                f"Session {self.plan.name!r} has no parameters yet.",
                remedy="Wait for the worker that creates it, or send them.",
            )
        return self._store

    # -- beginning --------------------------------------------------------------------------------------------------

    def adopt(self, parameters: Buffers, state: Contents | None = None, version: int = 0) -> None:
        """Begin with these parameters, in their own memory, and with what state there is."""
        store = self._new_store(parameters, version)
        if state is not None:
            store.write(state.indices, self._values(state), has=state.has(), bump=False)
        self._store = store

    def begin(self, contents: Contents, version: int) -> None:
        """Begin with contents that arrived; their memory belongs to the session from now on.

        Raises:
            TensorMismatch: a state that no session can have; there is still nothing then.
        """
        store = self._new_store(on_device(contents.elements.pop(PARAM), self.device), version)
        has = contents.has()
        if values := self._values(contents):
            store.write(contents.indices, values, has=has, bump=False)
        self._store = store

    def restore(self, snapshot: Snapshot) -> None:
        """Begin with a snapshot, whose memory belongs to the session from now on; for errors see `begin`."""
        self.begin(snapshot.contents, snapshot.version)
        self.groups = snapshot.groups

    def _new_store(self, parameters: Buffers, version: int) -> Store:
        return Store(
            self.plan.layout,
            self.plan.rule,
            self.groups,
            kernels=self._kernels,
            device=self.device,
            parameters=parameters,
            version=version,
        )

    # -- steps and writes -------------------------------------------------------------------------------------------

    def changed(self, changes: GroupChanges) -> dict[int, Hyper]:
        """Check changed options and return the groups they lead to.

        Raises:
            InvalidOption: an unknown group or option, or a value of a wrong type.
        """
        changed = {}
        for index, options in changes.items():
            if index >= len(self.groups):
                raise InvalidOption(
                    f"There is no param group {index}; the session has {len(self.groups)}.",
                    field="groups",
                    limit=len(self.groups),
                )
            current = self.groups[index]
            changed[index] = type(current).from_options({**current.to_options(), **options}, edited=True)
        return changed

    def set_groups(self, changed: Mapping[int, Hyper]) -> None:
        """Put changed groups into force, from the next step on."""
        self.groups = self._with(changed)

    def step(self, gradients: Gradients, changed: Mapping[int, Hyper]) -> Applied:
        """Take one step with changed groups, which stay in force if it is taken; for errors see `Store.apply`."""
        before, self.groups = self.groups, self._with(changed)
        try:
            return self.store.apply(self.groups, gradients)
        except BaseException:
            if not self.pending:
                self.groups = before
            raise

    def _with(self, changed: Mapping[int, Hyper]) -> Sequence[Hyper]:
        if not changed:
            return self.groups
        return [changed.get(index, group) for index, group in enumerate(self.groups)]

    def finish(self) -> Applied | None:
        """Complete a step that failed midway; see `Store.finish`."""
        return self.store.finish()

    def write(self, contents: Contents) -> None:
        """Replace contents, as one new version."""
        has = contents.has()
        self.store.write(contents.indices, self._values(contents), has=has)

    # -- reads and room for what arrives ----------------------------------------------------------------------------

    def intake(self, head: PutHead) -> Contents:
        """Return memory for contents that a header announces.

        Raises:
            InvalidOption, InvalidRequest, TensorMismatch: the header names what the session does not have.
        """
        if head.initial and (head.segments is not None or PARAM not in head.fields):
            raise TensorMismatch(
                "The first contents must hold every parameter.", field="fields", remedy="Send `param` whole."
            )
        count = len(self.plan.layout.segments)
        indices = range(count) if head.segments is None else from_ranges(head.segments, count)
        return Contents(self.plan.layout, self.plan.rule, head.fields, indices)

    def hold(self) -> Held:
        """Hold the current version, which nobody changes until it is released."""
        return self.store.hold()

    def copy(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> Contents:
        """Copy fields of the current version, of some segments or of all, but for those that none of them has.

        Raises:
            InvalidOption: a field the optimizer does not have.
            NotInitialised: the first parameters have not arrived.
        """
        store, rule = self.store, self.plan.rule
        chosen = range(len(self.plan.layout.segments)) if indices is None else indices
        every = store.all_counts()
        counts = every if indices is None else [every[index] for index in indices]
        used = {name for own in {id(each): each for each in counts if each}.values() for name in own.fields}
        kinds = rule.kinds
        fields = [name for name in fields if kinds.get(name, "element") in EVERYWHERE or name in used]
        contents = Contents(self.plan.layout, rule, fields, chosen)
        contents.allocate()
        for name, buffers in contents.elements.items():
            buffers.copy_(store.buffers(name), indices)
        names = tuple(kinds)
        for name, numbers in contents.numbers.items():
            if name == PRESENT:
                own = [mask_of((*rule.segment_fields, *each.fields), names) if each else 0 for each in counts]
                numbers.copy_(torch.tensor(own, dtype=torch.float64))
            else:
                numbers.copy_(torch.tensor([each or 0.0 for each in store.numbers(name, chosen)], dtype=torch.float64))
        return contents

    def snapshot(self) -> Snapshot:
        """Copy all of the current version, and the options now in force."""
        contents = self.copy((PARAM, *self.plan.rule.kinds, PRESENT))
        return Snapshot(self.plan, tuple(self.groups), contents, self.version)

    def nbytes(self) -> dict[str, int]:
        """Return the memory taken, in bytes by kind."""
        if self._store is None:
            return {"parameters": 0, "versions": 0, "state": 0}
        own = self._store.nbytes
        return {"parameters": own.parameters, "versions": own.versions, "state": own.state}

    def _values(self, contents: Contents) -> dict[str, Buffers | Sequence[float | None]]:
        """Return contents as the store takes them.

        Without `present` among them, a segment at step 0 has no state, unless the rule is eager.
        """
        values: dict[str, Buffers | Sequence[float | None]] = {
            name: on_device(buffers, self.device) for name, buffers in contents.elements.items()
        }
        told = PRESENT in contents.numbers or self.plan.rule.eager
        steps = contents.numbers["step"].tolist() if "step" in contents.numbers and not told else None
        for name, numbers in contents.numbers.items():
            if name == PRESENT:
                continue
            listed: list[float | None] = list(numbers.tolist())
            if steps is not None:
                listed = [value if step else None for value, step in zip(listed, steps, strict=True)]
            values[name] = listed
        return values
