"""Steps that look at whole tensors, and steps along rows: all or nothing, pure, in as little memory as they need."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import InvalidOption, StepInterrupted, TensorMismatch
from farstep.protocol.fields import PRESENT, mask_of
from farstep_service.kernels import Kernels
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import ElementwiseRule, RowRule, Scalar, SegmentCounters, StateTensors
from farstep_service.store import BorrowedBuffers, Gradients, Store
from farstep_service.tensors.contents import Contents
from tests.store.conftest import (
    FITTING,
    BrokenKernels,
    MakeStore,
    all_bytes,
    gradients_for,
    layout_for,
    layout_of,
    noise,
)

WHOLE = ("Adafactor", "Muon")


@pytest.mark.parametrize("name", WHOLE)
def test_new_values_are_new_memory(name: str):
    """The rule changes neither parameters nor gradients nor state, and returns none of them."""
    rule = RULES[name]
    hyper = rule.hyper()
    shape = (6, 4)
    p, g = noise(layout_of([shape, shape]), 1).segment(0), noise(layout_of([shape, shape]), 2).segment(1)
    state = {field: torch.ones_like(p) for field in rule.tensor_fields}
    if name == "Adafactor":
        state = {"row_var": torch.ones(6, 1), "col_var": torch.ones(1, 4)}
    given = [p, g, *state.values()]
    before = [tensor.clone() for tensor in given]
    new_p, new_state = rule.update(p, g, state, rule.scalars(rule.first(hyper), hyper))
    assert all(torch.equal(tensor, was) for tensor, was in zip(given, before, strict=True))
    memory = {tensor.data_ptr() for tensor in given}
    assert memory.isdisjoint(tensor.data_ptr() for tensor in (new_p, *new_state.values()))
    assert list(new_state) == list(state)
    assert [value.shape for value in new_state.values()] == [value.shape for value in state.values()]


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("name", WHOLE)
def test_the_users_tensors_are_whole_after_an_interrupted_step(make: MakeStore, name: str, after: int):
    """Parameters that are gathered, of strange strides, or worked on in place are right when the step is finished."""
    layout = layout_for(name)
    source = noise(layout, 0)
    tensors = [source.segment(index).clone() for index in range(len(layout.segments))]
    tensors[4] = tensors[4].t().contiguous().t()
    store, hypers = make(
        name,
        layout,
        kernels=BrokenKernels(after, error=KeyboardInterrupt()),
        parameters=BorrowedBuffers(layout, tensors, small=40),
    )
    with pytest.raises(KeyboardInterrupt):
        store.apply(hypers, Gradients(noise(layout, 1)))
    assert (store.pending, store.version) == (False, 1)
    whole, _ = make(name)
    whole.apply(hypers, Gradients(noise(layout, 1)))
    for index, tensor in enumerate(tensors):
        assert torch.equal(tensor, whole.buffers("param").segment(index))


class Fault:
    """Lets a number of writes happen and fails once then."""

    def __init__(self, after: int) -> None:
        self.after = after

    def count_write(self) -> None:
        if self.after == 0:
            self.after = -1
            raise RuntimeError("out of luck")
        self.after -= 1


class FragileValues(Tensor):
    """New rows, each of whose ways into memory may fail."""

    fault: Fault

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in args:
            if isinstance(each, FragileValues) and function is Tensor.index_copy_:
                each.fault.count_write()
        plain = [arg.as_subclass(Tensor) if isinstance(arg, FragileValues) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


class FragileRows(ElementwiseRule[Any], RowRule[Any]):
    """A rule along rows whose writes fail where a fault says."""

    name = "SparseAdam"
    special = RULES["SparseAdam"].special
    tensor_fields = RULES["SparseAdam"].tensor_fields
    hyper = RULES["SparseAdam"].hyper

    def __init__(self, rule: RowRule[Any], fault: Fault) -> None:
        self._rule, self._fault = rule, fault

    def check_sparse(self, hyper: Any) -> None:
        pass

    def scalars(self, counts: SegmentCounters, hyper: Any) -> tuple[float, ...]:
        return self._rule.scalars(counts, hyper)

    def update(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[Scalar]
    ) -> tuple[Tensor, StateTensors]:
        return self._rule.update(p, g, state, scalars)

    def update_rows(
        self, p: Tensor, g: Tensor, state: StateTensors, scalars: Sequence[float]
    ) -> tuple[Tensor, StateTensors]:
        new_p, new_state = self._rule.update_rows(p, g, state, scalars)
        return self._fragile(new_p), {name: self._fragile(values) for name, values in new_state.items()}

    def _fragile(self, values: Tensor) -> Tensor:
        fragile = values.as_subclass(FragileValues)
        fragile.fault = self._fault
        return fragile


@pytest.mark.parametrize("held", [False, True], ids=["in place", "held"])
def test_a_step_along_rows_that_fails_anywhere_is_finished(make: MakeStore, held: bool):
    """Whichever write of rows fails, the step stays pending, and finishing it gives the bits of a whole one."""
    sparse_adam = RULES["SparseAdam"]
    assert isinstance(sparse_adam, RowRule)
    layout = layout_for("SparseAdam")
    whole, hypers = make("SparseAdam", layout)
    whole.apply(hypers, gradients_for("SparseAdam", layout, 1))
    writes = 3 * len(layout.segments)
    for after in range(writes):
        rule = FragileRows(sparse_adam, Fault(after))
        store = Store(layout, rule, hypers, kernels=Kernels("reference"), parameters=noise(layout, 0))
        reader = store.hold() if held else None
        with pytest.raises(StepInterrupted):
            store.apply(hypers, gradients_for("SparseAdam", layout, 1))
        assert (store.pending, store.version) == (True, 0)
        if reader:
            assert torch.equal(reader.segment(0), noise(layout, 0).segment(0))
            reader.release()
        store.finish()
        assert (store.pending, store.version) == (False, 1)
        assert all_bytes(store) == all_bytes(whole), after


def test_a_sparse_gradient_that_is_made_dense_is_all_or_nothing(make: MakeStore):
    """SGD with momentum takes rows as a whole gradient, beside dense ones, and survives a failure like these."""
    options = ({"lr": 0.1, "momentum": 0.9},)
    rows = (torch.tensor([[3, 60, 3]]), torch.ones(3, 3))

    def steps(kernels: Any) -> Store:
        store, hypers = make("SGD", kernels=kernels, options=options)
        for seed in (1, 2):
            with suppress(StepInterrupted):
                store.apply(hypers, Gradients(noise(store.layout, seed), sparse={4: rows}))
            store.finish()
        assert store.version == 2
        return store

    dense, hypers = make("SGD", options=options)
    for seed in (1, 2):
        gradients = noise(dense.layout, seed)
        gradients.segment(4).zero_().index_add_(0, *(rows[0][0], rows[1]))
        dense.apply(hypers, Gradients(gradients))
    for after in range(0, 60, 3):
        assert all_bytes(steps(BrokenKernels(after))) == all_bytes(dense)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adafactor", {"d": 0}),
        ("Adafactor", {"eps": (1e30, 1e-3)}),
        ("Adafactor", {"lr": 1e40, "weight_decay": 1}),
        ("Adafactor", {"beta2_decay": 1e6}),
        ("Muon", {"eps": 1e300}),
        ("Muon", {"ns_coefficients": (1.0, 1e39, 1.0)}),
        ("Muon", {"ns_coefficients": (1.0, 2.0)}),
        ("Muon", {"ns_steps": 100}),
        ("Muon", {"lr": 1e39}),
    ],
)
def test_options_with_which_no_step_can_be_taken_are_found_before_it(
    make: MakeStore, name: str, options: dict[str, Any]
):
    """Numbers that would make an operation fail in the middle of a step are refused; nothing is left pending."""
    store, hypers = make(name)
    store.apply(hypers, Gradients(noise(store.layout, 1)))
    before = all_bytes(store)
    with pytest.raises(InvalidOption):
        store.apply([type(hypers[0]).from_options(options, edited=True)], Gradients(noise(store.layout, 2)))
    assert (store.pending, store.version) == (False, 1)
    assert all_bytes(store) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adafactor", {"lr": 1e38, "eps": (1e15, 1e38)}),
        ("Muon", {"lr": 1e38, "adjust_lr_fn": "match_rms_adamw"}),
        ("Muon", {"lr": -1e38, "ns_steps": 0, "eps": 0, "momentum": 5.0}),
    ],
)
def test_a_step_with_absurd_options_is_taken(make: MakeStore, name: str, options: dict[str, Any]):
    """Options at the end of what numbers can be lead to infinities, never to a step that cannot be finished."""
    store, (hyper,) = make(name)
    strange = type(hyper).from_options(options, edited=True)
    for seed in (1, 2, 3):
        store.apply([strange], Gradients(noise(store.layout, seed)))
    assert (store.pending, store.version) == (False, 3)


def test_adafactor_takes_the_memory_of_its_factors():
    """A matrix costs a number per row and per column, a vector one per element, an empty tensor nothing."""
    layout = layout_of([(64, 48), (100,), (0, 5), (2, 3, 4)])
    rule = RULES["Adafactor"]
    store = Store(layout, rule, [rule.hyper()], kernels=Kernels("reference"))
    assert store.nbytes.state == 4 * ((64 + 48) + 100 + (2 * 3 + 2 * 4))
    store.apply([rule.hyper()], Gradients(noise(layout, 1)))
    assert store.nbytes.state == 4 * ((64 + 48) + 100 + (2 * 3 + 2 * 4))
    fields = [counts.fields for counts in store.all_counts() if counts]
    assert fields == [("row_var", "col_var"), ("variance",), (), ("row_var", "col_var")]


def test_a_field_that_a_segment_never_has_is_refused():
    """A mask that claims columns of a vector is an error that names both."""
    rule = RULES["Adafactor"]
    contents = Contents(layout_of([(4, 3), (5,)]), rule, ("step", PRESENT), range(2))
    contents.allocate()
    contents.numbers[PRESENT][1] = mask_of(("step", "col_var"), tuple(rule.kinds))
    with pytest.raises(TensorMismatch, match=r"'p1' of shape \[5\] is said to have 'col_var'"):
        contents.has()


@pytest.mark.parametrize("name", ["Muon", "SparseAdam"])
def test_parameters_that_a_rule_does_not_take_are_refused(name: str):
    """What torch's constructor refuses, whoever speaks to a server is refused, too."""
    rule = RULES[name]
    rule.check_layout(layout_of(FITTING[name]))
    with pytest.raises(TensorMismatch, match=r"only supports 2D|at indices"):
        rule.check_layout(layout_of([(3, 4), (5,)], dtypes=("float32", "complex64")))
