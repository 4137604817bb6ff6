"""PyTorch Lightning, the package itself: `Trainer.fit` with clipping, accumulation, schedules, checkpoints and resume.

Lightning wraps the optimizer in a subclass made on the spot, passes a closure to `step`, moves the state's tensors to
the device and reads and loads `state_dict`s. A training is compared with the same one on torch's optimizer, bit by bit.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.carrying import Counting
from tests.support.client.twins import check_states
from tests.support.integrations.training import Make, batches, loss_of, model, ours, same, theirs
from tests.support.service.servers import RunningServer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what lightning and torchmetrics say about their own imports
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.core.optimizer import LightningOptimizer

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    """The model, its loss, and an optimizer with a schedule."""

    def __init__(self, make: Make, seed: int = 0) -> None:
        super().__init__()
        self.network = model(seed)
        self._make = make

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return loss_of(self.network, *batch)

    def configure_optimizers(self) -> Any:
        optimizer = self._make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2), "interval": "step"}}


class Cold(Module):
    """A module that resumes without its optimizer's state."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"] = {}


class Manual(Module):
    """The same with manual optimization: two optimizers that take turns, and a clip by hand."""

    def __init__(self, make: Make, seed: int = 0) -> None:
        super().__init__(make, seed)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()[index % 2]  # type: ignore[index]
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.network, *batch))
        self.clip_gradients(optimizer.optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *others = self.network
        rest = [p for each in others for p in each.parameters()]
        return [self._make(first.parameters()), self._make(rest)]


def fit(module: Module, epochs: int, *, resume: Path | None = None, **options: Any) -> Module:
    """Train a module and return it."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": "callbacks" in options, **options},
    )
    trainer.fit(module, batches(), ckpt_path=resume)
    return module


def optimizer_of(module: Module) -> torch.optim.Optimizer:
    """Return the optimizer that Lightning wrapped."""
    wrapped = module.optimizers()
    assert isinstance(wrapped, LightningOptimizer)
    return wrapped.optimizer


def pair(place: RemoteOptions, name: str = "AdamW") -> tuple[Make, Make]:
    return ours(name, place, lr=0.05), theirs(name, lr=0.05)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip-norm": {"gradient_clip_val": 0.1},
    "clip-value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 4},
    "both": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
}


@pytest.mark.promise("Lightning, Accelerate and `transformers.Trainer` train with torch's bits.", area="bits of torch")
@pytest.mark.parametrize("options", WAYS.values(), ids=list(WAYS))
def test_fit_has_torchs_bits(options: dict[str, Any], place: RemoteOptions) -> None:
    """Parameters, state, groups and schedule after two epochs are those of torch's optimizer."""
    here, there = (fit(Module(make), 2, **options) for make in pair(place))
    same(here, there)
    check_states(optimizer_of(here).state_dict(), optimizer_of(there).state_dict())
    assert here.trainer.global_step == there.trainer.global_step


def test_manual_optimization_with_two_optimizers(place: RemoteOptions) -> None:
    """Each optimizer is in a session of its own, and the wrapper's `step` steps it."""
    here, there = (fit(Manual(make), 2) for make in pair(place, "Adagrad"))
    same(here, there)
    assert here.trainer.global_step == there.trainer.global_step


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_a_training_resumed_from_a_checkpoint(name: str, place: RemoteOptions, tmp_path: Path) -> None:
    """A fresh module and optimizer that go on from ModelCheckpoint's file end where an uninterrupted training ends."""
    make, plain = pair(place, name)
    whole = fit(Module(make), 3, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")])
    resumed = fit(Module(make, seed=5), 3, resume=tmp_path / "epoch=1.ckpt")
    there = fit(Module(plain), 3)
    same(resumed, whole)
    same(resumed, there)
    check_states(optimizer_of(resumed).state_dict(), optimizer_of(there).state_dict())
    cold = fit(Cold(make, seed=5), 3, resume=tmp_path / "epoch=1.ckpt")
    assert not all(map(torch.equal, cold.parameters(), whole.parameters()))


def test_a_training_resumed_in_the_middle_of_an_epoch(place: RemoteOptions, tmp_path: Path) -> None:
    """Lightning begins the data anew there, so it is compared with torch's optimizer, resumed at the same step."""

    def resumed(make: Make, at: Path) -> Module:
        saving = ModelCheckpoint(dirpath=at, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        fit(Module(make), 2, callbacks=[saving])
        return fit(Module(make, seed=5), 3, resume=at / "step=8.ckpt")

    here, there = (resumed(make, tmp_path / str(number)) for number, make in enumerate(pair(place)))
    same(here, there)
    check_states(optimizer_of(here).state_dict(), optimizer_of(there).state_dict())


def test_checkpoints_are_interchangeable_with_torchs(place: RemoteOptions, tmp_path: Path) -> None:
    """A training that began on torch's optimizer goes on in a session, and the other way round."""
    makers = pair(place)
    whole = fit(Module(makers[1]), 2)
    for number, (first, second) in enumerate((makers, makers[::-1])):
        at = tmp_path / str(number)
        fit(Module(first), 1, callbacks=[ModelCheckpoint(dirpath=at, filename="end")])
        same(fit(Module(second, seed=5), 2, resume=at / "end.ckpt"), whole)


def test_what_lightning_reads_and_loads_again_moves_no_tensor(server: RunningServer, tmp_path: Path) -> None:
    """`state_dict`, the move of every tensor to the device, and `load_state_dict` of what was read send nothing."""
    transport = Counting()
    make = ours("AdamW", {"server": server.url, "transport": transport, "kernel": "reference"}, lr=0.05)
    module = fit(Module(make), 1)
    optimizer = optimizer_of(module)
    assert isinstance(optimizer, RemoteOptimizer)
    read = optimizer.state_dict()
    steps: list[Callable[[], object]] = [
        lambda: module.trainer.strategy.optimizer_state(optimizer),
        lambda: module.trainer.strategy.load_optimizer_state_dict({"optimizer_states": [read]}),
        lambda: module.trainer.save_checkpoint(tmp_path / "again.ckpt"),
    ]
    assert [transport.during(step) for step in steps] == [0, 0, 0]


def test_the_wrapper_is_ours_and_does_not_end_the_session(place: RemoteOptions) -> None:
    """Lightning's subclass made on the spot has our attributes, and its end is not the optimizer's."""
    network = nn.Linear(2, 1)
    make, _ = pair(place)
    optimizer = make(network.parameters())
    wrapped: Any = LightningOptimizer(optimizer)
    assert isinstance(wrapped, type(optimizer))
    assert (wrapped.session, wrapped.version) == (optimizer.session, 0)  # type: ignore[attr-defined]
    del wrapped
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
