"""Neighbouring segments are updated together where a step means the same for them."""

import pytest
import torch

from farstep_service.optimizers import RULES
from farstep_service.store import FlatBuffers, Gradients
from tests.store.conftest import MakeStore, gradients_for, layout_of, noise

SIX = tuple((size,) for size in (3, 5, 7, 2, 4, 6))


def test_a_step_is_one_call(make: MakeStore):
    """Without groups and gaps, all segments are one run."""
    store, hypers = make(layout=layout_of(SIX))
    assert store.apply(hypers, Gradients(noise(store.layout, 0))).runs == 1


def test_each_group_is_a_run(make: MakeStore):
    """Groups with other options are other runs; groups with equal ones are not."""
    layout = layout_of(SIX, groups=(0, 0, 0, 1, 1, 1))
    store, hypers = make(layout=layout, options=({"lr": 0.1}, {"lr": 0.2}))
    assert store.apply(hypers, Gradients(noise(layout, 0))).runs == 2
    assert store.apply([hypers[0], hypers[0]], Gradients(noise(layout, 0))).runs == 1
    assert store.apply(hypers, Gradients(noise(layout, 0))).runs == 2


def test_dtypes_that_take_turns_are_one_run_each(make: MakeStore):
    """Segments of one dtype are joined although others lie between them, complex ones with their parts."""
    layout = layout_of(SIX, ("float32", "float64", "complex64"))
    store, hypers = make(layout=layout)
    # The second complex segment would begin at an odd place, so an element is left out before it.
    assert store.apply(hypers, Gradients(noise(layout, 0))).runs == 3


def test_sgd_keeps_complex_numbers_apart_from_real_ones(make: MakeStore):
    """A rule that torch computes with complex numbers has no run of both, but joins neighbours of a kind."""
    layout = layout_of(SIX, ("float32", "complex64", "complex64"))
    store, hypers = make("SGD", layout)
    assert store.apply(hypers, Gradients(noise(layout, 0))).runs == 4


def test_a_missing_gradient_interrupts_a_run(make: MakeStore):
    """A segment without a gradient is left alone, its step count too, and cuts its neighbours apart."""
    store, hypers = make("Adamax", layout_of(SIX))
    before = store.buffers("param").segment(2).clone()
    applied = store.apply(hypers, Gradients(noise(store.layout, 0), [True, True, False, True, True, True]))
    assert applied.runs == 2
    assert store.numbers("step") == [1, 1, None, 1, 1, 1]
    assert torch.equal(store.buffers("param").segment(2), before)


def test_other_counts_are_other_runs_where_they_matter(make: MakeStore):
    """Step counts separate neighbours if the rule's numbers depend on them, and only then."""
    for name, runs in (("Adamax", 3), ("Adadelta", 1)):
        store, hypers = make(name, layout_of(SIX))
        store.apply(hypers, Gradients(noise(store.layout, 0), [True, True, False, True, True, True]))
        for _ in range(3):
            assert store.apply(hypers, Gradients(noise(store.layout, 0))).runs == runs
        assert store.numbers("step") == [4, 4, 3, 4, 4, 4]


def test_no_gradient_at_all_is_a_step_without_calls(make: MakeStore):
    """A step without gradients makes a version and changes nothing."""
    store, hypers = make(layout=layout_of(SIX))
    applied = store.apply(hypers, Gradients(FlatBuffers(store.layout), [False] * 6))
    assert (applied.version, applied.runs) == (1, 0)
    with store.hold() as held:
        assert held.changed_since(0) == []


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "step" in rule.segment_fields])
def test_counts_have_no_end(make: MakeStore, name: str):
    """Steps are counted beyond 2**24, where torch's float32 counter stops."""
    store, hypers = make(name)
    store.write(range(6), {"step": [2**24] * 6})
    store.apply(hypers, gradients_for(name, store.layout, 0))
    assert store.numbers("step") == [2**24 + 1] * 6
