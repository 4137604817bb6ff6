"""A step is all or nothing: whatever happens in the middle of it, nobody observes half of it."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest
import torch

from farstep.errors import StepInterrupted
from farstep_service.kernels.kernel import Call, Kernel, Progress, Rerun
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature
from farstep_service.store import BorrowedBuffers, Gradients, Store
from tests.store.conftest import (
    SHAPES,
    BrokenKernel,
    BrokenKernels,
    MakeStore,
    all_bytes,
    gradients_for,
    layout_for,
    layout_of,
    noise,
)

EVERYWHERE = range(0, 60, 1)


def expected(make: MakeStore, name: str, steps: int) -> list[bytes]:
    """Return what a store holds after steps that nothing interrupted."""
    layout = layout_for(name, groups=(0, 1))
    store, hypers = make(name, layout, kernels=BrokenKernels(10**9), options=({"lr": 0.1}, {"lr": 0.2}))
    for step in range(steps):
        store.apply(hypers, gradients_for(name, layout, 1 + step))
    return all_bytes(store)


@pytest.mark.promise(
    "A step that fails in the middle is finished before anything else: no version is ever half a step.",
    area="memory",
)
@pytest.mark.parametrize("held", [False, True], ids=["in place", "held"])
@pytest.mark.parametrize("name", [name for name in RULES if name != "SparseAdam"])  # which runs no kernel
def test_a_kernel_that_fails_anywhere_leaves_the_old_version_or_the_new_one(make: MakeStore, name: str, held: bool):
    """Wherever a write fails, the step stays pending, and finishing it gives the bits of a step without a failure."""
    wanted = expected(make, name, 2)
    failures = 0
    for after in EVERYWHERE:
        kernels = BrokenKernels(after)
        store, hypers = make(name, layout_for(name, groups=(0, 1)), kernels=kernels, options=({"lr": 0.1}, {"lr": 0.2}))
        reader = store.hold() if held else None
        before = bytes(store.buffers("param").segment(0).view(-1).view(torch.uint8).tolist())
        with suppress(StepInterrupted):
            store.apply(hypers, Gradients(noise(store.layout, 1)))
        if store.pending:
            failures += 1
            assert store.version == 0
        if reader:
            assert bytes(reader.segment(0).view(-1).view(torch.uint8).tolist()) == before
            reader.release()
        store.apply(hypers, Gradients(noise(store.layout, 2)))
        assert (store.pending, store.version) == (False, 2)
        assert all_bytes(store) == wanted, after
        if kernels.given and not kernels.given.failed:
            break
    assert failures >= 10


@pytest.mark.promise(
    "A step that fails in the middle is finished before anything else: no version is ever half a step.",
    area="memory",
)
def test_reading_finishes_the_step_first(make: MakeStore):
    """Whoever holds, reads or writes after a failure sees the whole step, counted once."""
    looks: list[Callable[[Store], object]] = [
        lambda store: store.hold().version,
        lambda store: (store.buffers("param"), store.version)[1],
        lambda store: store.numbers("step")[0],
    ]
    for look in looks:
        store, hypers = make(kernels=BrokenKernels(3))
        with pytest.raises(StepInterrupted):
            store.apply(hypers, Gradients(noise(store.layout, 1)))
        assert look(store) == 1
        assert store.finish() is None


def test_finishing_says_what_ran(make: MakeStore):
    """A step that a fused kernel began and the reference kernel finished is called mixed."""
    for after, kernel in ((5, "mixed"), (0, "mixed"), (10**9, "fused")):
        store, hypers = make(kernels=BrokenKernels(after, name="fused"))
        gradients = Gradients(noise(store.layout, 1))
        if after < 10**9:
            with pytest.raises(StepInterrupted):
                store.apply(hypers, gradients)
            applied = store.finish()
        else:
            applied = store.apply(hypers, gradients)
        assert applied is not None
        assert (applied.version, applied.kernel) == (1, kernel)


class Skewed(Kernel):
    """A kernel whose bits are its own: it takes every gradient twice."""

    name = "fused"

    def __init__(self, whole: Kernel) -> None:
        self._whole = whole

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        self._whole.execute([call._replace(g=call.g * 2) for call in calls], progress)


class SkewedKernels(BrokenKernels):
    """Gives out skewed kernels as the fused ones, of which the first fails once."""

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        whole = Skewed(self.reference(rule))
        if self.given is None:
            self.given = BrokenKernel(whole, self._after, "fused", self._error)
            return self.given
        return whole


def test_a_step_of_two_kernels_runs_again_to_the_same_bits(make: MakeStore):
    """Wherever the reference kernel went on with a fused step: told where, a replay gives the same bits."""
    different, switches = set(), set()
    for after in EVERYWHERE:
        store, hypers = make("Adagrad", kernels=SkewedKernels(after))
        with suppress(StepInterrupted):
            store.apply(hypers, Gradients(noise(store.layout, 1)))
        if not store.pending:
            break
        applied = store.finish()
        assert applied is not None
        again, _ = make("Adagrad", kernels=SkewedKernels(10**9))
        rerun = again.apply(hypers, Gradients(noise(store.layout, 1)), rerun=Rerun(applied.kernel, applied.switched))
        assert (rerun.kernel, rerun.switched) == (applied.kernel, applied.switched)
        assert all_bytes(again) == all_bytes(store)
        different.add(tuple(all_bytes(store)))
        switches.add((applied.kernel, applied.switched))
    assert len(different) == len(switches) >= 4


def test_a_refused_step_changes_nothing(make: MakeStore):
    """What is wrong with a step is found before anything is written."""
    store, hypers = make("Adagrad", options=({"weight_decay": 0.1},))
    before = all_bytes(store)
    rows = (torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 3))
    with pytest.raises(Exception, match="weight_decay option is not compatible with sparse gradients"):
        store.apply(hypers, Gradients(noise(store.layout, 1), sparse={4: rows}))
    assert all_bytes(store) == before
    assert (store.version, store.pending) == (0, False)


def test_options_that_divide_by_zero_change_nothing(make: MakeStore):
    """Numbers that do not exist are an error that names the options, not half a step."""
    store, hypers = make("Adamax")
    hypers = [type(hypers[0]).from_options({"betas": (1.0, 0.9)}, edited=True)]
    with pytest.raises(ValueError, match="Adamax cannot step with"):
        store.apply(hypers, Gradients(noise(store.layout, 1)))
    assert (store.version, store.pending) == (0, False)


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_an_interrupt_from_the_keyboard_comes_after_the_step(make: MakeStore, after: int):
    """Control-C in the middle of a step completes it before it goes on its way."""
    kernels = BrokenKernels(after, error=KeyboardInterrupt())
    store, hypers = make("Adadelta", layout_of(groups=(0, 1)), kernels=kernels, options=({"lr": 0.1}, {"lr": 0.2}))
    with pytest.raises(KeyboardInterrupt):
        store.apply(hypers, Gradients(noise(store.layout, 1)))
    assert (store.version, store.pending) == (1, False)
    assert all_bytes(store) == expected(make, "Adadelta", 1)


def test_the_users_tensors_are_whole_after_the_step_is_finished(make: MakeStore):
    """In the user's own memory, finishing brings what was gathered back to its tensors."""
    layout = layout_of()
    source = noise(layout, 0)
    tensors = [source.segment(index).clone() for index in range(len(SHAPES))]
    lent = BorrowedBuffers(layout, tensors, small=40)
    store, hypers = make("Adadelta", layout, kernels=BrokenKernels(4), parameters=lent)
    with pytest.raises(StepInterrupted):
        store.apply(hypers, Gradients(noise(layout, 1)))
    store.finish()
    whole, _ = make("Adadelta", layout, kernels=BrokenKernels(10**9))
    whole.apply(hypers, Gradients(noise(layout, 1)))
    for index, tensor in enumerate(tensors):
        assert torch.equal(tensor, whole.buffers("param").segment(index))
