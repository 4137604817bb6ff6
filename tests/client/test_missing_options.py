"""Groups that lack an option, as those of old checkpoints do: torch's default, or torch's KeyError."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES, has
from tests.support.client.twins import ours, theirs

OTHER: dict[str, Any] = {
    "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True, "maximize": True, "rho": 0.7,
    "momentum": 0.7, "dampening": 0.1, "nesterov": True, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "t0": 1,
    "lambd": 0.01, "alpha": 0.9, "momentum_decay": 0.01, "decoupled_weight_decay": True, "centered": True, "d": 1.5,
    "etas": (0.4, 1.3), "step_sizes": (1e-4, 10), "beta2_decay": -0.5, "max_iter": 3, "max_eval": 4, "history_size": 3,
    "tolerance_grad": 1e-5, "tolerance_change": 1e-6, "line_search_fn": "strong_wolfe", "ns_steps": 3,
    "ns_coefficients": (3.0, -4.0, 2.0), "adjust_lr_fn": "match_rms_adamw", "foreach": None, "fused": None,
    "capturable": False, "differentiable": False,
}  # fmt: skip
"""Of each option a value that is not its default, so that it is seen where an old one stays in force."""

WITH: dict[str, dict[str, Any]] = {"nesterov": {"momentum": 0.9}, "dampening": {"momentum": 0.9}}
"""Options without which another one does nothing."""

STRICTER = {("SGD", "differentiable"), ("Rprop", "lr")}
"""What torch's step does not look at, or in its first step only; here such a group is refused as others are."""

OPTIONS = [(name, key) for name in NAMES for key in theirs(name)([torch.zeros(1, 1)]).defaults]


def of(name: str, key: str) -> dict[str, Any]:
    if not has(name, key):  # AdamW has it in its groups alone
        return {}
    return {key: (1e-4, 1e-2) if (name, key) == ("Adafactor", "eps") else OTHER[key], **WITH.get(key, {})}


def loaded_without(optimizer: Any, key: str) -> None:
    """Load the optimizer's own state from a checkpoint whose group lacks an option."""
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0][key]
    optimizer.load_state_dict(state)


def deleted(optimizer: Any, key: str) -> None:
    del optimizer.param_groups[0][key]


def trained(name: str, make: Callable[..., Any], key: str, lose: Callable[[Any, str], None], **place: Any) -> Any:
    """Return where three steps lead, the last two without the option, and the option as the group has it then."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    optimizer = make([p], **of(name, key), **place)

    def step() -> None:
        if name == "LBFGS":
            optimizer.step(closure)
            return
        gradient = torch.randn(4, 3, generator=generator)
        p.grad = gradient.to_sparse(1) if name == "SparseAdam" else gradient
        optimizer.step()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((p - 1) ** 2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step()
    lose(optimizer, key)
    step()
    step()
    return p.detach(), optimizer.param_groups[0].get(key)


@pytest.mark.parametrize("lose", [loaded_without, deleted])
@pytest.mark.parametrize(("name", "key"), OPTIONS, ids=["-".join(each) for each in OPTIONS])
@pytest.mark.usefixtures("one_thread")
def test_a_group_that_lacks_an_option(name: str, key: str, lose: Callable[[Any, str], None]) -> None:
    """Each option of each optimizer, lost by a load or by hand: torch's default is in force, or torch's KeyError."""
    try:
        expected = trained(name, theirs(name), key, lose)
    except KeyError:
        expected = None
    if expected is None or (expected[1] is None and (name, key) in STRICTER):
        with pytest.raises(KeyError, match=key):
            trained(name, ours(name), key, lose, kernel="reference")
        return
    mine = trained(name, ours(name), key, lose, kernel="reference")
    assert torch.equal(mine[0], expected[0])
    assert mine[1] == expected[1]


@pytest.mark.parametrize("lose", [loaded_without, deleted])
def test_what_is_missing_is_not_what_was_sent_last(lose: Callable[[Any, str], None], place: RemoteOptions) -> None:
    """A SparseAdam that maximised goes on as torch's does, which minimises; a server has no other rate in force."""
    expected = trained("SparseAdam", theirs("SparseAdam"), "maximize", lose)
    mine = trained("SparseAdam", ours("SparseAdam"), "maximize", lose, **place)
    assert torch.equal(mine[0], expected[0])
    with pytest.raises(KeyError, match="lr"):
        trained("SparseAdam", ours("SparseAdam"), "lr", lose, **place)
