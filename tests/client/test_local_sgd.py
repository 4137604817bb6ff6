"""LocalSGD and DiLoCo are what their papers say: compared bit by bit with plain torch in one place.

Workers are threads with models of their own; the server is a process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import farstep
from farstep.errors import InvalidOption
from farstep.settings import RemoteOptions
from tests.support.client.rounds import EVERY, Open, Simulation, Worker, diloco, local_sgd, model_of, parameters_of
from tests.support.client.twins import check_equal, check_parameters, drawn
from tests.support.client.workers import synced

Crew = Callable[[list[Worker], int], None]
BOTH = pytest.mark.parametrize("make", [local_sgd, diloco])


@pytest.fixture
def crew(threads: ThreadPoolExecutor) -> Crew:
    """Let workers that wait for each other take local steps."""

    def together(workers: list[Worker], steps: int) -> None:
        for done in [threads.submit(each.train, steps) for each in workers]:
            done.result()

    return together


@pytest.mark.promise(
    "Rounds of `LocalSGD` and `DiLoCo` are those of the papers, bit for bit.",
    area="consistency modes",
)
@BOTH
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sync_rounds_are_the_papers(shared: RemoteOptions, crew: Crew, make: Open, count: int) -> None:
    """Bit for bit what plain torch gives, at the end of each round, and a local step later, with 1, 2 and 4 workers."""
    place = synced(shared, count)
    workers = [Worker(make, place, number) for number in range(count)]
    reference = Simulation(make, count)
    for each in workers:
        each.rounds.__enter__()
    for version in range(1, 5):
        crew(workers, EVERY)
        reference.round()
        for worker, model in zip(workers, reference.models, strict=True):
            check_parameters(worker.parameters, model)
            report = worker.rounds.last_sync
            assert report is not None
            assert (report.version, report.divisor, worker.rounds.local_step) == (version, count, 0)
            assert report.contributors == tuple(f"w{number}" for number in range(count))
    crew(workers, 1)
    for number, worker in enumerate(workers):
        reference.local(number, 1)
        check_parameters(worker.parameters, reference.models[number])


@BOTH
def test_embedded_rounds_are_the_papers(make: Open) -> None:
    """Without a server there is one worker, and its rounds are those of the formula."""
    reference = Simulation(make, 1)
    worker = Worker(make, {"kernel": "reference"})
    with worker.rounds:
        for _ in range(3):
            worker.train(EVERY)
            reference.round()
            check_parameters(worker.parameters, reference.models[0])


@BOTH
def test_async_rounds_step_each_by_itself(shared: RemoteOptions, make: Open) -> None:
    """In an async session each worker's rounds end by themselves, against the parameters that they began with."""
    workers = [Worker(make, shared, number) for number in range(2)]
    reference = Simulation(make, 2)
    began = [reference.take(number) for number in range(2)]
    with workers[0].rounds, workers[1].rounds:
        for turn, number in enumerate((0, 1, 1, 0, 0, 1), 1):
            workers[number].train(EVERY)
            reference.local(number, EVERY)
            reference.step([reference.delta(number, began[number])])
            began[number] = reference.take(number)
            check_parameters(workers[number].parameters, reference.models[number])
            assert workers[number].rounds.version == turn
        report = workers[1].rounds.last_sync
    assert report is not None
    assert report.staleness == 2


def test_local_sgd_is_the_mean_of_the_parameters(shared: RemoteOptions, crew: Crew) -> None:
    """After a round every model is the mean of what the workers' models were, but for rounding."""
    place = synced(shared, 2)
    workers = [Worker(local_sgd, place, number, every=4) for number in range(2)]
    with workers[0].rounds, workers[1].rounds:
        for each in workers:
            each.train(3)
        alone = [Worker(local_sgd, {}, number, every=100) for number in range(2)]
        for one in alone:
            with one.rounds:
                one.train(4)
        crew(workers, 1)
    mean = [(a + b) / 2 for a, b in zip(alone[0].values, alone[1].values, strict=True)]
    for each in workers:
        check_equal(each.values, mean, exact=False)


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.Adam])
def test_any_optimizer_can_be_the_outer_one(shared: RemoteOptions, optimizer: Any) -> None:
    """The outer optimizer is torch's with its options and groups; the session steps as that one would."""
    model, bases = model_of(), [p.detach().clone().requires_grad_() for p in parameters_of(model_of())]

    def grouped(parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
        return [{"params": parameters[1:], "lr": 0.3}, {"params": parameters[:1]}]

    reference = optimizer(grouped(bases), lr=0.1, foreach=False)
    theirs = optimizer(grouped(parameters_of(model)), lr=0.1, foreach=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    with farstep.DiLoCo(model, inner, theirs, every=1, **shared) as rounds:
        for seed in range(1, 4):
            for p, b, gradient in zip(parameters_of(model), bases, drawn(seed, [p.shape for p in bases]), strict=True):
                p.grad = gradient
                b.grad = b.detach() - (b.detach() - 0.5 * gradient)
            inner.step()
            reference.step()
            check_parameters(parameters_of(model), bases)
        assert rounds.outer.version == 3


def test_the_inner_optimizer_may_be_in_a_session_too(shared: RemoteOptions, place: RemoteOptions) -> None:
    """A farstep optimizer steps locally as torch's does, wherever its own session is: it notices the new parameters."""
    worker, reference = Worker(diloco, shared), Simulation(diloco, 1)
    worker.inner = farstep.optim.AdamW(worker.parameters, lr=0.05, foreach=False, **place)
    with farstep.DiLoCo(worker.model, worker.inner, every=EVERY, **shared) as rounds:
        for _ in range(3):
            worker.train(EVERY)
            reference.round()
            check_parameters(worker.parameters, reference.models[0])
        assert rounds.version == 3


def test_a_scheduler_of_the_outer_rate(shared: RemoteOptions) -> None:
    """Schedulers take the session's optimizer, and what they set counts from the next synchronisation on."""
    worker, reference = Worker(diloco, shared), Simulation(diloco, 1)
    with worker.rounds as rounds:
        schedules = [StepLR(each, 1, gamma=0.5) for each in (rounds.outer, reference.outer)]
        for _ in range(3):
            worker.train(EVERY)
            reference.round()
            check_parameters(worker.parameters, reference.models[0])
            for each in schedules:
                each.step()
    assert rounds.outer.param_groups[0]["lr"] == 0.7 / 8


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_pseudo_gradients_in_16_bits(shared: RemoteOptions, half: Any) -> None:
    """`wire` rounds pseudo-gradients on their way there and parameters on their way back, and nothing else."""
    worker = Worker(local_sgd, {**shared, "wire": half}, every=1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    alone = Worker(local_sgd, {}, every=100)
    with worker.rounds, alone.rounds:
        begin = worker.values
        worker.train()
        alone.train()
    deltas = [(b - p).to(dtype).float() for b, p in zip(begin, alone.values, strict=True)]
    check_equal(worker.values, [(b - d).to(dtype).float() for b, d in zip(begin, deltas, strict=True)])


def test_what_is_not_synchronised(shared: RemoteOptions) -> None:
    """Parameters that need no gradient, buffers, and the state of the inner optimizer are each worker's own."""
    workers = [Worker(diloco, shared, number, seed=number) for number in range(2)]
    with torch.no_grad():
        workers[1].model.get_parameter("frozen").fill_(7.0)
    with workers[0].rounds, workers[1].rounds:
        check_parameters(workers[1].parameters, workers[0].parameters)
        workers[0].train(EVERY)
        workers[1].train(EVERY)
    assert workers[1].model.get_parameter("frozen").tolist() == [7.0, 7.0]
    assert workers[1].model.get_buffer("seen").tolist() == [1.0, 1.0]
    steps = [own["step"].item() for own in workers[1].inner.state.values()]
    assert steps == [EVERY] * len(workers[1].parameters)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "3"])
def test_a_round_has_at_least_one_step(every: Any) -> None:
    """A number of local steps that cannot be is refused by name."""
    with pytest.raises(InvalidOption, match="Invalid every") as refused:
        Worker(diloco, {}, every=every)
    assert refused.value.field == "every"


def test_arguments_that_cannot_be() -> None:
    """A model without trainable parameters, another model's outer optimizer and unknown options are refused at once."""
    model = model_of()
    inner = torch.optim.SGD(model.parameters())
    with pytest.raises(InvalidOption, match="no parameter that requires gradients"):
        farstep.LocalSGD(torch.nn.ReLU(), inner, 2)
    for others, what in ((parameters_of(model_of()), "lacks"), ([*model.parameters()], "has parameters that")):
        with pytest.raises(InvalidOption, match=what):
            farstep.DiLoCo(model, inner, torch.optim.SGD(others), every=2)
    with pytest.raises(TypeError, match=r"LocalSGD.__init__\(\) got an unexpected keyword argument 'quorums'"):
        farstep.LocalSGD(model, inner, 2, quorums=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidOption, match="Invalid worker"):
        farstep.LocalSGD(model, inner, 2, worker="no spaces")


def test_names_of_parameters_are_the_models(shared: RemoteOptions) -> None:
    """The session knows the parameters by their names in the model."""
    worker = Worker(local_sgd, shared)
    with worker.rounds as rounds:
        assert rounds.outer.param_groups[0]["param_names"] == ["p0", "p1", "p2"]
    assert list(itertools.chain(*rounds.state_dict()["parameters"])) == list("p0p1p2")
