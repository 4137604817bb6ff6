"""Parameters and state of an optimizer whose step is one push: the store applies the rule, a kernel runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch

from farstep.errors import InvalidRequest
from farstep.protocol import policies
from farstep.protocol.fields import EVERYWHERE, PRESENT, mask_of
from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import Evaluation
from farstep.protocol.policies import EMA
from farstep_service.kernels.kernel import KernelSource, Rerun
from farstep_service.optimizers.rule import AnyRule
from farstep_service.plan import Plan
from farstep_service.store import Applied, Buffers, Gradients, Held, Store, check_first_step
from farstep_service.tensors.contents import PARAM, Contents
from farstep_service.tensors.contribution import on_device
from farstep_service.tensors.policies import Average
from farstep_service.tensors.state import NO_GROUPS, SessionState, with_lr_times


@final
class KernelState(SessionState):
    """Hold one session's tensors and options.

    Args:
        plan: what the session is.
        rule: its update rule.
        kernels: runs the update rule.
        device: where parameters and state live.
    """

    takes_half_precision = True

    def __init__(self, plan: Plan, rule: AnyRule, *, kernels: KernelSource, device: torch.device) -> None:
        super().__init__(plan, device=device)
        self._rule = rule
        self._kernels = kernels
        self._store: Store | None = None
        wanted = plan.policies.of_kind(policies.Average)
        self._average = None if wanted is None or wanted.ema is None else Average(wanted.ema)

    @property
    def initialised(self) -> bool:
        """Return whether the first parameters have arrived."""
        return self._store is not None

    @property
    def version(self) -> int:
        """Return the number of the last complete version."""
        return self._store.version if self._store else 0

    @property
    def pending(self) -> bool:
        """Return whether a step failed midway and has to be finished."""
        return self._store is not None and self._store.pending

    @property
    def store(self) -> Store:
        """Return the store, after a step that failed midway.

        Raises:
            NotInitialised: the first parameters have not arrived.
            StepInterrupted: that step failed again.
        """
        store = self._store
        if store is None:
            raise self.without_parameters()
        if store.pending:
            self.finish()
        return store

    @property
    def held_bytes(self) -> int:
        views = 0 if self._average is None else self._average.nbytes
        return views if self._store is None else self._store.held_bytes + views

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
        average = contents.elements.pop(EMA, None)
        has = contents.has()
        if values := self._values(contents):
            store.write(contents.indices, values, has=has, bump=False)
        if average is not None and self._average is not None:
            self._average.adopt(average, self.device)
        self._store = store

    def _new_store(self, parameters: Buffers, version: int) -> Store:
        return Store(
            self.plan.layout,
            self._rule,
            self.groups,
            kernels=self._kernels,
            device=self.device,
            parameters=parameters,
            version=version,
        )

    def append(self, plan: Plan, parameters: Buffers) -> None:
        store = self.store
        average = None if self._average is None else self._average.grown(parameters)
        store.append(plan.layout, plan.groups, parameters)
        self._average = average
        self.groups = (*self.groups, *plan.groups[len(self.plan.groups) :])
        self.plan = plan

    def check_step(self, changed: Mapping[int, Hyper]) -> None:
        if not changed:
            return
        if self._store is not None:
            self._store.check_step(self._with(changed), changed)
        else:
            check_first_step(self.plan.layout, self._rule, self._with(changed))

    # -- steps and writes -------------------------------------------------------------------------------------------

    def check_evaluation(self, evaluation: Evaluation | None) -> None:
        if evaluation is not None:
            raise InvalidRequest(
                f"{self.plan.rule.name} does not ask for a loss.", remedy="Send gradients only.", field="loss"
            )

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
        """Take one step with changed groups, which stay in force if it is taken; for errors see `Store.apply`."""
        before = of_step = self.groups
        if changed or passing:
            of_step, self.groups = self._with(changed, passing), self._with(changed)
        store = self.store
        version = store.version
        try:
            if self._average is not None:
                self._average.prepare(store.buffers(PARAM))
            groups = of_step if lr_factor == 1.0 else [with_lr_times(group, lr_factor) for group in of_step]
            return store.apply(groups, gradients, rerun=rerun)
        except BaseException:
            if not store.pending:
                self.groups = before
            raise
        finally:
            if self._average is not None and store.version != version:
                self._average.update_(store.buffers(PARAM))

    def finish(self) -> Applied | None:
        """Complete a step that failed midway; see `Store.finish`."""
        if self._store is None:
            raise self.without_parameters()
        applied = self._store.finish()
        if applied is not None and self._average is not None:
            self._average.update_(self._store.buffers(PARAM))
        return applied

    def write(self, contents: Contents) -> None:
        """Replace contents, as one new version."""
        store, has, arrived = self.store, contents.has(), contents.elements.pop(EMA, None)
        average = None if arrived is None or self._average is None else on_device(arrived, self.device)
        if self._average is not None and average is not None:
            self._average.prepare(store.buffers(PARAM))
        values = self._values(contents)
        if values or has is not None:
            store.write(contents.indices, values, has=has)
        if self._average is not None and average is not None:
            self._average.write_(contents.indices, average, store.buffers(PARAM))

    # -- reads and room for what arrives ----------------------------------------------------------------------------

    def parameters(self) -> Buffers:
        return self.store.buffers(PARAM)

    def hold(self) -> Held:
        """Hold the current version, which stays unchanged until it is released."""
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
        contents = Contents(self.plan.layout, rule, fields, chosen, views=self.plan.policies.views)
        contents.allocate()
        for name, buffers in contents.elements.items():
            buffers.copy_(self._view() if name == EMA else store.buffers(name), indices)
        names = tuple(kinds)
        for name, numbers in contents.numbers.items():
            if name == PRESENT:
                own = [mask_of((*rule.number_fields, *each.fields), names) if each else 0 for each in counts]
                numbers.copy_(torch.tensor(own, dtype=torch.float64, device="cpu"))
            else:
                numbers.copy_(
                    torch.tensor(
                        [each or 0.0 for each in store.numbers(name, chosen)], dtype=torch.float64, device="cpu"
                    )
                )
        return contents

    def _view(self) -> Buffers:
        """Return the average of the parameters; before the first step, the parameters."""
        average = None if self._average is None else self._average.buffers
        return self.store.buffers(PARAM) if average is None else average

    @property
    def views(self) -> tuple[str, ...]:
        return () if self._average is None or self._average.buffers is None else (EMA,)

    def coming_bytes(self, growing: int = 0) -> int:
        layout, rule = self.plan.layout, self._rule
        views = 0 if self._average is None or self._average.nbytes else layout.nbytes
        if self._store is not None and growing:
            own = self._store.nbytes
            return (own.parameters + own.state + views) * (layout.nbytes + growing) // max(1, layout.nbytes)
        if self._store is not None:
            return self._store.coming_bytes(self.groups) + views
        eager = [name for name in rule.tensor_fields if name not in rule.optional_fields]
        return views + sum(layout.derived(rule.kinds[name]).nbytes for name in eager)

    def nbytes(self) -> dict[str, int]:
        """Return the memory taken, in bytes by kind."""
        views = {} if self._average is None else {"views": self._average.nbytes}
        if self._store is None:
            return {"parameters": 0, "versions": 0, "state": 0, **views}
        own = self._store.nbytes
        return {"parameters": own.parameters, "versions": own.versions, "state": own.state, **views}

    def _values(self, contents: Contents) -> dict[str, Buffers | Sequence[float | None]]:
        """Return contents as the store takes them.

        Without `present` among them, a segment at step 0 has no state, unless the rule is eager.
        """
        values: dict[str, Buffers | Sequence[float | None]] = {
            name: on_device(buffers, self.device) for name, buffers in contents.elements.items()
        }
        told = PRESENT in contents.numbers or self.plan.rule.has_initial_state
        steps = contents.numbers["step"].tolist() if "step" in contents.numbers and not told else None
        for name, numbers in contents.numbers.items():
            if name == PRESENT:
                continue
            listed: list[float | None] = list(numbers.tolist())
            if steps is not None:
                listed = [value if step else None for value, step in zip(listed, steps, strict=True)]
            values[name] = listed
        return values
