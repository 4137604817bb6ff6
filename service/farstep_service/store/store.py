"""The store of one session: its parameters, its optimizer state, and all changes of them.

    apply(groups, gradients)     one step: all of it or, after a failure, nothing visible until it is finished
    hold()                       the current version, which does not change until it is released
    write(segments, contents)    other contents, as one new version
    append(layout, ...)          more segments at the end, as one new version
    buffers(field), numbers()    what is there now, to be copied before anything else is called

A step is decided before anything is written, and all its errors are found then. If a kernel fails midway, the step
stays pending, and `finish` rolls it forward with the reference kernel before anything else happens: no reader sees half
a step, and the version number changes when the step is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, final

import torch

from farstep.errors import StepInterrupted, TensorMismatch
from farstep.protocol.hyper import Hyper
from farstep_service.kernels.kernel import Kernel, KernelSource, Rerun
from farstep_service.layout import Layout
from farstep_service.optimizers.rule import AnyRule, Fields, KernelName, SegmentCounters
from farstep_service.store.buffers import Buffers, FlatBuffers
from farstep_service.store.decider import Decider
from farstep_service.store.gradients import Gradients
from farstep_service.store.optimizer_state import PARAMETERS, FieldValues, Number, OptimizerState
from farstep_service.store.step import Applied, Step, VersionRecord
from farstep_service.store.versions import Held, Versions


@dataclass(frozen=True, slots=True)
class StoreBytes:
    """Memory of a store.

    Attributes:
        parameters: the current version; for borrowed memory only the staging memory.
        versions: older versions that are still held, and the spare.
        state: the tensor fields.
    """

    parameters: int
    versions: int
    state: int

    @property
    def total(self) -> int:
        """Return all of it."""
        return self.parameters + self.versions + self.state


_NOTHING: Final = nullcontext()


def without_grad() -> AbstractContextManager[object]:
    """Return what keeps torch from recording; a server's threads never do, and entering `no_grad` costs 3 us."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


@final
class Store:
    """A session's parameters and state.

    All methods wait for a step that runs in another thread, except `Held.release`.

    Args:
        layout: the segments.
        rule: the optimizer.
        groups: options of each param group at construction, which define the initial state.
        kernels: the source of kernels.
        device: the device of state and parameters.
        parameters: the parameters; zeros if None. The store takes ownership of flat buffers.
        version: the number of the first version.
    """

    def __init__(
        self,
        layout: Layout,
        rule: AnyRule,
        groups: Sequence[Hyper],
        *,
        kernels: KernelSource,
        device: torch.device | str = "cpu",
        parameters: Buffers | None = None,
        version: int = 0,
    ) -> None:
        self.layout = layout
        self.rule = rule
        self.device = torch.device(device)
        self._kernels = kernels
        decider = Decider(layout, rule, kernels, self.device)
        decider.check_groups(groups)
        parameters = parameters or FlatBuffers(layout, self.device)
        if parameters.layout != layout or parameters.device != self.device:
            raise TensorMismatch("The parameters are not in the session's layout, or not on its device.")
        decider.prepare(groups)
        self._lock = threading.RLock()
        self._decider = decider
        self._pending: Step | None = None
        self._versions = Versions(parameters, version)
        self._state = OptimizerState(layout, rule, groups, self.device)
        every = range(len(layout.segments))
        self._now = VersionRecord(
            version, [self._state.initial_counts(index) for index in every], [version for _ in every]
        )

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Return the number of the last complete version."""
        return self._now.version

    @property
    def pending(self) -> bool:
        """Return whether a step failed midway and must be finished; its gradients must be kept until then."""
        return self._pending is not None

    @property
    def nbytes(self) -> StoreBytes:
        """Return the memory allocated now."""
        return StoreBytes(
            self._versions.current.nbytes,
            self._versions.other_bytes,
            self._state.nbytes,
        )

    @property
    def held_bytes(self) -> int:
        """Return all of `nbytes` together."""
        return self._versions.current.nbytes + self._versions.other_bytes + self._state.nbytes

    def check_step(self, groups: Sequence[Hyper], changed: Container[int]) -> None:
        """Refuse options of changed groups with which their next step would fail.

        Raises:
            InvalidOption: naming the cause.
        """
        with self._lock:
            self._decider.check_step(groups, changed, self._now.counts)

    def coming_bytes(self, groups: Sequence[Hyper]) -> int:
        """Return the additional memory that a step with these options takes."""
        names = {name for group in groups for name in self.rule.optional(group)} if self.rule.optional_fields else ()
        return self._versions.coming_bytes + (self._state.missing_bytes(names) if names else 0)

    def hold(self) -> Held:
        """Return the current version, which does not change until it is released.

        Raises:
            StepInterrupted: a pending step could not be finished.
        """
        with self._lock, without_grad():
            if self._pending is not None:
                self.finish()
            return self._versions.hold(self._now.version, self._now.changed)

    def buffers(self, field: str) -> Buffers:
        """Return the memory of the parameters (`param`) or of a tensor field; the next step changes it."""
        with self._lock:
            if self._pending is not None:
                self.finish()
            if field == PARAMETERS:
                return self._versions.current
            self._state.check_field(field, self.rule.tensor_fields)
            return self._state.memory(field)

    def counts(self, segment: int) -> SegmentCounters | None:
        """Return a segment's counts, None without state."""
        with self._lock:
            self.finish()
            return self._now.counts[segment]

    def all_counts(self) -> Sequence[SegmentCounters | None]:
        """Return each segment's counts, None without state."""
        with self._lock:
            self.finish()
            return self._now.counts

    def numbers(self, field: str, segments: Sequence[int] | None = None) -> list[Number | None]:
        """Return a field with one number per segment, such as `step`; None for a segment without state."""
        self._state.check_field(field, self.rule.number_fields)
        with self._lock:
            self.finish()
            counts = self._now.counts
            chosen = counts if segments is None else [counts[index] for index in segments]
            return [None if each is None else getattr(each, field) for each in chosen]

    # -- steps --------------------------------------------------------------------------------------------------------

    def apply(self, groups: Sequence[Hyper], gradients: Gradients, *, rerun: Rerun | None = None) -> Applied:
        """Take one step.

        Args:
            groups: options of each param group.
            gradients: of the step. They must not change until it is complete.
            rerun: how it ran before, for a replay; None for the best kernel available.

        Raises:
            FarstepError: the step is refused; nothing has changed.
            StepInterrupted: a kernel failed midway; the step is pending.
        """
        with self._lock, without_grad():
            if self._pending is not None:
                self.finish()
            wanted: KernelName | None = None
            if rerun is not None:
                wanted = "fused" if rerun.kernel == "mixed" else rerun.kernel
            step, chosen = self._decider.decide(groups, gradients, self._versions, self._state, self._now, wanted)
            self._pending = step
            if rerun is not None and rerun.kernel == "mixed":
                step.begin(chosen, rerun.switched)
                chosen = self._kernels.reference(self.rule)
            return self._carry_out(step, chosen)

    def finish(self) -> Applied | None:
        """Complete a pending step with the reference kernel; return None if there was none.

        Raises:
            StepInterrupted: it failed again, and is still pending.
        """
        if not self.pending:
            return None
        with self._lock, torch.no_grad():
            step = self._pending
            return step and self._carry_out(step, self._kernels.reference(self.rule))

    def _carry_out(self, step: Step, kernel: Kernel) -> Applied:
        try:
            applied = step.carry_out(kernel)
        except Exception as exc:
            raise StepInterrupted(
                f"A kernel failed in the middle of a step: {exc}",
                remedy="The step is finished before anything else happens; ask again under the same name.",
            ) from exc
        except BaseException:
            # A keyboard interrupt is passed on when the step is complete.
            step.carry_out(self._kernels.reference(self.rule))
            self._complete(step)
            raise
        self._complete(step)
        return applied

    def _complete(self, step: Step) -> None:
        self._versions.publish(step.target, step.after.version)
        self._now = step.after
        self._pending = None

    # -- other contents -----------------------------------------------------------------------------------------------

    def write(
        self,
        segments: Sequence[int],
        contents: Mapping[str, FieldValues],
        *,
        has: Sequence[Fields | None] | None = None,
        bump: bool = True,
    ) -> None:
        """Replace fields of some segments, as one new version.

        Args:
            segments: which ones.
            contents: for `param` and tensor fields, buffers in the store's layout, or in the one derived for the field;
                for fields with one number per segment, that number for each of `segments`, or None to take the
                segment's state away.
            has: for each of `segments` the tensor fields it has afterwards, None for no state. By default a segment has
                its earlier fields, the written ones, and those that the rule always has.
            bump: increment the version; without it the contents belong to the present version, as the first ones do.

        Raises:
            TensorMismatch: an unknown field, another layout, or an invalid number; nothing has changed.
        """
        with self._lock, torch.no_grad():
            self.finish()
            counts = self._state.counts_with(self._now.counts, segments, contents, has)
            version = self.version + bump
            parameters = contents.get(PARAMETERS)
            fields = {
                field: values
                for field, values in contents.items()
                if isinstance(values, Buffers) and field != PARAMETERS
            }
            self._state.take_memory(fields)  # all of it before anything is written
            if isinstance(parameters, Buffers):
                self._write_parameters(segments, parameters, version)
            for field, values in fields.items():
                self._state.memory(field).copy_(values, segments)
            self._state.clear_absent(segments, counts)
            self._state.refill([index for index in segments if counts[index] is None])
            self._decider.forget()
            self._now = VersionRecord(version, counts, self._now.marked(segments if parameters else (), version))

    def append(self, layout: Layout, groups: Sequence[Hyper], parameters: Buffers) -> None:
        """Grow by the segments at the end of a longer layout, as one new version.

        Any failure, also for lack of memory, leaves the store unchanged.

        Args:
            layout: this one with more segments; the present ones keep their positions.
            groups: options of each param group of it.
            parameters: memory of that layout with the parameters of the new segments, owned by the store from now on.
                The present ones are copied into it, unless it is the user's and has them.
        """
        with self._lock, torch.no_grad():
            self.finish()
            if parameters.layout is not layout or parameters.device != self.device:
                raise TensorMismatch("The parameters are not in the session's new layout, or not on its device.")
            present, count = len(self.layout.segments), len(layout.segments)
            decider = Decider(layout, self.rule, self._kernels, self.device)
            decider.prepare(groups)
            if isinstance(parameters, FlatBuffers):
                parameters.copy_(self._versions.current, range(present))
            state = self._state.appended(layout, groups)
            version = self.version + 1
            born = [state.initial_counts(index) for index in range(present, count)]
            now = VersionRecord(
                version, [*self._now.counts, *born], [*self._now.changed, *[version] * (count - present)]
            )
            self._versions.grow(parameters, version)
            self.layout, self._decider, self._state, self._now = layout, decider, state, now

    def _write_parameters(self, segments: Sequence[int], values: Buffers, version: int) -> None:
        """Copy parameters into the next version's memory."""
        target = self._versions.target()
        if isinstance(target.buffers, FlatBuffers):
            if target.buffers is not self._versions.current and (stale := self._now.stale(target.version, segments)):
                target.buffers.copy_(self._versions.current, stale)
            target.buffers.copy_(values, segments)
        else:
            for index in segments:
                target.buffers.segment(index).copy_(values.segment(index))
        self._versions.publish(target, version)
