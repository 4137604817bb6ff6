"""Workers of a shared session, with models of their own, and torch on the mean of what they bring."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from farstep import Sync
from farstep.conversation import Conversation
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.twins import drawn, ours, parameters, theirs

LR = 0.1


class Worker:
    """A model, its optimizer in a shared session, and the gradients it brings."""

    def __init__(self, place: RemoteOptions, name: str, *, seed: int = 0, optimizer: str = "Adagrad") -> None:
        self.name = name
        self.parameters = parameters(drawn(seed))
        self.optimizer: RemoteOptimizer = ours(optimizer)(self.parameters, lr=LR, foreach=False, worker=name, **place)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()


class Reference:
    """torch's optimizer over the same parameters."""

    def __init__(self, optimizer: str = "Adagrad") -> None:
        self.parameters = parameters(drawn(0))
        self.optimizer = theirs(optimizer)(self.parameters, lr=LR, foreach=False)

    def step(self, *gradients: Sequence[Tensor | None]) -> None:
        """Step along the average of several workers' gradients, summed in the order given; missing ones are zero."""
        for p, each in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            there = [gradient for gradient in each if gradient is not None]
            p.grad = sum(there[1:], start=there[0]) / len(gradients) if there else None
        self.optimizer.step()


def synced(shared: RemoteOptions, workers: int, deadline_s: float = 30.0) -> RemoteOptions:
    return {**shared, "consistency": Sync(workers=workers, deadline_s=deadline_s)}


def waits(talk: Conversation, worker: Worker) -> None:
    """Return when a push of the worker has reached the barrier."""
    path = f"/v1/sessions/{worker.optimizer.session}/workers/{worker.name}"
    while not talk.control("GET", path)["waiting"]:
        pass


def together(
    threads: ThreadPoolExecutor, talk: Conversation, arriving: Sequence[tuple[Worker, Sequence[Tensor | None]]]
) -> None:
    """Let workers push one after the other; all but the last one wait at the barrier."""
    pushes: list[Future[None]] = []
    for worker, gradients in arriving:
        pushes.append(threads.submit(worker.step, gradients))
        if worker is not arriving[-1][0]:
            waits(talk, worker)
    for push in pushes:
        push.result()
