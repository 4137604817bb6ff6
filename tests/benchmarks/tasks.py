"""What the benchmarks of consistency modes train: real data that is there already, small models, and a mark to reach.

digits    scikit-learn's handwritten digits, the demo's convolutional network     accuracy on images not trained on
text      Python's own help texts (`pydoc_data.topics`), a character at a time    cross entropy on text not trained on
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farstep_service.demo.digits import accuracy_of, build_model, load_digits

BATCH = 32
CONTEXT = 12
"""Characters that the model sees before the one it is asked for."""
WIDTH = 16
HIDDEN = 128
HELD_OUT = 0.1
ASKED = 2048
"""Places of the held-out text that are looked at."""

DIGITS_RATES = (0.02, 0.01, 0.04, 0.005)
TEXT_RATES = (0.04, 0.02, 0.08, 0.01)
"""Likely ones first: those after them are given up when they have taken longer."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """A training and the mark it is to reach.

    Attributes:
        name: what it is called.
        rates: learning rates of Adagrad, among which there is a good one for each way to train.
        mark: the accuracy, or the loss, at which it has been learned.
        rising: whether more is better.
        build: makes the model, the same each time.
        batch: given worker and step, returns what the worker trains on; pure.
        measure: says how good a model is.
    """

    name: str
    rates: tuple[float, ...]
    mark: float
    rising: bool
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    measure: Callable[[nn.Module], float]

    def reached(self, measured: float) -> bool:
        """Return whether that is good enough."""
        return measured >= self.mark if self.rising else measured <= self.mark


def digits(mark: float = 0.975) -> Task:
    """Return the training on digits."""
    train, test = load_digits()

    def batch(worker: int, step: int) -> Batch:
        chosen = train.take(_drawn(worker, step, len(train)))
        return chosen.images, chosen.labels

    return Task("digits", DIGITS_RATES, mark, True, build_model, batch, lambda model: accuracy_of(model, test))


def text(mark: float = 2.2) -> Task:
    """Return the training on text."""
    written = "".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    alphabet = sorted(set(written))
    places = {letter: place for place, letter in enumerate(alphabet)}
    letters = torch.tensor([places[letter] for letter in written])
    cut = int(len(letters) * (1 - HELD_OUT))
    train, test = letters[:cut], letters[cut:]
    windows = torch.arange(CONTEXT)

    def of(source: Tensor, where: Tensor) -> Batch:
        return source[where.unsqueeze(1) + windows], source[where + CONTEXT]

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Embedding(len(alphabet), WIDTH),
                nn.Flatten(),
                nn.Linear(CONTEXT * WIDTH, HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, len(alphabet)),
            )

    asked = of(test, torch.randperm(len(test) - CONTEXT, generator=torch.Generator().manual_seed(1))[:ASKED])

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(asked[0]), asked[1]))

    def batch(worker: int, step: int) -> Batch:
        return of(train, _drawn(worker, step, len(train) - CONTEXT))

    return Task("text", TEXT_RATES, mark, False, build, batch, measure)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "text": text}


def _drawn(worker: int, step: int, count: int) -> Tensor:
    return torch.randint(count, (BATCH,), generator=torch.Generator().manual_seed(1_000_003 * worker + step))
