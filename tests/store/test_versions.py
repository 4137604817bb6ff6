"""A version that somebody holds never changes; one that nobody holds is overwritten."""

import gc
import threading

import pytest
import torch

from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Held, Store
from farstep_service.store.versions import SPARE_STEPS
from tests.store.conftest import MakeStore, all_bytes, layout_of, noise


def memory_of(store: Store) -> int:
    """Return the address of the current parameters."""
    return store.buffers("param").stretch(0, 1).data_ptr()


def contents(held: Held) -> list[bytes]:
    """Return the bytes of a held version."""
    segments = held.buffers.layout.segments
    return [bytes(held.segment(index).reshape(-1).view(torch.uint8).tolist()) for index in range(len(segments))]


def test_in_place_when_nobody_holds(make: MakeStore):
    """A lone worker's steps stay in one memory."""
    store, hypers = make()
    place = memory_of(store)
    for step in range(4):
        store.apply(hypers, Gradients(noise(store.layout, step)))
        assert memory_of(store) == place
    assert store.nbytes.versions == 0


def test_what_somebody_holds_never_changes(make: MakeStore):
    """Each of several held versions keeps its bytes while steps, sparse steps and writes go on."""
    store, hypers = make("Adagrad")
    held, saved = [], []
    for step in range(4):
        held.append(store.hold())
        saved.append(contents(held[-1]))
        rows = (torch.tensor([[1, 3, 1]]), torch.ones(3, 3))
        store.apply(hypers, Gradients(noise(store.layout, step), sparse={4: rows}))
        if step == 2:
            held.append(store.hold())
            saved.append(contents(held[-1]))
            store.write([0, 2], {"param": noise(store.layout, 9), "sum": noise(store.layout, 8)})
    assert [contents(each) for each in held] == saved
    assert [each.version for each in held] == [0, 1, 2, 3, 4]
    for each in held:
        each.release()


def test_holding_or_not_gives_the_same_bits(make: MakeStore):
    """Steps into other memory, with missing gradients in turn, give what steps in place give."""
    lone, hypers = make("Adamax")
    watched, _ = make("Adamax")
    readers: list[Held] = []
    for step in range(20):
        present = [(step + index) % 3 != 0 for index in range(6)]
        lone.apply(hypers, Gradients(noise(lone.layout, step), present))
        if step % 2:
            readers.append(watched.hold())
        if step % 5 == 4:
            readers.pop(0).release()
        watched.apply(hypers, Gradients(noise(lone.layout, step), present))
        assert all_bytes(watched) == all_bytes(lone)


def test_memory_is_used_again(make: MakeStore):
    """A reader per step costs one other memory, which two versions exchange."""
    store, hypers = make()
    places = set()
    for step in range(10):
        with store.hold():
            store.apply(hypers, Gradients(noise(store.layout, step)))
        places.add(memory_of(store))
        assert store.nbytes.versions == store.layout.nbytes
    assert len(places) == 2


def test_a_spare_that_nobody_needs_is_given_back(make: MakeStore):
    """After some steps without a reader, the store is as small as before the first."""
    store, hypers = make()
    with store.hold():
        store.apply(hypers, Gradients(noise(store.layout, 0)))
    for step in range(SPARE_STEPS):
        assert store.nbytes.versions == store.layout.nbytes
        store.apply(hypers, Gradients(noise(store.layout, step)))
    assert store.nbytes.versions == 0


def test_releasing_twice_is_releasing_once(make: MakeStore):
    """A second release does nothing, also when another reader holds the same version."""
    store, hypers = make()
    one, other = store.hold(), store.hold()
    one.release()
    one.release()
    before = contents(other)
    store.apply(hypers, Gradients(noise(store.layout, 1)))
    assert contents(other) == before


def test_a_forgotten_version_is_released(make: MakeStore):
    """A reader that drops what it holds does not make every later step pay."""
    store, hypers = make()
    place = memory_of(store)
    store.hold()
    gc.collect()
    store.apply(hypers, Gradients(noise(store.layout, 1)))
    assert memory_of(store) == place


def test_release_needs_no_turn(make: MakeStore):
    """A reader in another thread gives its version up while steps go on."""
    store, hypers = make()
    held = [store.hold() for _ in range(50)]

    def release_all() -> None:
        for each in held:
            each.release()

    thread = threading.Thread(target=release_all)
    thread.start()
    for step in range(50):
        store.apply(hypers, Gradients(noise(store.layout, step)))
    thread.join()
    store.apply(hypers, Gradients(noise(store.layout, 0)))
    assert store.nbytes.versions <= store.layout.nbytes


def test_a_held_version_knows_what_changed(make: MakeStore):
    """A reader learns which segments changed after a version it has."""
    store, hypers = make()
    store.apply(hypers, Gradients(noise(store.layout, 0), [True, False, False, True, False, True]))
    store.apply(hypers, Gradients(noise(store.layout, 0), [False, False, True, False, False, True]))
    with store.hold() as held:
        assert held.changed_since(0) == [0, 2, 3, 5]
        assert held.changed_since(1) == [2, 5]
        assert held.changed_since(2) == []


def test_a_held_version_is_one_piece_where_it_is_contiguous(make: MakeStore):
    """Neighbours of one dtype are one stretch of memory, others are not."""
    store, _ = make(layout=layout_of(((3,), (4,), (5,), (6,)), ("float32", "float32", "float64", "float32")))
    with store.hold() as held:
        span = held.span(0, 2)
        assert span is not None
        assert span.shape == (7,)
        assert held.span(1, 3) is None
        assert held.span(0, 4) is None
        assert held.span(2, 2) is None


def test_holding_the_users_memory_is_a_copy(make: MakeStore):
    """Where parameters are the user's own tensors, a holder gets a copy, and it too never changes."""
    layout = layout_of()
    tensors = [torch.ones(segment.shape) for segment in layout.segments]
    store, hypers = make(layout=layout, parameters=BorrowedBuffers(layout, tensors))
    with store.hold() as held:
        store.apply(hypers, Gradients(noise(layout, 0)))
        assert store.nbytes.versions == layout.nbytes
        assert all(bool((held.segment(index) == 1).all()) for index in range(6))
        assert not bool((tensors[0] == 1).any())
    assert store.nbytes.versions == 0


def test_steps_wait_for_each_other_between_threads(make: MakeStore):
    """Steps from several threads happen one after the other."""
    store, hypers = make()
    gradients = Gradients(FlatBuffers(store.layout))
    threads = [threading.Thread(target=lambda: [store.apply(hypers, gradients) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.version == 100
    assert store.numbers("step") == [100] * 6


@pytest.mark.parametrize("version", [0, 41])
def test_versions_go_on_from_where_they_were(make: MakeStore, version: int):
    """A store can begin at any version, as after a recovery."""
    store, hypers = make(version=version)
    assert store.apply(hypers, Gradients(noise(store.layout, 0))).version == version + 1
    with store.hold() as held:
        assert held.changed_since(version) == list(range(6))
