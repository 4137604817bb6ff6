"""Hugging Face `transformers.Trainer`, the package itself, on a language model of two layers with random weights.

Trainer takes an optimizer (`optimizers=`) or makes one from a class and its arguments (`optimizer_cls_and_kwargs=`),
prepares it with Accelerate, clips gradients and writes checkpoints. Each training is compared with torch's AdamW, bit
by bit.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import farstep
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.twins import check_states
from tests.support.integrations.training import Make, ours, same, theirs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the packages that transformers finds say about their own imports
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_linear_schedule_with_warmup

STEPS = 8
LR = 0.01


class Text(Dataset[dict[str, Tensor]]):
    """Sequences of token numbers, drawn."""

    def __init__(self) -> None:
        self._rows = torch.randint(32, (24, 10), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def language_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def arguments(at: Path, **options: Any) -> TrainingArguments:
    chosen = {"max_steps": STEPS, "save_strategy": "no", "lr_scheduler_type": "linear", "warmup_steps": 2, **options}
    return TrainingArguments(
        output_dir=str(at),
        use_cpu=True,
        per_device_train_batch_size=4,
        learning_rate=LR,
        weight_decay=0.1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=7,
        **chosen,
    )


def given(make: Make, at: Path, *, resume: Path | None = None, seed: int = 0, **options: Any) -> Trainer:
    """Train with an optimizer and a schedule of our own (`optimizers=`)."""
    network = language_model(seed)
    optimizer = make(network.parameters())
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)  # type: ignore[no-untyped-call]
    trainer = Trainer(network, arguments(at, **options), train_dataset=Text(), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def made(
    kind: Any, kwargs: dict[str, Any], at: Path, *, resume: Path | None = None, seed: int = 0, **options: Any
) -> Trainer:
    """Train with an optimizer that Trainer makes (`optimizer_cls_and_kwargs=`), in groups with and without decay."""
    trainer = Trainer(
        language_model(seed),
        arguments(at, **options),
        train_dataset=Text(),
        optimizer_cls_and_kwargs=(kind, {"lr": LR, "foreach": False, **kwargs}),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    inside: Any = trainer.optimizer
    optimizer = inside.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def check(here: Trainer, there: Trainer) -> None:
    """Compare models, states and groups."""
    assert here.model is not None
    assert there.model is not None
    same(here.model, there.model)
    check_states(optimizer_of(here).state_dict(), optimizer_of(there).state_dict())


@pytest.mark.promise("Lightning, Accelerate and `transformers.Trainer` train with torch's bits.", area="bits of torch")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_that_is_given(accumulate: int, place: RemoteOptions, tmp_path: Path) -> None:
    """`optimizers=(optimizer, schedule)` trains as with torch's, with accumulated gradients too."""
    makers = ours("AdamW", place, lr=LR), theirs("AdamW", lr=LR)
    here, there = (given(make, tmp_path, gradient_accumulation_steps=accumulate) for make in makers)
    check(here, there)
    optimizer = optimizer_of(here)
    assert isinstance(optimizer, RemoteOptimizer)
    assert optimizer.version == STEPS


def test_an_optimizer_that_trainer_makes(place: RemoteOptions, tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs=(farstep.optim.AdamW, {...})` trains as with torch's."""
    here = made(farstep.optim.AdamW, {**place}, tmp_path)
    there = made(torch.optim.AdamW, {}, tmp_path)
    check(here, there)
    assert isinstance(optimizer_of(here), farstep.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer_of(here).param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("way", ["given", "made"])
def test_a_training_resumed_from_a_checkpoint(way: str, place: RemoteOptions, tmp_path: Path) -> None:
    """`resume_from_checkpoint` in a new Trainer ends where an uninterrupted training ends, and where torch's does."""
    saving = {"save_strategy": "steps", "save_steps": 5}

    def run(plain: bool, at: Path, **options: Any) -> Trainer:
        if way == "given":
            return given(theirs("AdamW", lr=LR) if plain else ours("AdamW", place, lr=LR), at, **options)
        return made(torch.optim.AdamW if plain else farstep.optim.AdamW, {} if plain else {**place}, at, **options)

    whole = run(False, tmp_path / "ours", **saving)
    resumed = run(False, tmp_path / "again", resume=tmp_path / "ours" / "checkpoint-5", seed=5)
    check(resumed, whole)
    check(resumed, run(True, tmp_path / "theirs"))


def test_a_training_that_torch_began(place: RemoteOptions, tmp_path: Path) -> None:
    """A checkpoint of Trainer with torch's AdamW goes on in a session."""
    there = given(theirs("AdamW", lr=LR), tmp_path / "theirs", save_strategy="steps", save_steps=5)
    resumed = given(ours("AdamW", place, lr=LR), tmp_path / "ours", resume=tmp_path / "theirs" / "checkpoint-5", seed=5)
    check(resumed, there)
