"""What the tests of the store share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from farstep_service.kernels import Kernels
from farstep_service.kernels.kernel import Call, Kernel, KernelSource, Progress
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature
from farstep_service.store import FlatBuffers, Gradients, Store

SHAPES = ((5, 7), (11,), (), (0, 4), (64, 3), (9,))

FITTING: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "Muon": ((5, 7), (11, 2), (1, 1), (0, 4), (64, 3), (9, 9)),
    "SparseAdam": ((5, 7), (11,), (1,), (0, 4), (64, 3), (9,)),
}
"""Shapes for rules that do not take all of `SHAPES`."""

MakeStore = Callable[..., tuple[Store, list[Any]]]


def layout_of(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtypes: Sequence[str] = ("float32",), groups: Sequence[int] = (0,)
) -> Layout:
    """Return a layout of such tensors; dtypes and groups are dealt out in turn."""
    return Layout.build(
        SegmentSpec(f"p{index}", shape, dtypes[index % len(dtypes)], groups[index % len(groups)])
        for index, shape in enumerate(shapes)
    )


def layout_for(name: str, **more: Any) -> Layout:
    """Return a layout that a rule takes."""
    return layout_of(FITTING.get(name, SHAPES), **more)


def gradients_for(name: str, layout: Layout, seed: int, present: Sequence[bool] | None = None) -> Gradients:
    """Return gradients that a rule takes: noise, or every other row of it."""
    buffers = noise(layout, seed)
    if name != "SparseAdam":
        return Gradients(buffers, present)
    sparse = {}
    for index in range(len(layout.segments)):
        if present is None or present[index]:
            values = buffers.segment(index)[seed % 2 :: 2]
            rows = torch.arange(layout.segments[index].shape[0])[seed % 2 :: 2]
            sparse[index] = (rows.unsqueeze(0), values)
    return Gradients(buffers, present, sparse)


def noise(layout: Layout, seed: int) -> FlatBuffers:
    """Return buffers full of normal noise."""
    generator = torch.Generator().manual_seed(seed)
    buffers = FlatBuffers(layout)
    for tensor in buffers.flat.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return buffers


def all_bytes(store: Store) -> list[bytes]:
    """Return everything a store holds, to be compared bit for bit."""
    fields = ["param", *store.rule.tensor_fields]
    tensors = [store.buffers(field).segment(index) for field in fields for index in range(len(store.layout.segments))]
    numbers = [repr(store.numbers(field)).encode() for field in store.rule.segment_fields]
    return [*(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in tensors), *numbers]


@pytest.fixture
def make() -> MakeStore:
    """Return a maker of stores that begin with noise."""

    def make(
        name: str = "Adadelta",
        layout: Layout | None = None,
        *,
        kernels: KernelSource | None = None,
        options: Sequence[dict[str, Any]] = ({},),
        **more: Any,
    ) -> tuple[Store, list[Any]]:
        layout = layout or layout_for(name)
        rule = RULES[name]
        hypers = [rule.hyper.from_options(options[index % len(options)]) for index in range(layout.groups)]
        parameters = more.pop("parameters", None) or noise(layout, 0)
        kernels = kernels or Kernels("reference")
        return Store(layout, rule, hypers, kernels=kernels, parameters=parameters, **more), hypers

    return make


class BrokenKernel(Kernel):
    """Fails once, when a given number of writes to memory has been done; half a block may be written then.

    Args:
        whole: a kernel that works.
        after: how many writes succeed.
        name: what it is called.
    """

    def __init__(self, whole: Kernel, after: int, name: KernelName, error: BaseException) -> None:
        self._whole = whole
        self._after = after
        self.name = name
        self._error = error

    def takes(self, form: KernelSignature) -> bool:
        return self._whole.takes(form)

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        self._whole.execute([self._fragile(call) for call in calls], progress)

    def _fragile(self, call: Call) -> Call:
        state = {name: self._wrapped(field) for name, field in call.state.items()}
        copy = None if call.copy is None else self._wrapped(call.copy)
        return call._replace(out=self._wrapped(call.out), state=state, copy=copy)

    def _wrapped(self, tensor: torch.Tensor) -> torch.Tensor:
        fragile = tensor.as_subclass(FragileTensor)
        fragile.kernel = self
        return fragile

    def count_write(self) -> None:
        """Let one more write happen, or fail."""
        if self._after == 0:
            self._after = -1
            raise self._error
        self._after -= 1

    @property
    def failed(self) -> bool:
        """Return whether it has failed."""
        return self._after < 0


class FragileTensor(torch.Tensor):
    """Memory whose writes are counted by a broken kernel."""

    kernel: BrokenKernel

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        into = args[0]
        if function is torch.Tensor.copy_ and isinstance(into, FragileTensor):
            into.kernel.count_write()
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, FragileTensor) else arg for arg in args]
        found = function(*plain, **(kwargs or {}))
        if function is torch.Tensor.__getitem__ and isinstance(into, FragileTensor):
            found = found.as_subclass(FragileTensor)
            found.kernel = into.kernel
        return found


class BrokenKernels(KernelSource):
    """Gives out a kernel that fails once, and afterwards ones that work."""

    def __init__(
        self, after: int, *, block: int = 16, name: KernelName = "reference", error: BaseException | None = None
    ) -> None:
        self._after = after
        self._block = block
        self._name = name
        self._error = error or RuntimeError("out of luck")
        self.given: BrokenKernel | None = None

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Nothing has to be prepared."""

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        """Return the broken kernel the first time."""
        if self.given is None:
            self.given = BrokenKernel(self.reference(rule), self._after, self._name, self._error)
            return self.given
        return self.reference(rule)

    def reference(self, rule: AnyRule) -> Kernel:
        """Return a kernel that works."""
        from farstep_service.kernels.reference import ReferenceKernel

        return ReferenceKernel(rule, block=self._block)
