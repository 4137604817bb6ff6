"""The embedded case: parameters and gradients are the user's own tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep_service.kernels import Kernels
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.store import BorrowedBuffers, Gradients, Store

SHAPES = ((3, 4), (50,), (20, 10), (), (0, 2), (7,), (300,), (6,))


def strange(shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    """Return noise whose memory is, in turn, plain, transposed, every second element, or lazily conjugated."""
    generator = torch.Generator().manual_seed(index)
    plain = torch.randn(shape, dtype=dtype, generator=generator)
    if index % 4 == 1:
        return torch.stack([plain, plain], -1)[..., 0]
    if index % 4 == 2:
        return plain.t().contiguous().t() if plain.dim() == 2 else plain
    if index % 4 == 3 and dtype.is_complex:
        return plain.conj()
    return plain


def embedded(name: str, params: list[Tensor], small: int, **options: Any) -> tuple[Store, list[Any], BorrowedBuffers]:
    """Return a store over these tensors, its options, and the memory for their gradients."""
    dtype = str(params[0].dtype).removeprefix("torch.")
    layout = Layout.build(SegmentSpec(str(index), tuple(p.shape), dtype) for index, p in enumerate(params))
    rule = RULES[name]
    hypers = [rule.hyper.from_options(options)]
    lent = BorrowedBuffers(layout, params, small=small)
    store = Store(layout, rule, hypers, kernels=Kernels("reference"), parameters=lent)
    return store, hypers, BorrowedBuffers(layout, small=small)


ELEMENTWISE = [name for name, rule in RULES.items() if "fused" in rule.kernels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("small", [0, 40, 10**6], ids=["all in place", "some gathered", "all gathered"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_users_tensors_get_torchs_bits(name: str, small: int, dtype: torch.dtype):
    """Whatever is gathered, whatever the strides, and with gradients that come and go, the bits are torch's."""
    theirs = [strange(shape, dtype, index).clone().requires_grad_() for index, shape in enumerate(SHAPES)]
    ours = [strange(shape, dtype, index).detach().requires_grad_() for index, shape in enumerate(SHAPES)]
    optimizer = getattr(torch.optim, name)(theirs, foreach=False, lr=0.1)
    store, hypers, gradients = embedded(name, ours, small, lr=0.1)
    places = [p.data_ptr() for p in ours]
    for step in range(12):
        for index, p in enumerate(theirs):
            p.grad = None if (step + index) % 4 == 3 else strange(SHAPES[index], dtype, 100 * step + index)
        optimizer.step()
        gradients.lend([p.grad for p in theirs])
        store.apply(hypers, Gradients(gradients, gradients.present))
    for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(p, q), index
        for field in store.rule.fields(()):
            assert torch.equal(store.buffers(field).segment(index), optimizer.state[q][field])
    assert [p.data_ptr() for p in ours] == places


def test_complex_tensors_that_are_lazily_conjugated():
    """Memory that does not hold the values it shows is gathered, and written back as values."""
    ours = [strange(shape, torch.complex64, index) for index, shape in enumerate(SHAPES)]
    theirs = [p.resolve_conj().clone().requires_grad_() for p in ours]
    optimizer = torch.optim.Adamax(theirs, foreach=False)
    store, hypers, gradients = embedded("Adamax", ours, 0)
    lent = [torch.full_like(p, 1 + 2j, memory_format=torch.contiguous_format).conj() for p in theirs]
    gradients.lend(lent)
    for p, gradient in zip(theirs, lent, strict=True):
        p.grad = gradient.resolve_conj()
    optimizer.step()
    store.apply(hypers, Gradients(gradients))
    assert any(p.is_conj() for p in ours)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.resolve_conj(), q.detach())


@pytest.mark.parametrize("small", [0, 10**6], ids=["in place", "gathered"])
def test_autograd_notices_a_step(small: int):
    """A step counts as a change in place: a backward pass through what it overwrote is an error."""
    w = torch.ones(5, requires_grad=True)
    store, hypers, gradients = embedded("ASGD", [w], small)
    loss = (w * w).sum()
    before = w._version
    gradients.lend([torch.ones(5)])
    store.apply(hypers, Gradients(gradients))
    assert w._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_what_the_user_does_between_steps_is_seen():
    """Parameters edited in place, or through `.data`, are where the next step begins."""
    theirs = [torch.ones(5).requires_grad_(), torch.ones(3).requires_grad_()]
    ours = [torch.ones(5).requires_grad_(), torch.ones(3).requires_grad_()]
    optimizer = torch.optim.Adadelta(theirs, foreach=False)
    store, hypers, gradients = embedded("Adadelta", ours, 10**6)
    for step in range(4):
        for params in (theirs, ours):
            params[0].data.mul_(1 + step)
            params[1].data = torch.full((3,), float(step))
        for p in theirs:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        gradients.lend([p.grad for p in theirs])
        store.apply(hypers, Gradients(gradients))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_gradients_are_not_changed():
    """The user's gradients are read, never written."""
    params = [torch.ones(shape) for shape in SHAPES]
    store, hypers, gradients = embedded("Adagrad", params, 40, maximize=True, weight_decay=0.1)
    lent = [torch.full(shape, 2.0) for shape in SHAPES]
    gradients.lend(lent)
    store.apply(hypers, Gradients(gradients))
    assert all(bool((tensor == 2).all()) for tensor in lent)


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.ones(3)],
        [torch.ones(4), torch.ones(2)],
        [torch.ones(3, dtype=torch.float64), torch.ones(2)],
        [torch.ones(3).to_sparse(), torch.ones(2)],
        [torch.ones(1, 3), torch.ones(2)],
    ],
    ids=["too few", "shape", "dtype", "sparse", "dimensions"],
)
def test_tensors_that_do_not_fit_are_refused(wrong: list[Tensor]):
    """A tensor of another shape, dtype or layout is refused, naming it, and the last ones stay lent."""
    layout = Layout.build([SegmentSpec("w", (3,), "float32"), SegmentSpec("b", (2,), "float32")])
    lent = BorrowedBuffers(layout, [torch.ones(3), torch.ones(2)])
    with pytest.raises(TensorMismatch, match=r"'w'|2 segments"):
        lent.lend(wrong)
    assert bool((lent.segment(0) == 1).all())


def test_a_missing_gradient_is_told():
    """A gradient that is not there, and not said to be missing, is an error before the step."""
    store, hypers, gradients = embedded("ASGD", [torch.ones(3)], 0)
    with pytest.raises(TensorMismatch, match="no tensor for '0'"):
        store.apply(hypers, Gradients(gradients))
    assert (store.version, store.pending) == (0, False)
