"""The training that the demo runs twice: how much, with which optimizer, and which images a step sees.

A step is one batch per worker; its number is the session's version before it. The workers that train against a server
(`worker`) and `train_locally` get their batches from the same record.

A sync session reduces g = (g₀ + g₁ + ...) / N in the order of the workers and steps once. `train_locally` does the same
in one process with `torch.optim`, so the two end at the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import farstep
from farstep.errors import InvalidOption
from farstep.optim.base import RemoteOptimizer
from farstep.settings import KernelChoice, RemoteOptions
from farstep_service.demo.digits import SEED, Digits, build_model, load_digits, loss_of, shard, shuffled

BATCH_IMAGES = 32
EPOCHS = 16
WORKERS = 2
OPTIMIZER = "Adagrad"
SESSION = "digits"
KERNEL: KernelChoice = "reference"
"""Reference kernels give torch's bits. Fused ones may round the last bit of a step differently, and training magnifies
that: two runs with initial parameters that differ in the last bit end 0.2 apart, equally good, so that a comparison
proves nothing."""
OPTIONS: Mapping[str, Mapping[str, float]] = {
    "Adagrad": {"lr": 0.03},
    "Adadelta": {"lr": 1.0},
    "Adamax": {"lr": 0.01},
    "ASGD": {"lr": 0.3},
}
"""The optimizers of the demo, with options under which this network learns the digits."""
DEADLINE_S = 30.0
"""How long a step waits for all workers, before they try it again."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Describe one training run.

    Attributes:
        workers: how many workers share the training images.
        epochs: how often each worker sees its shard.
        optimizer: a name of `OPTIONS`.
        seed: decides the split, the shards' order and the initial parameters.

    Raises:
        InvalidOption: no worker, no epoch, an optimizer without options here, or a worker without a full batch.
    """

    workers: int = WORKERS
    epochs: int = EPOCHS
    optimizer: str = OPTIMIZER
    seed: int = SEED
    train: Digits = field(init=False, repr=False, compare=False)
    test: Digits = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise InvalidOption(f"The demo has no optimizer {self.optimizer!r}; it has {known}.", field="optimizer")
        for name in ("workers", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"Invalid {name}: {getattr(self, name)}. Must be at least 1.", field=name)
        train, test = load_digits(self.seed)
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "test", test)
        if self.steps_per_epoch < 1:
            raise InvalidOption(
                f"Invalid workers: {self.workers}. There are {len(train)} images, and each needs {BATCH_IMAGES}.",
                field="workers",
                limit=len(train) // BATCH_IMAGES,
            )

    @property
    def options(self) -> Mapping[str, float]:
        """Return the optimizer's options."""
        return OPTIONS[self.optimizer]

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of full batches in the smallest shard."""
        return len(self.train) // self.workers // BATCH_IMAGES

    @property
    def steps(self) -> int:
        """Return the version at which the training is complete."""
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int, worker: int) -> Digits:
        """Return the images of a worker at a step."""
        return self.train.take(self.indices(step, worker))

    def indices(self, step: int, worker: int) -> Tensor:
        """Return the indices of a worker's training images at a step. Each epoch shuffles its shard anew."""
        epoch, position = divmod(step, self.steps_per_epoch)
        own = shard(len(self.train), worker, self.workers)
        order = shuffled(len(own), self.seed, worker, epoch)
        return own[order[position * BATCH_IMAGES : (position + 1) * BATCH_IMAGES]]


def worker_name(index: int) -> str:
    """Return the name of a worker. Sync mode reduces in the order of the names, so they sort like the numbers."""
    return f"worker-{index:02d}"


def local_optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's optimizer with the training's options."""
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, training.optimizer)
    return kind(model.named_parameters(), **training.options)


def remote_optimizer(training: Training, model: nn.Module, remote: RemoteOptions) -> RemoteOptimizer:
    """Return farstep's optimizer with the same options, joined to the training's session.

    Raises:
        FarstepError: the session exists with other options, is full, or the server does not answer.
    """
    kind: Callable[..., RemoteOptimizer] = getattr(farstep.optim, training.optimizer)
    mode = farstep.Sync(workers=training.workers, deadline_s=DEADLINE_S)
    return kind(model.named_parameters(), **training.options, **{"consistency": mode, "kernel": KERNEL, **remote})


OnStep = Callable[[int, float], None]
"""Called after each step with the number of steps done and the mean of the workers' losses."""


def train_locally(training: Training, on_step: OnStep = lambda step, loss: None) -> nn.Sequential:
    """Return the trained model."""
    with one_thread():
        model = build_model(training.seed)
        optimizer = local_optimizer(training, model)
        for step in range(training.steps):
            losses = []
            for worker in range(training.workers):
                # Nothing is zeroed in between, so backward adds: g₀ + g₁ + ..., in the order of the workers.
                loss = loss_of(model, training.batch(step, worker))
                torch.autograd.backward(loss)
                losses.append(loss.item())
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(training.workers)
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, sum(losses) / len(losses))
    return model


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the workers do: more threads add up in another order, and the bits would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
