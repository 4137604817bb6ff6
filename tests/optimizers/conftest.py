"""What the tests of the update rules share: one thread, and kernels kept between runs."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from farstep_service.optimizers import RULES, Kernels
from farstep_service.optimizers.build import build_on_all_cores
from farstep_service.rule import Form


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, so that busy neighbours cost little and one kernel per rule is enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EVERY = [
    (name, optional)
    for name, rule in RULES.items()
    if "fused" in rule.kernels
    for count in range(len(rule.optional_fields) + 1)
    for optional in combinations(rule.optional_fields, count)
]
COMPILED = [(name, Form("float32", optional)) for name, optional in EVERY]
COMPILED += [("Adadelta", Form("float64")), ("Adam", Form("float64"))]
COMPILED += [(name, Form("bfloat16")) for name in ("Adagrad", "Adamax", "RMSprop")]
COMPILED += [(name, Form("float16")) for name in ("Adagrad", "RMSprop")]
NARROW = [(name, Form("float32", optional, "bfloat16", "bfloat16")) for name, optional in EVERY if not optional]
NARROW += [("Adagrad", Form("float32", (), "float16")), ("Adagrad", Form("float32", (), "float16", "float16"))]
NARROW += [("Adagrad", Form("float32", (), "", "float32"))]
COMPILED += NARROW
"""The compiled kernels that tests use; building all of them takes a minute, once per machine."""


@pytest.fixture(scope="session")
def fused() -> Kernels:
    """Return compiled kernels, from the user's cache if they have been built before."""
    kernels = Kernels("fused", build=build_on_all_cores)
    kernels.begin([(RULES[rule], form) for rule, form in COMPILED], torch.device("cpu"))
    kernels.wait()
    failed = [status for status in kernels.status() if status.state == "failed"]
    if failed and "Compiler" in failed[0].reason:
        pytest.skip(f"there is no C++ compiler here: {failed[0].reason}")
    assert failed == []
    return kernels
