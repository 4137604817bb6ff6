"""Compiled kernels that widen gradients and copy parameters on the way: the bits of passes of their own."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep_service.kernels import Kernels
from farstep_service.kernels.build import Report
from farstep_service.kernels.compiled_kernels import CompiledKernel
from farstep_service.kernels.fused import WIDEN, FusedKernel
from farstep_service.kernels.kernel import Call, Progress
from farstep_service.kernels.native import Bound
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import KernelSignature
from farstep_service.store import FlatBuffers, Gradients, HalfPrecisionBuffers, Store
from tests.store.conftest import all_bytes, noise
from tests.support.optimizers.compiled import HALF_PRECISION
from tests.support.store.half_precision import both

pytestmark = pytest.mark.timeout(600)  # the first run on a machine compiles

LAYOUT = Layout.build(
    SegmentSpec(name, shape, dtype)
    for name, shape, dtype in [("w", (WIDEN + 7,), "float32"), ("b", (41,), "float32"), ("h", (33,), "bfloat16")]
)


def store_of(rule: str, kernels: Kernels, options: dict[str, Any] | None = None) -> tuple[Store, list[Any]]:
    hypers = [RULES[rule].hyper.from_options(options or {"lr": 0.01})]
    return Store(LAYOUT, RULES[rule], hypers, kernels=kernels, parameters=noise(LAYOUT, 0)), hypers


def never(packages: Sequence[CompiledKernel], directory: Path, report: Report) -> None:
    """Build nothing."""
    for package in packages:
        report(package, "nobody is here")


@pytest.mark.parametrize("rule", [rule for rule, form in HALF_PRECISION if form.copy == "bfloat16"])
def test_a_program_for_16_bits_has_the_bits_of_the_usual_one(fused: Kernels, rule: str) -> None:
    """Several steps of every rule: parameters, state, and the answer that is written over the gradients."""
    here, hypers = store_of(rule, fused)
    there, _ = store_of(rule, fused)
    for seed in range(3):
        half_precision, wide = both(LAYOUT, "bfloat16", seed)
        assert isinstance(half_precision.buffers, HalfPrecisionBuffers)
        applied = here.apply(hypers, half_precision)
        assert (applied.kernel, applied.copied >= {0, 1}) == ("fused", True)
        assert there.apply(hypers, wide).kernel == "fused"
        assert all_bytes(here) == all_bytes(there)
        for index in (0, 1):
            new = here.buffers("param").segment(index).bfloat16()
            assert torch.equal(half_precision.buffers.memory.segment(index), new)


@pytest.mark.parametrize("copied", [False, True])
def test_so_has_one_for_float16(fused: Kernels, copied: bool) -> None:
    """With and without an answer in their place."""
    here, hypers = store_of("Adagrad", fused)
    there, _ = store_of("Adagrad", fused)
    for seed in range(3):
        half_precision, wide = both(LAYOUT, "float16", seed)
        applied = here.apply(hypers, half_precision if copied else Gradients(half_precision.buffers))
        assert bool(applied.copied) is copied
        there.apply(hypers, wide)
        assert all_bytes(here) == all_bytes(there)


def test_so_has_one_that_writes_a_copy_as_it_is(fused: Kernels) -> None:
    """As into memory that a worker shares: the parameters twice, in one pass."""
    here, hypers = store_of("Adagrad", fused)
    there, _ = store_of("Adagrad", fused)
    copy = FlatBuffers(LAYOUT)
    gradients = noise(LAYOUT, 1)
    applied = here.apply(hypers, Gradients(gradients, copy=copy))
    there.apply(hypers, Gradients(gradients))
    assert all_bytes(here) == all_bytes(there)
    assert applied.copied >= {0, 1}
    assert all(torch.equal(copy.segment(index), here.buffers("param").segment(index)) for index in applied.copied)


def test_until_there_is_one_blocks_are_widened_for_the_usual_one(fused: Kernels) -> None:
    """The step is fused and has the same bits; only the answer has to be copied by itself."""
    kernels = Kernels("auto", build=never)
    form = KernelSignature("float32")
    usual = fused.choose(RULES["Adam"], frozenset({form}), torch.device("cpu"), None)
    assert isinstance(usual, FusedKernel)
    here, hypers = store_of("Adam", kernels, {"weight_decay": 0.1})
    there, _ = store_of("Adam", fused, {"weight_decay": 0.1})
    for seed in range(2):
        half_precision, wide = both(LAYOUT, "float16", seed, [True, True, False])
        applied = here.apply(hypers, half_precision)
        assert (applied.kernel, applied.copied) == ("fused", frozenset())
        there.apply(hypers, wide)
        assert all_bytes(here) == all_bytes(there)


def test_a_block_that_fails_leaves_a_place_to_go_on_from() -> None:
    """Between widened blocks of one call, too: what is done is known, and the reference kernel does the rest."""
    rule = RULES["ASGD"]
    seen: list[int] = []

    def run(inputs: list[Tensor]) -> None:
        p, g, ax, _, out = inputs
        assert g.dtype is torch.float32
        if len(seen) == 2:
            raise RuntimeError("out of luck")
        out.copy_(p - 0.5 * g)
        ax.copy_(out)
        seen.append(len(p))

    def program(inputs: list[Tensor]) -> Bound:
        return partial(run, inputs)

    kernel = FusedKernel(rule, torch.device("cpu"))
    kernel.add(KernelSignature("float32"), program)
    length = 3 * WIDEN + 1
    p, g = torch.ones(length), torch.full((length,), 2.0, dtype=torch.bfloat16)
    call = Call(p, g, {"ax": torch.zeros(length)}, p, (1.0, 0.0, 1.0, -0.5, 1.0))
    progress = Progress()
    with pytest.raises(RuntimeError, match="out of luck"):
        kernel.execute([call], progress)
    assert progress.at[:2] == (0, 2 * WIDEN)
    ReferenceKernel(rule).execute([call], progress)
    assert bool((p == 0).all())
    assert torch.equal(call.state["ax"], p)


def test_a_gradient_of_another_kind_is_refused(fused: Kernels) -> None:
    """Only 16 bits are widened on the way; anything else never reaches a program that trusts its inputs."""
    kernel = fused.choose(RULES["Adagrad"], frozenset({KernelSignature("float32")}), torch.device("cpu"), None)
    p = torch.zeros(10)
    for wrong in (torch.zeros(10, dtype=torch.float64), torch.zeros(9, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="differ"):
            kernel.execute([Call(p, wrong, {"sum": p}, p, (1.0, 0.0, 1.0, 0.0))], Progress())
