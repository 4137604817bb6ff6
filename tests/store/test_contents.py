"""Reading and writing what a store holds."""

from typing import Any

import pytest
import torch

from farstep.errors import InvalidOption, TensorMismatch
from farstep_service.kernels import Kernels
from farstep_service.optimizers import RULES
from farstep_service.store import FlatBuffers, Gradients, Store
from tests.store.conftest import MakeStore, all_bytes, gradients_for, layout_of, noise


@pytest.mark.parametrize("name", RULES)
def test_state_that_moves_to_another_store_goes_on_with_the_same_bits(make: MakeStore, name: str):
    """Parameters and state written into a fresh store continue as if nothing had happened."""
    options = ({"t0": 3, "lr": 0.1},) if name == "ASGD" else ({"lr": 0.1},)
    old, hypers = make(name, options=options)
    for step in range(5):
        old.apply(hypers, gradients_for(name, old.layout, step, [index != step for index in range(6)]))
    new, _ = make(name, options=options, parameters=FlatBuffers(old.layout))
    contents: dict[str, Any] = {field: old.buffers(field) for field in ("param", *old.rule.tensor_fields)}
    contents |= {field: old.numbers(field) for field in old.rule.segment_fields}
    new.write(range(6), contents, bump=False)
    assert new.version == 0
    for store in (old, new):
        store.apply(hypers, gradients_for(name, old.layout, 7))
    assert all_bytes(new) == all_bytes(old)


def test_a_write_is_a_version(make: MakeStore):
    """Other contents count the version up, and say which parameters changed."""
    store, _ = make()
    store.write([1, 4], {"param": noise(store.layout, 5)})
    assert store.version == 1
    with store.hold() as held:
        assert held.changed_since(0) == [1, 4]
        assert torch.equal(held.segment(1), noise(store.layout, 5).segment(1))
        assert torch.equal(held.segment(0), noise(store.layout, 0).segment(0))
    store.write([2], {"square_avg": noise(store.layout, 5)})
    with store.hold() as held:
        assert (held.version, held.changed_since(1)) == (2, [])


def test_state_is_there_after_the_first_step_unless_it_is_eager(make: MakeStore):
    """A segment has state when it has stepped; Adagrad's exists before, filled as its options say."""
    store, hypers = make("Adadelta")
    assert store.counts(0) is None
    store.apply(hypers, Gradients(noise(store.layout, 1), [True] + [False] * 5))
    assert store.counts(0) is not None
    assert store.counts(1) is None
    eager, _ = make("Adagrad", layout_of(dtypes=("complex64",)), options=({"initial_accumulator_value": 0.5},))
    assert eager.numbers("step") == [0] * 6
    assert bool((eager.buffers("sum").segment(0) == 0.5 + 0.5j).all())


def test_state_can_be_taken_away(make: MakeStore):
    """A segment whose state was taken away begins anew, as after `state.clear()`."""
    store, hypers = make("Adamax")
    fresh, _ = make("Adamax")
    store.apply(hypers, Gradients(noise(store.layout, 1)))
    store.write([0, 2], {"step": [None, None]})
    assert store.numbers("step") == [None, 1, None, 1, 1, 1]
    store.write([4], {"step": [None]})
    store.write(range(6), {"param": noise(store.layout, 0)})
    for each in (store, fresh):
        each.apply(hypers, Gradients(noise(store.layout, 2)))
    for index in (0, 2, 4):
        assert torch.equal(store.buffers("param").segment(index), fresh.buffers("param").segment(index))
    assert store.numbers("step") == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize(
    "contents",
    [
        {"exp_avg": [1.0]},
        {"momentum_buffer": [1.0]},
        {"param": [1.0]},
        {"step": [1, 2]},
        {"step": [-1]},
        {"step": [1.5]},
        {"step": [True]},
        {"step": [float("nan")]},
        {"step": ["3"]},
        {"momentum_buffer": FlatBuffers(layout_of())},
        {"step": FlatBuffers(layout_of())},
        {"param": FlatBuffers(layout_of(((1,),)))},
    ],
    ids=lambda contents: " ".join(f"{field} {value!r:.12}" for field, value in contents.items()),
)
def test_contents_that_do_not_fit_change_nothing(make: MakeStore, contents: dict[str, Any]):
    """Unknown fields, other layouts and impossible numbers are refused before anything is written."""
    store, _ = make("Adamax")
    before = all_bytes(store)
    with pytest.raises(TensorMismatch):
        store.write([0], {"param": noise(store.layout, 5), **contents})
    assert all_bytes(store) == before
    assert store.version == 0


def test_unknown_fields_are_named(make: MakeStore):
    """Who asks for a field that the optimizer does not have is told those it has."""
    store, _ = make("ASGD")
    with pytest.raises(TensorMismatch, match="no such field 'exp_avg': ax"):
        store.buffers("exp_avg")
    with pytest.raises(TensorMismatch, match="no such field 'ax': step, eta, mu"):
        store.numbers("ax")


def test_a_store_needs_the_options_of_its_rule_for_every_group():
    """Options of another rule, or of too few groups, are refused."""
    layout = layout_of(groups=(0, 1))
    for hypers in ([RULES["ASGD"].hyper()], [RULES["Adamax"].hyper()] * 2):
        with pytest.raises(InvalidOption, match="ASGD needs its options for each of 2 groups"):
            Store(layout, RULES["ASGD"], hypers, kernels=Kernels("reference"))


def test_gradients_of_another_layout_are_refused(make: MakeStore):
    """Gradients in another layout never reach a kernel."""
    store, hypers = make()
    with pytest.raises(TensorMismatch, match="gradients"):
        store.apply(hypers, Gradients(FlatBuffers(layout_of(((1,),)))))
    with pytest.raises(TensorMismatch, match="present"):
        store.apply(hypers, Gradients(FlatBuffers(store.layout), [True]))
    assert store.version == 0
