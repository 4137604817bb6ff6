"""Sparse gradients: Adagrad takes them with torch's bits, the others refuse them in torch's words."""

import pytest
import torch
from torch import Tensor

from farstep.errors import FarstepError, TensorMismatch
from farstep_service.kernels import Kernels
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store

SHAPES = ((50, 8), (40,), (6, 7, 3), (9, 11))
SPARSE_DIMS = (1, 1, 2, 2)


def sparse_noise(index: int, dtype: torch.dtype, generator: torch.Generator, nnz: int = 30) -> Tensor:
    """Return an uncoalesced gradient: indices in any order, many of them twice."""
    shape, dims = SHAPES[index], SPARSE_DIMS[index]
    indices = torch.stack([torch.randint(0, size, (nnz,), generator=generator) for size in shape[:dims]])
    values = torch.randn((nnz, *shape[dims:]), dtype=dtype, generator=generator)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def store_of(params: list[Tensor], options: dict, name: str = "Adagrad") -> tuple[Store, list]:
    """Return a store that begins with these parameters, and its options."""
    dtype = str(params[0].dtype).removeprefix("torch.")
    layout = Layout.build([SegmentSpec(str(index), tuple(p.shape), dtype) for index, p in enumerate(params)])
    rule = RULES[name]
    hypers = [rule.hyper.from_options(options)]
    parameters = FlatBuffers(layout).copy_(BorrowedBuffers(layout, params))
    return Store(layout, rule, hypers, kernels=Kernels("reference"), parameters=parameters), hypers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"lr_decay": 0.1, "maximize": True, "initial_accumulator_value": 0.5}], ids=str
)
@pytest.mark.parametrize("held", [False, True], ids=["in place", "held"])
def test_sparse_adagrad_is_bit_identical(dtype: torch.dtype, options: dict, held: bool):
    """Uncoalesced gradients of one and two sparse dimensions, mixed with dense steps, give torch's bits."""
    noise = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, dtype=dtype, generator=noise).requires_grad_() for shape in SHAPES]
    optimizer = torch.optim.Adagrad(params, foreach=False, **options)
    store, hypers = store_of(params, options)
    dense = FlatBuffers(store.layout)
    for step in range(40):
        sparse = {}
        for index, p in enumerate(params):
            # torch squares complex gradients differently when sparse; mixing both leads it to roots of negatives.
            if (step + index) % 4 == 3 and not dtype.is_complex:
                p.grad = torch.randn(SHAPES[index], dtype=dtype, generator=noise)
                dense.segment(index).copy_(p.grad)
            else:
                p.grad = sparse_noise(index, dtype, noise)
                sparse[index] = (p.grad._indices(), p.grad._values())
        optimizer.step()
        if held:
            with store.hold():
                store.apply(hypers, Gradients(dense, sparse=sparse))
        else:
            store.apply(hypers, Gradients(dense, sparse=sparse))
    for index, p in enumerate(params):
        assert torch.equal(store.buffers("param").segment(index), p.detach())
        assert torch.equal(store.buffers("sum").segment(index), optimizer.state[p]["sum"])
        assert store.numbers("step", [index]) == [optimizer.state[p]["step"].item()]


def test_an_empty_sparse_gradient_counts_as_a_step():
    """A sparse gradient without rows changes nothing but the step count, as in torch."""
    p = torch.ones(50, 8).requires_grad_()
    store, hypers = store_of([p], {})
    empty = (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 8))
    store.apply(hypers, Gradients(FlatBuffers(store.layout), sparse={0: empty}))
    assert store.numbers("step") == [1]
    assert torch.equal(store.buffers("param").segment(0), p.detach())


def torch_words(name: str, options: dict) -> str:
    """Return what torch says about a sparse gradient."""
    p = torch.ones(50, 8).requires_grad_()
    p.grad = sparse_noise(0, torch.float32, torch.Generator())
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.optim, name)([p], **options).step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("Adagrad", {"weight_decay": 0.1}, TensorMismatch),
        ("SGD", {"weight_decay": 0.1}, TensorMismatch),
        ("Adafactor", {}, TensorMismatch),
        ("Muon", {}, TensorMismatch),
        ("Adadelta", {}, TensorMismatch),
        ("Adamax", {}, TensorMismatch),
        ("ASGD", {}, TensorMismatch),
    ],
)
def test_sparse_gradients_are_refused_in_torchs_words(name: str, options: dict, kind: type[FarstepError]):
    """Where torch refuses a sparse gradient, so does the store, with the same sentence and nothing changed."""
    store, hypers = store_of([torch.ones(50, 8)], options, name)
    gradient = sparse_noise(0, torch.float32, torch.Generator())
    with pytest.raises(kind) as caught:
        store.apply(hypers, Gradients(FlatBuffers(store.layout), sparse={0: (gradient._indices(), gradient._values())}))
    assert caught.value.detail == torch_words(name, options)
    assert store.version == 0
    assert [each and each.step for each in store.all_counts()] == ([0] if RULES[name].has_initial_state else [None])


@pytest.mark.parametrize(
    ("indices", "values"),
    [
        (torch.tensor([[50]]), torch.ones(1, 8)),
        (torch.tensor([[-1]]), torch.ones(1, 8)),
        (torch.tensor([[1, 2]]), torch.ones(1, 8)),
        (torch.tensor([[1]], dtype=torch.int32), torch.ones(1, 8)),
        (torch.tensor([[1]]), torch.ones(1, 8, dtype=torch.float64)),
        (torch.tensor([1]), torch.ones(1, 8)),
        (torch.tensor([[1], [1], [1]]), torch.ones(1)),
    ],
)
def test_wrong_rows_change_nothing(indices: Tensor, values: Tensor):
    """Rows outside the parameter, or of another shape or dtype, are refused before anything is written."""
    store, hypers = store_of([torch.ones(50, 8)], {})
    with pytest.raises(TensorMismatch, match="sparse gradient of '0'"):
        store.apply(hypers, Gradients(FlatBuffers(store.layout), sparse={0: (indices, values)}))
    assert store.version == 0
    assert bool((store.buffers("param").segment(0) == 1).all())
