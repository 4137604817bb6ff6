"""A store that grows: new segments at the end, everything else as it was, all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from farstep.errors import StepInterrupted, TensorMismatch
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store
from tests.store.conftest import BrokenKernels, MakeStore, all_bytes, layout_of, noise

LATE = ((3, 3), (), (70,))
FIRST = 6
"""Segments of the layout that stores begin with."""
LR = {"lr": 0.1}
RULES: list[tuple[str, dict[str, Any]]] = [
    ("Adagrad", {"initial_accumulator_value": 0.5}),
    ("Adadelta", {}),
    ("ASGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("Adam", {"amsgrad": True}),
    ("Rprop", {}),
    ("Adafactor", {}),
]


def grown(layout: Layout, dtype: str = "float32", group: int = 1) -> Layout:
    """Return the layout with a late group."""
    return layout.append(SegmentSpec(f"late{group}.{index}", shape, dtype, group) for index, shape in enumerate(LATE))


def grow(store: Store, layout: Layout, hypers: list[Any], seed: int = 7) -> None:
    """Let a store grow to a layout, with noise in the new segments."""
    store.append(layout, hypers, noise(layout, seed))


@contextmanager
def failing(operation: int, error: BaseException) -> Iterator[None]:
    """Let the n-th operation of torch fail instead of being carried out."""

    class Failing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        left = operation

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self.left == 0:
                raise error
            self.left -= 1
            return function(*args, **(kwargs or {}))

    with Failing():  # type: ignore[no-untyped-call]
        yield


@pytest.mark.parametrize(("name", "options"), RULES)
def test_a_store_that_grew_goes_on_as_if_it_had_always_been_so_large(
    make: MakeStore, name: str, options: dict[str, Any]
) -> None:
    """Steps before and after give the bits of a store whose late segments had no gradients before they were there."""
    small, (hyper,) = make(name, options=(LR | options,))
    whole = grown(small.layout)
    late = type(hyper).from_options({**hyper.to_options(), "lr": 0.3})
    parameters = noise(whole, 7)
    parameters.copy_(small.buffers("param"), range(FIRST))
    always, _ = make(name, whole, options=(LR | options, LR | options), parameters=parameters)
    for step in range(3):
        gradient = noise(whole, step)
        own = FlatBuffers(small.layout).copy_(gradient, range(FIRST))
        small.apply([hyper], Gradients(own))
        always.apply([hyper, late], Gradients(gradient, [index < FIRST for index in range(len(whole.segments))]))
    grow(small, whole, [hyper, late])
    assert small.version == 4
    assert all_bytes(small) == all_bytes(always)
    for step in range(3, 6):
        small.apply([hyper, late], Gradients(noise(whole, step)))
        always.apply([hyper, late], Gradients(noise(whole, step)))
    assert all_bytes(small) == all_bytes(always)


def test_complex_segments_keep_even_places(make: MakeStore) -> None:
    """Growing by complex parameters behind an odd count of reals, and by reals again, changes no byte of the others."""
    store, (hyper,) = make("Adagrad", layout_of(((3,), (2,))))
    before = [store.buffers("param").segment(index).clone() for index in range(2)]
    grow(store, grown(store.layout, "complex64"), [hyper, hyper])
    grow(store, grown(store.layout, "float32", group=2), [hyper, hyper, hyper], seed=8)
    assert [each.offset % 2 for each in store.layout.segments if each.is_complex] == [0, 0, 0]
    assert all(map(torch.equal, before, (store.buffers("param").segment(index) for index in range(2))))
    store.apply([hyper] * 3, Gradients(noise(store.layout, 1)))
    assert store.counts(7) == store.counts(0)


def test_what_somebody_holds_stays(make: MakeStore) -> None:
    """A version that is held has its old layout and bytes through growth and steps, and its memory goes with it."""
    store, (hyper,) = make()
    held = store.hold()
    saved = [held.segment(index).clone() for index in range(FIRST)]
    old_bytes = store.layout.nbytes
    grow(store, grown(store.layout), [hyper, hyper])
    newer = store.hold()
    assert store.nbytes.versions == old_bytes
    for step in range(3):
        store.apply([hyper, hyper], Gradients(noise(store.layout, step)))
    assert (held.version, len(held.buffers.layout.segments), newer.version) == (0, FIRST, 1)
    assert all(map(torch.equal, saved, (held.segment(index) for index in range(FIRST))))
    assert all(map(torch.equal, saved, (newer.segment(index) for index in range(FIRST))))
    held.release()
    assert store.nbytes.versions == store.layout.nbytes
    newer.release()
    with store.hold() as now:
        store.apply([hyper, hyper], Gradients(noise(store.layout, 9)))
        assert now.version == 4


def test_new_segments_are_changed_and_others_are_not(make: MakeStore) -> None:
    """A reader who asks what changed since the version before gets the new segments."""
    store, (hyper,) = make()
    store.apply([hyper], Gradients(noise(store.layout, 0)))
    grow(store, grown(store.layout), [hyper, hyper])
    with store.hold() as held:
        assert held.changed_since(1) == [6, 7, 8]
        assert held.changed_since(0) == [*range(9)]


def test_a_step_that_failed_is_finished_first(make: MakeStore) -> None:
    """A store whose step failed midway finishes it before it grows."""
    store, (hyper,) = make(kernels=BrokenKernels(4))
    whole, _ = make()
    with pytest.raises(StepInterrupted):
        store.apply([hyper], Gradients(noise(store.layout, 1)))
    whole.apply([hyper], Gradients(noise(store.layout, 1)))
    for each in (store, whole):
        grow(each, grown(each.layout), [hyper, hyper])
    assert store.version == 2
    assert all_bytes(store) == all_bytes(whole)


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), KeyboardInterrupt()])
def test_a_failure_anywhere_leaves_everything(make: MakeStore, error: BaseException) -> None:
    """Whichever operation fails, the store is what it was, takes its next step, and grows when it is asked again."""
    failures = 0
    while True:
        store, (hyper,) = make("Adagrad", options=({"initial_accumulator_value": 0.5},))
        store.apply([hyper], Gradients(noise(store.layout, 1)))
        layout, before = grown(store.layout), all_bytes(store)
        addition = noise(layout, 7)
        try:
            with failing(failures, error):
                store.append(layout, [hyper, hyper], addition)
        except type(error):
            failures += 1
            assert (store.version, len(store.layout.segments)) == (1, FIRST)
            assert all_bytes(store) == before
            store.apply([hyper], Gradients(noise(store.layout, 2)))
            grow(store, layout, [hyper, hyper])
            assert store.version == 3
        else:
            break
    assert failures > 5


def test_memory_of_another_layout_is_refused(make: MakeStore) -> None:
    """Parameters that are not in the new layout are a mistake that changes nothing."""
    store, (hyper,) = make()
    with pytest.raises(TensorMismatch):
        store.append(grown(store.layout), [hyper, hyper], noise(store.layout, 1))
    assert store.version == 0


@pytest.mark.parametrize("small", [1, 40, 10**6])
def test_the_users_own_tensors_are_neither_copied_nor_moved(make: MakeStore, small: int) -> None:
    """A store over tensors of the user grows over more of them, and steps in their memory as a flat one does."""
    layout = layout_of()
    whole = grown(layout)
    tensors = [noise(whole, 0).segment(index).clone() for index in range(len(whole.segments))]
    flat, (hyper,) = make("Adadelta", parameters=FlatBuffers(layout).copy_(noise(whole, 0), range(FIRST)))
    lent, _ = make("Adadelta", parameters=BorrowedBuffers(layout, tensors[:FIRST], small=small))
    places = [each.data_ptr() for each in tensors]
    for store in (flat, lent):
        store.apply([hyper], Gradients(noise(layout, 1)))
    flat.append(whole, [hyper, hyper], noise(whole, 0))
    lent.append(whole, [hyper, hyper], BorrowedBuffers(whole, tensors, small=small))
    for store in (flat, lent):
        store.apply([hyper, hyper], Gradients(noise(whole, 2)))
    assert [each.data_ptr() for each in tensors] == places
    assert all(map(torch.equal, tensors, (flat.buffers("param").segment(index) for index in range(9))))
    assert all_bytes(lent) == all_bytes(flat)
