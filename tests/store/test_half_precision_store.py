"""Gradients in 16 bits: a step along them has the bits of one along the same gradients widened first."""

import pytest
import torch

from farstep.protocol.codecs import FULL, codec_named
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import ElementwiseRule
from farstep_service.store import Gradients, HalfPrecisionBuffers
from tests.store.conftest import BrokenKernels, MakeStore, all_bytes, layout_for
from tests.support.store.half_precision import both, half_and_single

HALVES = ["bfloat16", "float16"]
MIXED = ("float32", "bfloat16", "float32", "complex64", "float64", "float32")
DENSE = [name for name, rule in RULES.items() if "reference" in rule.kernels and name not in ("SparseAdam", "LBFGS")]


def mixed_for(name: str) -> Layout:
    """Return a layout of all dtypes that a rule takes, in which neighbours here are none on the wire."""
    real = not isinstance(RULES[name], ElementwiseRule)
    return layout_for(name, dtypes=[dtype for dtype in MIXED if not (real and dtype == "complex64")])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", DENSE)
def test_a_step_has_the_bits_of_one_along_widened_gradients(make: MakeStore, name: str, dtype: str) -> None:
    """For every rule, all dtypes side by side, and some gradients missing in some steps."""
    layout = mixed_for(name)
    here, hypers = make(name, layout)
    there, _ = make(name, layout)
    for seed in range(4):
        present = None if seed % 2 else [index % 3 != seed % 3 for index in range(len(layout.segments))]
        half_precision, wide = both(layout, dtype, seed, present)
        here.apply(hypers, half_precision)
        there.apply(hypers, wide)
        assert all_bytes(here) == all_bytes(there)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["Adam", "Muon"])
def test_the_new_parameters_are_where_the_gradients_were(make: MakeStore, name: str, dtype: str) -> None:
    """In the dtypes of the wire, for each segment that the step names; what had no gradient is left alone."""
    layout = mixed_for(name)
    store, hypers = make(name, layout)
    present = [index != 2 for index in range(len(layout.segments))]
    gradients, _ = both(layout, dtype, 7, present)
    assert isinstance(gradients.buffers, HalfPrecisionBuffers)
    memory = gradients.buffers.memory
    before = memory.segment(2).clone()
    applied = store.apply(hypers, gradients)
    assert applied.copied == {index for index, its in enumerate(layout.segments) if index != 2 and its.length}
    for index in applied.copied:
        new = store.buffers("param").segment(index)
        assert torch.equal(memory.segment(index), new.to(memory.segment(index).dtype))
    assert torch.equal(memory.segment(2), before)


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_a_kernel_that_fails_midway_loses_no_gradient_that_is_still_needed(make: MakeStore, after: int) -> None:
    """Though new parameters are written over gradients: the step is finished with the bits of one that did not fail."""
    layout = mixed_for("Adadelta")
    kernels = BrokenKernels(after)
    broken, hypers = make("Adadelta", layout, kernels=kernels)
    whole, _ = make("Adadelta", layout)
    half_precision, wide = both(layout, "bfloat16", 3)
    whole.apply(hypers, wide)
    with pytest.raises(Exception, match="out of luck"):
        broken.apply(hypers, half_precision)
    broken.finish()
    assert all_bytes(broken) == all_bytes(whole)


def test_neighbours_that_are_apart_on_the_wire_are_apart_in_a_step(make: MakeStore) -> None:
    """Two float32 segments around a bfloat16 one: joined in the parameters, not in gradients that come in bfloat16."""
    layout = Layout.build(
        SegmentSpec(name, (8,), dtype) for name, dtype in [("a", "float32"), ("h", "bfloat16"), ("b", "float32")]
    )
    assert layout.apart_on_wire(codec_named("bfloat16")) == {2}
    assert layout.apart_on_wire(codec_named("float16")) == frozenset()
    assert layout.apart_on_wire(FULL) == frozenset()
    for dtype, runs in (("bfloat16", 3), ("float16", 2)):
        store, hypers = make("Adagrad", layout)
        half_precision, _ = half_and_single(layout, dtype, 1)
        assert store.apply(hypers, Gradients(half_precision)).runs == runs


def test_a_narrow_segment_looks_like_its_parameter() -> None:
    """Whoever asks for one as its parameter looks gets a copy in its shape and dtype."""
    layout = mixed_for("Adagrad")
    half_precision, wide = half_and_single(layout, "float16", 5)
    for index in range(len(layout.segments)):
        assert torch.equal(half_precision.segment(index), wide.segment(index))
    assert half_precision.nbytes < wide.nbytes
