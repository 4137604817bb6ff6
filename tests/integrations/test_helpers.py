"""torch's helpers around an optimizer: clipping, averaged models with SWALR, DistributedDataParallel in one process.

They touch parameters, gradients and groups between steps; what they do there reaches the session bit by bit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from farstep.errors import TensorMismatch
from farstep.settings import RemoteOptions
from tests.support.client.twins import check_states
from tests.support.integrations.training import Make, batches, loss_of, model, ours, same, theirs

Change = Callable[[nn.Module], object]


def pair(name: str, place: RemoteOptions, **options: Any) -> tuple[Make, Make]:
    return ours(name, place, **options), theirs(name, **options)


# -- clipping --------------------------------------------------------------------------------------------------------

CLIPS: dict[str, Change] = {
    "norm": lambda network: nn.utils.clip_grad_norm_(network.parameters(), 0.1),
    "max-norm": lambda network: nn.utils.clip_grad_norm_(network.parameters(), 0.05, norm_type=float("inf")),
    "value": lambda network: nn.utils.clip_grad_value_(network.parameters(), 0.01),
}


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=list(CLIPS))
def test_clipped_gradients_are_what_the_session_gets(clip: Change, name: str, place: RemoteOptions) -> None:
    """A training with clipping equals torch's, and stays away from one without."""

    def trained(make: Make, change: Change | None) -> nn.Module:
        network = model()
        optimizer = make(network.parameters())
        for inputs, classes in batches():
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(network, inputs, classes))
            if change:
                change(network)
            optimizer.step()
        return network

    here, there = (trained(make, clip) for make in pair(name, place, lr=0.5))
    same(here, there)
    if name == "SGD":
        unclipped = trained(theirs(name, lr=0.5), None)
        assert not all(map(torch.equal, there.parameters(), unclipped.parameters()))


# -- averaging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])  # type: ignore[no-untyped-call]
def test_an_averaged_model(average: Any, place: RemoteOptions) -> None:
    """AveragedModel, SWALR and update_bn give torch's averages; the averages can be put in place and trained on."""

    def trained(make: Make) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
        network = model()
        averaged = AveragedModel(network, multi_avg_fn=average)
        optimizer = make(network.parameters())
        scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        for epoch in range(4):
            for inputs, classes in batches():
                optimizer.zero_grad()
                torch.autograd.backward(loss_of(network, inputs, classes))
                optimizer.step()
            if epoch:
                averaged.update_parameters(network)
                scheduler.step()
        update_bn(batches(), averaged)
        network.load_state_dict(averaged.module.state_dict())
        for inputs, classes in batches():
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(network, inputs, classes))
            optimizer.step()
        return network, averaged, optimizer.state_dict()

    (here, mean, state), (there, their_mean, their_state) = map(trained, pair("RMSprop", place, lr=0.05))
    same(here, there)
    same(mean, their_mean)
    check_states(state, their_state)


# -- DistributedDataParallel -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    """Begin a gloo process group with this process alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("hook", [None, default_hooks.allreduce_hook, default_hooks.fp16_compress_hook])
def test_distributed_data_parallel_in_one_process(hook: Any, place: RemoteOptions, group_of_one: None) -> None:
    """Gradients that DDP reduced, with its communication hooks and without, reach the session as torch's optimizer."""

    def trained(make: Make) -> nn.Module:
        network = DistributedDataParallel(model())
        if hook is not None:
            network.register_comm_hook(None, hook)
        optimizer = make(network.parameters())
        for number, (inputs, classes) in enumerate(batches()):
            optimizer.zero_grad()
            if number == 2:
                with network.no_sync():
                    torch.autograd.backward(loss_of(network, inputs, classes))
            torch.autograd.backward(loss_of(network, inputs, classes))
            optimizer.step()
        inside = network.module
        assert isinstance(inside, nn.Module)
        return inside

    here, there = map(trained, pair("Adam", place, lr=0.05))
    same(here, there)


def test_a_parameter_in_parts_is_refused(place: RemoteOptions, group_of_one: None) -> None:
    """A DTensor, as FSDP2 makes them, is refused by name at construction."""
    whole = nn.Parameter(torch.ones(4))
    parted = nn.Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
    with pytest.raises(TensorMismatch, match=r"'0\.1' is a DTensor"):
        ours("SGD", place, lr=0.1)([whole, parted])
