"""What a store costs in memory, by its own account and by the allocator's."""

import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from farstep_service.kernels import Kernels
from farstep_service.kernels.reference import BLOCK
from farstep_service.optimizers import RULES
from farstep_service.store import FlatBuffers, Gradients, Store, StoreBytes
from tests.store.conftest import layout_of, noise

MIB = 2**20
SHAPES = tuple((MIB // 4,) for _ in range(8))  # 8 tensors of 1 MiB


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                known = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
                if tensor.data_ptr() not in known:
                    self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


ELEMENTWISE = [name for name, rule in RULES.items() if "fused" in rule.kernels]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_store_is_its_parameters_and_its_state(name: str):
    """A store takes its parameters and one buffer per element field in use; a second version only while it is held."""
    layout = layout_of(SHAPES)
    rule = RULES[name]
    hypers = [rule.hyper()]
    store = Store(layout, rule, hypers, kernels=Kernels("reference"))
    state = len(rule.fields(())) * layout.nbytes
    gradients = Gradients(noise(layout, 0))
    store.apply(hypers, gradients)
    assert store.nbytes == StoreBytes(8 * MIB, 0, state)
    held = store.hold()
    for _ in range(3):
        store.apply(hypers, gradients)
    assert store.nbytes == StoreBytes(8 * MIB, 8 * MIB, state)
    assert store.nbytes.total == 16 * MIB + state
    held.release()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_step_allocates_no_more_than_blocks(name: str):
    """Temporaries of a step are of a block's size, not of the model's; only a held version costs memory once."""
    layout = layout_of(SHAPES)
    rule = RULES[name]
    hypers = [rule.hyper.from_options({"maximize": True} | ({} if name == "Rprop" else {"weight_decay": 0.1}))]
    store = Store(layout, rule, hypers, kernels=Kernels("reference"))
    gradients = Gradients(noise(layout, 0))
    with Largest() as largest:
        store.apply(hypers, gradients)
    assert 0 < largest.nbytes <= 4 * BLOCK
    with store.hold(), Largest() as largest:
        store.apply(hypers, gradients)
    assert largest.nbytes == layout.nbytes
    with store.hold(), Largest() as largest:
        store.apply(hypers, gradients)
    assert largest.nbytes <= 4 * BLOCK


@pytest.mark.usefixtures("_traced")
def test_a_steady_step_keeps_no_python_memory():
    """A thousand steps leave no trace beside the version number, when torch has filled its own small caches."""
    layout = layout_of()
    rule = RULES["ASGD"]
    hypers = [rule.hyper()]
    store = Store(layout, rule, hypers, kernels=Kernels("reference"))
    gradients = Gradients(FlatBuffers(layout))
    for _ in range(2000):
        store.apply(hypers, gradients)
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(1000):
        store.apply(hypers, gradients)
    after, _ = tracemalloc.get_traced_memory()
    assert after - before < 4 * 1024
