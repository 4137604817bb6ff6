"""The reference kernel gives the bits of torch.optim, with `foreach=False`, on the same device."""

from typing import Any

import pytest
import torch

from farstep_service.optimizers import RULES
from tests.support.optimizers.twins import OPTIONS, Twins

STEPS = 200

CASES = [(name, options) for name, every in OPTIONS.items() for options in every]
IDS = [f"{name}-{','.join(map(str, options)) or 'defaults'}" for name, options in CASES]


@pytest.mark.promise(
    "Reference kernels give the bits of `torch.optim` in float32 and float64, embedded and on a server.",
    area="bits of torch",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_all_steps_are_bit_identical(name: str, options: dict[str, Any], dtype: torch.dtype):
    """After 200 steps on ten odd-sized tensors in one flat buffer, parameters and state have torch's bits."""
    Twins(name, dtype, [options]).run(STEPS).check_equal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_groups_missing_gradients_and_changed_options(name: str, dtype: torch.dtype):
    """Groups of their own options, gradients that come and go, and options changed midway keep torch's bits."""
    twins = Twins(
        name,
        dtype,
        [OPTIONS[name][1], {"lr": 0.05}, OPTIONS[name][2]],
        missing=lambda step, index: (step + index) % 5 == 0 and index % 3 != 0,
    )
    for step in range(STEPS):
        if step % 50 == 20:
            twins.change(0, lr=0.2 / (1 + step))
            if "weight_decay" in theirs_defaults(name):
                twins.change(2, weight_decay=0.003 * step)
        if step == 70 and "maximize" in theirs_defaults(name):
            twins.change(1, maximize=True)
        twins.step()
    twins.check_equal()


@pytest.mark.parametrize("name", RULES)
def test_a_learning_rate_of_a_schedule_keeps_the_bits(name: str):
    """A learning rate that changes with every step is torch's at every step, one step late where torch's is."""
    twins = Twins(name, groups=[OPTIONS[name][1]])
    for step in range(60):
        twins.change(0, lr=0.1 * (1 + step) / 60)
        twins.step()
        twins.check_equal()


def theirs_defaults(name: str) -> dict[str, Any]:
    """Return torch's options of a group."""
    defaults: dict[str, Any] = getattr(torch.optim, name)([torch.zeros(1, 1)]).defaults
    return defaults


REAL = ("Adafactor", "Muon", "SparseAdam")
"""Rules that take no complex parameters."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in RULES
        for dtype in (torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
        if name not in REAL or not dtype.is_complex
    ],
    ids=str,
)
def test_other_dtypes_are_within_tolerance(name: str, dtype: torch.dtype):
    """Half precision and complex parameters stay within torch's own tolerance."""
    half = dtype in (torch.bfloat16, torch.float16)
    # An epsilon that half precision can represent: with 1e-10, rounding decides between a number and a division by 0.
    eps = (1e-3, 1e-3) if name == "Adafactor" else 1e-3
    options = {"eps": eps} if half and "eps" in theirs_defaults(name) else {}
    more = {"weight_decay": 0.05} if "weight_decay" in theirs_defaults(name) else {}
    more |= {"amsgrad": True} if name in ("Adam", "AdamW") else {}
    more |= {"momentum": 0.5} if name == "SGD" else {}
    options |= {"lr": 0.01} if half and name == "SGD" else {}
    twins = Twins(name, dtype, [OPTIONS[name][1] | options, more | options]).run(20)
    # A rounding error of half precision lives on in the parameter, so it may differ by some of its last bits.
    twins.check_close(**({"rtol": 1.6e-2, "atol": 2e-2} if half else {}))


def test_asgd_rounds_eta_and_mu_to_float32():
    """Eta and mu of ASGD are float32 numbers even for float64 parameters, as torch stores them."""
    twins = Twins("ASGD", torch.float64, [{"lr": 0.1, "t0": 3}]).run(10)
    for field in ("eta", "mu"):
        (number,) = twins.store.numbers(field, [0])
        assert number == torch.tensor(number, dtype=torch.float32).item()
        assert number == twins.optimizer.state[twins.params[0]][field].item()


def test_asgd_uses_a_new_learning_rate_one_step_late():
    """A step of ASGD uses the eta that the step before left, so lr=0 still moves the parameters once."""
    twins = Twins("ASGD", groups=[{"lr": 0.1}]).run(3)
    before = twins.store.buffers("param").segment(0).clone()
    twins.change(0, lr=0.0)
    twins.step()
    moved = twins.store.buffers("param").segment(0).clone()
    assert not torch.equal(moved, before)
    twins.step()
    assert torch.equal(twins.store.buffers("param").segment(0), moved)
    twins.check_equal()


@pytest.mark.parametrize("etas", [(1e-60, 1.2), (0.99999999, 1.00000001)], ids=["zero", "one"])
def test_rprop_replaces_signs_in_the_order_of_torch(etas: tuple[float, float]):
    """A factor that rounds to zero becomes one, and one that rounds to one stops every element, as in torch."""
    Twins("Rprop", groups=[{"etas": etas}]).run(20).check_equal()
