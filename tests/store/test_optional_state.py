"""State that only some options ask for: there when it is used, absent before, and in nobody's memory until then."""

from typing import Any

import pytest
import torch

from farstep.errors import TensorMismatch
from farstep_service.optimizers.rule import Fields
from farstep_service.store import FlatBuffers, Gradients
from tests.store.conftest import MakeStore, all_bytes, layout_of, noise
from tests.support.optimizers.twins import Twins

OPTIONAL: list[tuple[str, dict[str, Any], Fields]] = [
    ("SGD", {"momentum": 0.9}, ("momentum_buffer",)),
    ("Adam", {"amsgrad": True}, ("max_exp_avg_sq",)),
    ("AdamW", {"amsgrad": True}, ("max_exp_avg_sq",)),
    ("RMSprop", {"momentum": 0.9}, ("momentum_buffer",)),
    ("RMSprop", {"centered": True}, ("grad_avg",)),
    ("RMSprop", {"centered": True, "momentum": 0.9}, ("momentum_buffer", "grad_avg")),
]


@pytest.mark.parametrize(("name", "options", "fields"), OPTIONAL)
def test_only_groups_that_ask_for_it_have_it(name: str, options: dict[str, Any], fields: Fields):
    """Two groups of one session, one with the option and one without, have torch's bits and torch's state entries."""
    twins = Twins(name, groups=[options, {}, {"lr": 0.01} | options]).run(20)
    twins.check_equal()
    rule = twins.store.rule
    assert [twins.store.counts(0), twins.store.counts(9)] != [None, None]
    has = [counts.fields if (counts := twins.store.counts(index)) else () for index in (0, 4, 9)]
    assert has == [rule.fields(fields), rule.fields(()), rule.fields(fields)]


@pytest.mark.parametrize(("name", "options", "fields"), OPTIONAL)
def test_memory_is_taken_with_the_first_use(make: MakeStore, name: str, options: dict[str, Any], fields: Fields):
    """Switched on between two steps, an option takes its memory then; switched off, the state stays and rests."""
    store, (plain,) = make(name)
    asked = type(plain).from_options(options)
    bare = len(store.rule.fields(())) * store.layout.nbytes
    store.apply([plain], Gradients(noise(store.layout, 1)))
    assert store.nbytes.state == bare
    store.apply([asked], Gradients(noise(store.layout, 2), [True] + [False] * 5))
    assert store.nbytes.state == bare + len(fields) * store.layout.nbytes
    resting = [store.buffers(field).segment(0).clone() for field in fields]
    assert all(bool(tensor.any()) for tensor in resting)
    store.apply([plain], Gradients(noise(store.layout, 3)))
    for field, tensor in zip(fields, resting, strict=True):
        assert torch.equal(store.buffers(field).segment(0), tensor)
    first, second = store.counts(0), store.counts(1)
    assert first is not None
    assert first.fields == store.rule.fields(fields)
    assert (second.fields if second else ()) == store.rule.fields(())


def test_momentum_that_comes_and_goes_is_torchs():
    """SGD's buffer begins with the gradient of its first step with momentum and rests without it, as in torch."""
    twins = Twins("SGD", groups=[{"lr": 0.1}, {"lr": 0.1, "momentum": 0.5}], missing=lambda step, index: index == step)
    for step in range(12):
        if step in (3, 9):
            twins.change(0, momentum=0.9, dampening=0.2)
        if step == 6:
            twins.change(0, momentum=0.0)
            twins.change(1, momentum=0.0)
        twins.step()
        twins.check_equal()


def test_rprop_begins_with_the_learning_rate_of_a_parameters_first_step():
    """A parameter whose first gradient comes late starts with the learning rate of then, as in torch."""
    twins = Twins("Rprop", groups=[{"lr": 0.1}], missing=lambda step, index: index > step)
    for step in range(12):
        twins.change(0, lr=0.1 / (1 + step))
        twins.step()
        twins.check_equal()


def test_what_a_write_takes_away_begins_anew(make: MakeStore):
    """A segment that is written without its optional state starts it afresh when it is used again."""
    store, hypers = make("Adam", options=({"amsgrad": True},))
    other, _ = make("Adam", options=({"amsgrad": True},))
    store.apply(hypers, Gradients(noise(store.layout, 1)))
    moved: dict[str, Any] = {field: store.buffers(field) for field in ("param", "exp_avg", "exp_avg_sq")}
    moved["step"] = store.numbers("step")
    moved["max_exp_avg_sq"] = noise(store.layout, 9)
    has = [("exp_avg", "exp_avg_sq")] * 6
    store.write(range(6), moved, has=has)
    other.write(range(6), moved, has=has)
    for each in (store, other):
        assert not each.buffers("max_exp_avg_sq").segment(0).any()
        each.apply(hypers, Gradients(noise(store.layout, 2)))
    assert all_bytes(store) == all_bytes(other)


def test_state_that_says_what_it_has_may_be_at_step_0(make: MakeStore):
    """A segment has the state it is said to have, whatever its step, and none where it is said to have none."""
    store, _ = make("Adamax")
    store.write(range(6), {"step": [0] * 6}, has=[("exp_avg", "exp_inf"), None, (), None, None, None])
    assert store.numbers("step") == [0, None, 0, None, None, None]


def test_a_field_that_no_rule_knows_is_refused(make: MakeStore):
    """Optional or not, a field that the rule does not have is an error."""
    store, _ = make("SGD")
    with pytest.raises(TensorMismatch, match="exp_avg"):
        store.write(range(6), {"exp_avg": FlatBuffers(layout_of())})
    with pytest.raises(TensorMismatch, match="step"):
        store.numbers("step")
