"""Options given by themselves, not with a push: a session is never left in a state in which every push fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.service.raw import RawClient


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("Adam", {"betas": [2, 3]}),
        ("Adam", {"betas": [-5, -5]}),
        ("AdamW", {"betas": [1, 1]}),
        ("RAdam", {"betas": [2, 3]}),
        ("NAdam", {"momentum_decay": -1e300}),
        ("SparseAdam", {"betas": [2, 3]}),
        ("Adagrad", {"lr_decay": -1.0}),
        ("Adamax", {"betas": [2, 3]}),
        ("SGD", {"lr": -1e300}),
        ("SGD", {"weight_decay": 1e308}),
        ("Adafactor", {"d": 0.0}),
        ("Muon", {"ns_steps": 1000}),
        ("Muon", {"ns_coefficients": [1e300, 1e300, 1e300]}),
        ("LBFGS", {"line_search_fn": "x"}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_no_options_are_taken_in_with_which_every_push_would_fail(
    raw: RawClient, request: pytest.FixtureRequest, optimizer: str, options: dict[str, Any]
) -> None:
    """Options out of torch's ranges, or with which the next step is none, are refused; pushes go on as before."""
    name = f"options-{request.node.callspec.indices['options']}"
    weight = torch.ones(4, 4)
    (worker,) = raw.begun(name, parameters=[weight], optimizer=optimizer)
    gradients = [weight.to_sparse(1) if optimizer == "SparseAdam" else weight]
    closure = {"loss": 1.0} if optimizer == "LBFGS" else {}
    assert worker.push(gradients, **closure).status == 200
    before = raw.request("GET", f"/v1/sessions/{name}").document["groups"]
    answer = raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": options}})
    assert (answer.status, answer.code) == (422, "invalid_option"), answer.body
    assert raw.request("GET", f"/v1/sessions/{name}").document["groups"] == before
    for _ in range(3):
        assert worker.push(gradients, **closure).status == 200


def test_options_that_a_push_has_put_out_of_range_do_not_hold_others_up(raw: RawClient) -> None:
    """A schedule may end at -1e-19, as with torch; another option can still be changed, and this one put right."""
    (worker,) = raw.begun("edited")
    assert worker.push([torch.ones(4)], groups={"0": {"lr": -1e-19}}).status == 200
    (group,) = raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": {"eps": 1e-6}}}).document
    assert (group["lr"], group["eps"]) == (-1e-19, 1e-6)
    assert raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": {"lr": 0.5}}}).status == 200
