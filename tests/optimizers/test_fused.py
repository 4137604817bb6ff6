"""The fused kernel: torch's numbers, within torch's tolerance for fused ones, and one program for all options."""

import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from farstep_service.kernels import Kernels
from farstep_service.kernels.build import Report
from farstep_service.kernels.compiled_kernels import CompiledKernel
from farstep_service.kernels.fused import FusedKernel
from farstep_service.kernels.kernel import Call, Progress, Rerun
from farstep_service.kernels.native import Bound
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import KernelSignature
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store
from tests.support.optimizers.twins import OPTIONS, SHAPES, Twins

pytestmark = pytest.mark.timeout(600)  # the first run on a machine compiles

CASES = [(name, options) for name, every in OPTIONS.items() for options in every]
IDS = [f"{name}-{','.join(map(str, options)) or 'defaults'}" for name, options in CASES]


@pytest.mark.promise(
    "Fused kernels are within torch's own tolerance, and no further from the float64 result than torch is.",
    area="bits of torch",
)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_fused_float32_is_within_tolerance(fused: Kernels, name: str, options: dict[str, Any]):
    """After 50 steps, every option of every rule is within `assert_close`'s tolerance of torch.optim."""
    twins = Twins(name, groups=[options, {"lr": 0.05}], kernels=fused).run(50)
    twins.check_close()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Adadelta", torch.float64),
        ("Adadelta", torch.complex128),
        ("Adagrad", torch.bfloat16),
        ("Adam", torch.complex128),
    ],
    ids=str,
)
def test_fused_in_other_dtypes_is_within_tolerance(fused: Kernels, name: str, dtype: torch.dtype):
    """Double precision, complex parameters and half precision are within tolerance, too."""
    twins = Twins(name, dtype, groups=[{"weight_decay": 0.01}], kernels=fused).run(5)
    # torch rounds half precision after every operation, the kernel once.
    twins.check_close(**({"rtol": 1.6e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}))


def test_the_kernel_that_ran_is_named(fused: Kernels):
    """A step says which kernel ran, and a replay can ask for the other."""
    layout = Layout.build([SegmentSpec("w", (10,), "float32")])
    hypers = [RULES["Adagrad"].hyper()]
    store = Store(layout, RULES["Adagrad"], hypers, kernels=fused)
    gradients = Gradients(FlatBuffers(layout))
    assert store.apply(hypers, gradients).kernel == "fused"
    assert store.apply(hypers, gradients, rerun=Rerun("reference")).kernel == "reference"


def test_a_changed_option_builds_nothing(fused: Kernels, tmp_path: Path):
    """Learning rate, weight decay and sign are numbers of one program; changing them neither builds nor loads."""
    built: list[CompiledKernel] = []

    def never(packages: Sequence[CompiledKernel], directory: Path, report: Report) -> None:
        built.extend(packages)

    kernels = Kernels("fused", build=never)
    twins = Twins("Adagrad", kernels=kernels)
    before = kernels.status()
    for step in range(10):
        twins.change(0, lr=0.1 / (1 + step), weight_decay=0.01 * step, maximize=step % 2 == 0)
        twins.step()
    assert built == []
    assert kernels.status() == before
    twins.check_close()


def test_the_users_own_tensors(fused: Kernels):
    """An embedded step, some tensors gathered and some in place, is within tolerance and changes no storage."""
    noise = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=noise).requires_grad_() for shape in SHAPES]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    places = [p.data_ptr() for p in ours]
    optimizer = torch.optim.Adamax(theirs, foreach=False)
    layout = Layout.build(SegmentSpec(str(index), tuple(p.shape), "float32") for index, p in enumerate(ours))
    rule = RULES["Adamax"]
    hypers = [rule.hyper()]
    store = Store(layout, rule, hypers, kernels=fused, parameters=BorrowedBuffers(layout, ours, small=500))
    gradients = BorrowedBuffers(layout, small=500)
    for _ in range(20):
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=noise)
        optimizer.step()
        gradients.lend([p.grad for p in theirs])
        assert store.apply(hypers, Gradients(gradients)).kernel == "fused"
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert [p.data_ptr() for p in ours] == places


def test_one_element_and_none(fused: Kernels):
    """Runs too short for a compiled program take part in a fused step."""
    layout = Layout.build(
        [SegmentSpec("a", (), "float32"), SegmentSpec("b", (0,), "float64"), SegmentSpec("c", (1,), "float64")]
    )
    rule = RULES["Adadelta"]
    hypers = [rule.hyper()]
    store = Store(layout, rule, hypers, kernels=fused)
    gradients = FlatBuffers(layout)
    for tensor in gradients.flat.values():
        tensor.fill_(1.0)
    applied = store.apply(hypers, Gradients(gradients))
    assert (applied.kernel, applied.runs) == ("fused", 2)
    moved = torch.optim.Adadelta([torch.zeros(()).requires_grad_()])
    (p,) = moved.param_groups[0]["params"]
    p.grad = torch.ones(())
    moved.step()
    assert torch.equal(store.buffers("param").segment(0), p.detach())


def test_a_long_step_lets_other_threads_go_on(fused: Kernels):
    """While a long program runs, whoever waits for the interpreter gets it: the event loop, another session's step."""
    rule = RULES["ASGD"]
    kernel = fused.choose(rule, frozenset({KernelSignature("float32")}), torch.device("cpu"), None)
    length = 2**23
    p, g, ax = torch.ones(length), torch.zeros(length), torch.zeros(length)
    call = Call(p, g, {"ax": ax}, p, (1.0, 0.0, 1.0, -0.5, 1.0))
    start, started = threading.Lock(), False

    def other() -> None:
        nonlocal started
        with start:
            started = True

    start.acquire()
    thread = threading.Thread(target=other)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e6)  # from here on only who gives the interpreter up gives it to others
    try:
        start.release()
        for _ in range(200):  # the machine may be busy
            kernel.execute([call], Progress())
            if started:
                break
    finally:
        sys.setswitchinterval(before)
    assert started
    thread.join()
    assert torch.equal(ax, p)


@pytest.mark.parametrize("after", range(3))
def test_a_program_that_fails_leaves_a_place_to_go_on_from(after: int):
    """Wherever a program fails, what is done is known, and the reference kernel does the rest with the same result."""
    rule = RULES["ASGD"]
    programs_run: list[int] = []

    def run(inputs: list[torch.Tensor]) -> None:
        p, g, ax, _, out = inputs
        if len(programs_run) == after:
            raise RuntimeError("out of luck")
        out.copy_(p - 0.5 * g)
        ax.copy_(out)
        programs_run.append(len(p))

    def program(inputs: list[torch.Tensor]) -> Bound:
        return partial(run, inputs)

    kernel = FusedKernel(rule, torch.device("cpu"))
    kernel.add(KernelSignature("float32"), program)
    lengths = (5, 1, 2**21 + 7, 3)
    calls = []
    for length in lengths:
        p = torch.ones(length)
        calls.append(Call(p, torch.full((length,), 2.0), {"ax": torch.zeros(length)}, p, (1.0, 0.0, 1.0, -0.5, 1.0)))
    progress = Progress()
    with pytest.raises(RuntimeError, match="out of luck"):
        kernel.execute(calls, progress)
    assert progress.at[:2] == ((0, 0), (2, 0), (3, 0))[after]
    ReferenceKernel(rule).execute(calls, progress)
    for call in calls:
        assert bool((call.p == 0).all())
        assert torch.equal(call.state["ax"], call.p)


def test_memory_that_does_not_fit_is_refused(fused: Kernels):
    """Tensors of different lengths, dtypes or strides never reach a compiled program, which would write beyond them."""
    rule = RULES["Adagrad"]
    kernel = fused.choose(rule, frozenset({KernelSignature("float32")}), torch.device("cpu"), None)
    p = torch.zeros(10)
    for wrong in (torch.zeros(9), torch.zeros(10, dtype=torch.float64), torch.zeros(20)[::2]):
        with pytest.raises(ValueError, match="differ"):
            kernel.execute([Call(p, wrong, {"sum": p}, p, (1.0, 0.0, 1.0, 0.0))], Progress())
