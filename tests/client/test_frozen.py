"""Parameters without a gradient: they do not travel, and no change of them is missed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farstep.settings import RemoteOptions
from tests.support.client.options import NAMES
from tests.support.client.twins import Twins, drawn
from tests.support.client.workers import Worker
from tests.support.service.servers import RunningServer

SHAPES = ((250, 1000), (8, 4), (5, 4), (3, 30))
FROZEN = (0, 2)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LBFGS"])
def test_what_has_no_gradient_does_not_come_back(name: str, server: RunningServer) -> None:
    """A step of a model with frozen parameters receives as many bytes as it sends, and has torch's bits."""
    twins = Twins(name, {}, {"server": server.url, "kernel": "reference"}, start=drawn(0, SHAPES))
    for seed in range(1, 4):
        gradients: list[Tensor | None] = [*twins.drawn(seed)]
        for index in FROZEN:
            gradients[index] = None
        twins.step(gradients)
        report = twins.ours.last_step
        assert report is not None
        assert report.bytes_received == sum(4 * p.numel() for i, p in enumerate(twins.here) if i not in FROZEN)
    twins.step(twins.drawn(4))
    twins.check()
    twins.ours.close()


@pytest.mark.parametrize("wire", [None, "bf16"])
def test_edits_of_frozen_parameters_count(wire: str | None, server: RunningServer) -> None:
    """A frozen parameter that is written here between steps is the session's from then on, and unfreezes there."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference", "wire": wire}
    twins = Twins("Adamax", {}, place, start=drawn(0, SHAPES))
    for seed in range(1, 4):
        for ps in (twins.here, twins.there):
            ps[0].data.mul_(0.5)
        twins.give([None, *twins.drawn(seed)[1:]])
        twins.ours.step()
        twins.theirs.step()
        assert torch.equal(twins.here[0], twins.there[0])
    twins.ours.pull()
    arrived = twins.there[0] if wire is None else twins.there[0].bfloat16().float()
    assert torch.equal(twins.here[0], arrived)
    twins.ours.close()


def test_what_another_worker_changed_arrives(shared: RemoteOptions) -> None:
    """A worker that freezes a parameter gets the steps that others take on it, also those that its own edits passed."""
    one, other = Worker(shared, "one"), Worker(shared, "other")
    ones = [torch.ones_like(p) for p in one.parameters]
    other.step([*ones[:1], *[None] * (len(ones) - 1)])
    one.parameters[1].data.mul_(2.0)  # brought to the session at a version that this worker does not hold
    one.step([None, *ones[1:]])
    assert torch.equal(one.parameters[0], other.parameters[0])
    other.step([None, *ones[1:]])
    one.step([None, *ones[1:]])
    other.optimizer.pull()
    for p, q in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(p, q)
    one.optimizer.close()
    other.optimizer.close()
