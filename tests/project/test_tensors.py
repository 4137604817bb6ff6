"""The code makes tensors of its own where and as it says, whatever torch's defaults are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "tensor", "zeros"),
}


def made(source: str) -> Iterator[tuple[int, str, set[str]]]:
    """Find the calls that make a tensor: line, function, and what is said by keyword."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        maker = node.func
        if maker.attr in MAKERS and isinstance(maker.value, ast.Name) and maker.value.id == "torch":
            yield node.lineno, maker.attr, {each.arg for each in node.keywords if each.arg}


def test_every_tensor_names_its_device() -> None:
    """`torch.set_default_device` would decide for one that does not."""
    found = []
    for path in sorted([*ROOT.glob("client/**/*.py"), *ROOT.glob("service/**/*.py")]):
        for line, name, said in made(path.read_text()):
            if "device" not in said:
                found.append(f"{path.relative_to(ROOT)}:{line}: torch.{name}")
    assert not found


def test_what_is_looked_for_is_torchs() -> None:
    """The functions exist, and the search finds them."""
    assert all(hasattr(torch, name) for name in MAKERS)
    assert list(made("torch.zeros(3)\ntorch.ones(2, device='cpu')\nother.zeros(1)")) == [
        (1, "zeros", set()),
        (2, "ones", {"device"}),
    ]
