"""The same training twice: once by torch.optim with one tensor after the other, once by a store."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farstep_service.kernels import Kernels
from farstep_service.kernels.kernel import KernelSource
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import RULES
from farstep_service.store import BorrowedBuffers, FlatBuffers, Gradients, Store
from tests.parity.cases import usual_options

SHAPES: tuple[tuple[int, ...], ...] = ((7, 13), (1,), (129,), (3, 5, 7), (), (4099,), (64, 33), (17,), (0, 3), (1000,))
"""Ten odd-sized tensors: a scalar, an empty one, and no length that a vector register divides."""

FITTING: Mapping[str, tuple[tuple[int, ...], ...]] = {
    # torch divides by the number of elements
    "Adafactor": (*SHAPES[:8], (1, 3), (1000,)),
    "Muon": ((7, 13), (1, 1), (3, 43), (35, 3), (1, 5), (64, 64), (64, 33), (17, 17), (0, 3), (100, 10)),
    "SparseAdam": ((7, 13), (1,), (129,), (3, 5, 7), (2, 2), (4099,), (64, 33), (17,), (0, 3), (1000,)),
}
"""Shapes for rules that do not take all of `SHAPES`."""

Options = Mapping[str, Any]


def random_like(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return normal noise; in half precision, rounded from single, as torch has no generator for it everywhere."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randn(shape, dtype=dtype, generator=generator)


def some_rows(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """Return some rows of a gradient, in any order and some of them twice, as a sparse gradient."""
    count = gradient.shape[0]
    rows = torch.randint(0, max(count, 1), (count,), generator=generator)
    return torch.sparse_coo_tensor(rows.unsqueeze(0), gradient, gradient.shape, check_invariants=True)


@dataclass
class Twins:
    """Two optimizers of the same parameters.

    Attributes:
        name: torch's class name.
        dtype: of every parameter.
        groups: options of each group; parameters are dealt out to the groups in blocks.
        kernels: what the store runs.
        missing: says which parameters have no gradient in a step.
    """

    name: str
    dtype: torch.dtype = torch.float32
    groups: Sequence[Options] = ({},)
    kernels: KernelSource = field(default_factory=lambda: Kernels("reference"))
    missing: Callable[[int, int], bool] = lambda step, index: False
    torch_options: Options | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.noise = torch.Generator().manual_seed(self.seed)
        rule = RULES[self.name]
        self.shapes = FITTING.get(self.name, SHAPES)
        self.params = [random_like(shape, self.dtype, self.noise).requires_grad_() for shape in self.shapes]
        per_group = -(-len(self.shapes) // len(self.groups))
        group_of = [index // per_group for index in range(len(self.shapes))]
        # torch fills the state with its constructor's value, whatever a group says.
        eager = {name: value for name, value in self.groups[0].items() if name == "initial_accumulator_value"}
        kind = getattr(torch.optim, self.name)
        plain = {"foreach": False} if "foreach" in inspect.signature(kind).parameters else {}
        self.optimizer = kind(
            [
                {"params": [p for p, its in zip(self.params, group_of, strict=True) if its == number], **options}
                for number, options in enumerate(self.groups)
            ],
            **(plain if self.torch_options is None else self.torch_options),
            **eager,
        )
        dtype = str(self.dtype).removeprefix("torch.")
        self.layout = Layout.build(
            [SegmentSpec(f"p{index}", shape, dtype, group_of[index]) for index, shape in enumerate(self.shapes)]
        )
        self.hypers = [rule.hyper.from_options({**options, **eager}) for options in self.groups]
        self.gradients = FlatBuffers(self.layout)
        self.store = Store(
            self.layout,
            rule,
            self.hypers,
            kernels=self.kernels,
            parameters=FlatBuffers(self.layout).copy_(BorrowedBuffers(self.layout, self.params)),
        )
        self.steps = 0

    def change(self, group: int, **options: Any) -> None:
        """Change options of a group on both sides."""
        self.optimizer.param_groups[group].update(options)
        hyper = self.hypers[group]
        self.hypers[group] = type(hyper).from_options({**hyper.to_options(), **options}, edited=True)

    def step(self) -> None:
        """Let both take a step along the same noise."""
        present = [not self.missing(self.steps, index) for index in range(len(self.shapes))]
        sparse = {}
        for index, p in enumerate(self.params):
            p.grad = random_like(self.shapes[index], self.dtype, self.noise) if present[index] else None
            if p.grad is None:
                continue
            if self.name == "SparseAdam":
                p.grad = some_rows(p.grad, self.noise)
                sparse[index] = (p.grad._indices(), p.grad._values())
            else:
                self.gradients.segment(index).copy_(p.grad)
        self.optimizer.step()
        self.store.apply(self.hypers, Gradients(self.gradients, present, sparse))
        self.steps += 1

    def run(self, steps: int) -> "Twins":
        """Take several steps."""
        for _ in range(steps):
            self.step()
        return self

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return what both have now: a name, torch's tensor and the store's, for parameters and all state."""
        rule = self.store.rule
        found = []
        for index, p in enumerate(self.params):
            found.append((f"p{index}", p.detach(), self.store.buffers("param").segment(index)))
            state = self.optimizer.state.get(p, {})
            counts = self.store.counts(index)
            assert [*rule.segment_fields, *counts.fields] == list(state) if counts else state == {}
            for name in rule.tensor_fields:
                if name in state:
                    found.append((f"{name} of p{index}", state[name], self.store.buffers(name).segment(index)))
            for name in rule.segment_fields:
                (number,) = self.store.numbers(name, [index])
                assert (number is not None) == (name in state)
                if number is not None:
                    counted = torch.tensor(float(state[name]))
                    found.append((f"{name} of p{index}", counted, torch.tensor(float(number))))
        return found

    def check_equal(self) -> None:
        """Fail unless both have the same bits."""
        different = [name for name, theirs, ours in self.pairs() if not torch.equal(theirs, ours)]
        assert different == []

    def check_close(self, rtol: float | None = None, atol: float | None = None) -> None:
        """Fail unless both are within torch's tolerance for their dtype."""
        for name, theirs, ours in self.pairs():
            try:
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
            except AssertionError as exc:
                exc.add_note(f"in {name}")
                raise


OPTIONS = {name: usual_options(name) for name in RULES}
"""Every rule with its defaults and with options that act on each other. Each option alone is in `tests/parity/`."""
