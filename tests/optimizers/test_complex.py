"""SGD on complex parameters: torch computes with complex numbers there, and so does the reference kernel."""

from typing import Any

import pytest
import torch

from farstep_service.store import Gradients
from tests.parity.cases import usual_options
from tests.support.optimizers.twins import Twins


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("options", usual_options("SGD"), ids=str)
def test_sgd_computes_with_complex_numbers_as_torch_does(options: dict[str, Any], dtype: torch.dtype):
    """Torch's SGD rounds both parts otherwise than real numbers; learning rates that round show the difference."""
    Twins("SGD", dtype, [options | {"lr": lr} for lr in (0.037, 1 / 3)]).run(100).check_equal()


def test_a_complex_infinity_goes_the_way_it_goes_in_torch():
    """The first buffer is the gradient itself; the product of an infinite number with a real one is NaN in a part."""
    twins = Twins("SGD", torch.complex64, [{"lr": 0.1, "momentum": 0.9}])
    for number in (complex(float("inf"), 1), 1):
        gradients = [torch.full_like(p, number) for p in twins.params]
        for index, (p, gradient) in enumerate(zip(twins.params, gradients, strict=True)):
            p.grad = gradient
            twins.gradients.segment(index).copy_(gradient)
        twins.optimizer.step()
        twins.store.apply(twins.hypers, Gradients(twins.gradients, [True] * len(gradients), {}))
        for _, there, here in twins.pairs():
            torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True)
