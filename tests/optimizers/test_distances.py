"""Training in 16 bits with fused kernels: no further from float64 than torch's (`make parity` has every optimizer)."""

import pytest
import torch

from farstep_service.kernels import Kernels
from tests.parity.cases import usual_options
from tests.parity.distances import HALVES, Distance, Spread, distance

pytestmark = pytest.mark.timeout(600)  # the first run on a machine compiles

CASES = [
    (name, dtype, options)
    for name, dtypes in (("Adagrad", HALVES), ("Adamax", HALVES[:1]), ("RMSprop", HALVES))
    for dtype in dtypes
    for options in usual_options(name)[:2]
]


@pytest.mark.promise(
    "Fused kernels are within torch's own tolerance, and no further from the float64 result than torch is.",
    area="bits of torch",
)
@pytest.mark.parametrize(("name", "dtype", "options"), CASES, ids=lambda each: str(each).replace(" ", ""))
def test_fused_kernels_are_not_further_from_float64_than_torch(
    fused: Kernels, name: str, dtype: torch.dtype, options: dict[str, float]
):
    """Over 200 steps of 16,384 elements, their distance's root mean square is at most 2 % above torch's."""
    found = distance(name, options, dtype)
    assert not found.further, found
    assert found.fused.rms > 0


def test_a_coarser_step_is_further_away():
    """Options that are rounded to 16 bits, as a careless kernel would, are noticed by their distance."""
    alpha = torch.tensor(0.99).bfloat16().item()
    found = distance("RMSprop", {}, torch.bfloat16, lambda ps: torch.optim.RMSprop(ps, alpha=alpha, foreach=False))
    assert found.further
    assert not distance("RMSprop", {}, torch.bfloat16, lambda ps: torch.optim.RMSprop(ps, foreach=False)).further


@pytest.mark.parametrize(
    ("theirs", "mine", "further"),
    [
        (Spread(1.0, 3.0, 0), Spread(1.02, 9.0, 0), False),
        (Spread(1.0, 3.0, 0), Spread(1.03, 3.0, 0), True),
        (Spread(1.0, 3.0, 4), Spread(1.0, 3.0, 4), False),
        (Spread(1.0, 3.0, 4), Spread(0.5, 3.0, 5), True),
        (Spread(1.0, 3.0, 4), Spread(float("inf"), float("inf"), 4), True),
        (Spread(1.0, 3.0, 4), Spread(float("nan"), float("nan"), 4), True),
        (Spread(0.0, 0.0, 0), Spread(0.0, 0.0, 0), False),
        (Spread(0.0, 0.0, 0), Spread(1e-9, 1e-9, 0), True),
    ],
    ids=str,
)
def test_what_counts_as_further_away(theirs: Spread, mine: Spread, further: bool):
    """A larger distance, more infinite or undefined elements, and those where torch has none."""
    assert Distance("SGD", {}, torch.float16, theirs, mine).further is further
