"""Several workers in one session: what they agree on, whatever the order in which they arrive, and what they are told.

Workers are threads with models of their own; the server is a process. Steps are compared with torch.optim.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from torch import Tensor

import farstep
from farstep import Async, Sync
from farstep.conversation import Conversation
from farstep.errors import BarrierTimeout, Fenced, OptionsDiffer, SessionFull, SessionLost
from farstep.optim import Adagrad
from farstep.protocol.consistency import to_options
from farstep.settings import RemoteOptions
from tests.support.client.carrying import Carrying
from tests.support.client.twins import SHAPES, check_equal, check_parameters, check_states, drawn, ours, parameters
from tests.support.client.workers import LR, Reference, Worker, synced, together, waits
from tests.support.service.servers import RunningServer

# -- sync ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "`Sync(workers=N)` is torch on the mean of N gradients, with the same bits whatever the order of arrival.",
    area="consistency modes",
)
@pytest.mark.parametrize("optimizer", ["Adagrad", "ASGD"])
@pytest.mark.parametrize("count", [2, 3])
def test_sync_is_torch_on_the_average_whatever_the_order(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation, count: int, optimizer: str
) -> None:
    """Bit for bit the same as torch on averaged gradients, for every order in which the workers arrive."""
    place = synced(shared, count)
    workers = [Worker(place, f"w{index}", optimizer=optimizer) for index in range(count)]
    reference = Reference(optimizer)
    orders = list(itertools.permutations(range(count)))
    for number, order in enumerate(orders):
        gradients = [drawn(100 * number + index) for index in range(count)]
        together(threads, talk, [(workers[index], gradients[index]) for index in order])
        reference.step(*gradients)
        for worker in workers:
            check_parameters(worker.parameters, reference.parameters)
            report = worker.optimizer.last_step
            assert report is not None
            assert (report.version, report.divisor, report.staleness) == (number + 1, count, 0)
            assert report.contributors == tuple(each.name for each in workers)
    check_states(workers[-1].optimizer.state_dict(), reference.optimizer.state_dict())
    assert "barrier" in (workers[0].optimizer.last_step or pytest.fail("no step")).seconds


RUNS = 8
"""With random names in charge of the order, that many runs are alike once in two thousand times."""


@pytest.mark.promise(
    "`Sync(workers=N)` is torch on the mean of N gradients, with the same bits whatever the order of arrival.",
    area="consistency modes",
)
@pytest.mark.parametrize("given", ["nothing", "a fresh worker"])
def test_workers_without_a_name_make_the_same_bits_in_every_run(
    server: RunningServer, threads: ThreadPoolExecutor, talk: Conversation, given: str
) -> None:
    """The sum of a sync step does not go by names that are another in every run."""
    results = []
    for run in range(RUNS):
        place: RemoteOptions = {"server": server.url, "session": f"unnamed-{given[0]}-{run}", "kernel": "reference"}
        places = [synced(place, 3) for _ in range(3)]
        for own in places if given == "a fresh worker" else []:
            own["worker"] = farstep.worker(environment={})
        models = [parameters(drawn(0)) for _ in range(3)]
        optimizers = [Adagrad(ps, lr=LR, foreach=False, **own) for ps, own in zip(models, places, strict=True)]
        for step in range(2):
            for who, ps in enumerate(models):
                for p, gradient in zip(ps, drawn(10 * step + who), strict=True):
                    p.grad = gradient * (1e8, -1e8, 1.0)[who]
            for push in [threads.submit(optimizer.step) for optimizer in optimizers]:
                push.result()
        results.append([p.detach() for p in models[0]])
        talk.control("DELETE", f"/v1/sessions/{place['session']}")
    for each in results:
        check_equal(each, results[0])


def test_a_gradient_that_one_worker_lacks_counts_as_zero(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """A parameter steps if any worker has a gradient for it; one that nobody has is left alone."""
    place = synced(shared, 2)
    workers = [Worker(place, "w0"), Worker(place, "w1")]
    reference = Reference()
    for number, order in enumerate([(0, 1), (1, 0)]):
        gradients: list[list[Tensor | None]] = [list(drawn(10 * number + 1)), list(drawn(10 * number + 2))]
        gradients[0][0] = gradients[1][1] = gradients[0][4] = gradients[1][4] = None
        together(threads, talk, [(workers[index], gradients[index]) for index in order])
        reference.step(*gradients)
        for worker in workers:
            check_parameters(worker.parameters, reference.parameters)
    check_states(workers[0].optimizer.state_dict(), reference.optimizer.state_dict())


def test_a_third_worker_finds_no_place(shared: RemoteOptions) -> None:
    """A sync session of two is full with two; the error names them, and a place that was left is free."""
    place = synced(shared, 2)
    workers = [Worker(place, "w0"), Worker(place, "w1")]
    with pytest.raises(SessionFull, match="w0, w1"):
        Worker(place, "w2")
    workers[0].optimizer.close()
    Worker(place, "w2")


def test_a_barrier_that_is_not_completed(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """All who wait get the same error, nothing is applied, and the same gradients count once in the next step."""
    place = synced(shared, 3, deadline_s=0.3)
    workers = [Worker(place, f"w{index}") for index in range(3)]
    gradients = [drawn(index + 1) for index in range(3)]
    for _ in range(2):
        pushes = [threads.submit(workers[index].step, gradients[index]) for index in (0, 1)]
        for push in pushes:
            with pytest.raises(BarrierTimeout, match="missing: w2") as late:
                push.result()
            assert late.value.extra["missing"] == ["w2"]
        for worker in workers:
            assert worker.optimizer.version == 0
            assert worker.optimizer.pull() == 0
            check_parameters(worker.parameters, drawn(0))
    reference = Reference()
    for number in range(2):
        pushes = [threads.submit(worker.step, g) for worker, g in zip(workers, gradients, strict=True)]
        for push in pushes:
            push.result()
        reference.step(*gradients)
        for worker in workers:
            assert worker.optimizer.version == number + 1
            check_parameters(worker.parameters, reference.parameters)


def test_the_place_of_a_worker_that_was_missing_can_be_taken(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation
) -> None:
    """After a barrier timed out without a worker another one may join in its place, and finds the newest parameters."""
    place = synced(shared, 2, deadline_s=0.3)
    workers = [Worker(place, "w0"), Worker(place, "w1")]
    pushes = [threads.submit(each.step, drawn(index + 1)) for index, each in enumerate(workers)]
    for push in pushes:
        push.result()
    with pytest.raises(BarrierTimeout):
        workers[0].step(drawn(3))
    newcomer = Worker(place, "w2", seed=7)
    check_parameters(newcomer.parameters, workers[0].parameters)
    pushes = [threads.submit(each.step, drawn(index + 3)) for index, each in enumerate([workers[0], newcomer])]
    for push in pushes:
        push.result()
    with pytest.raises(Fenced):
        workers[1].step(drawn(9))
    check_parameters(newcomer.parameters, workers[0].parameters)


# -- async -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "`Async()` applies each push by itself and says how stale its gradient was.",
    area="consistency modes",
)
def test_async_applies_each_push_by_itself(shared: RemoteOptions) -> None:
    """Every push is a step on what is there, in the order of arrival, and says how stale its gradient was."""
    place: RemoteOptions = {**shared, "consistency": Async()}
    first, second = Worker(place, "w0"), Worker(place, "w1")
    reference = Reference()
    seen = []
    for seed, worker in enumerate([first, first, second, first, second], 1):
        worker.step(drawn(seed))
        reference.step(drawn(seed))
        check_parameters(worker.parameters, reference.parameters)
        report = worker.optimizer.last_step
        assert report is not None
        seen.append((report.version, report.staleness, report.contributors))
    assert seen == [(1, 0, ("w0",)), (2, 0, ("w0",)), (3, 2, ("w1",)), (4, 1, ("w0",)), (5, 1, ("w1",))]
    first.optimizer.pull()
    check_parameters(first.parameters, reference.parameters)
    assert first.optimizer.version == 5


def test_many_workers_at_once(shared: RemoteOptions, threads: ThreadPoolExecutor) -> None:
    """Pushes of four threads at once are all applied: the version counts them, and everybody ends at one model."""
    workers = [Worker(shared, f"w{index}") for index in range(4)]

    def train(worker: Worker, steps: int = 10) -> None:
        for seed in range(steps):
            worker.step(drawn(seed))

    for future in [threads.submit(train, worker) for worker in workers]:
        future.result()
    assert [worker.optimizer.pull() for worker in workers] == [40] * 4
    for worker in workers[1:]:
        check_parameters(worker.parameters, workers[0].parameters)


# -- joining ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "A worker that joins starts from the session's newest parameters; of several that race, one brings the first.",
    area="reads",
)
def test_a_newcomer_starts_from_the_newest_parameters(shared: RemoteOptions) -> None:
    """Whoever joins a session that is there gets its parameters in place of its own."""
    first = Worker(shared, "w0")
    first.step(drawn(1))
    newcomer = Worker(shared, "w1", seed=5)
    assert newcomer.optimizer.version == 1
    check_parameters(newcomer.parameters, first.parameters)
    newcomer.step(drawn(2))
    reference = Reference()
    reference.step(drawn(1))
    reference.step(drawn(2))
    check_parameters(newcomer.parameters, reference.parameters)


@pytest.mark.promise(
    "A worker that joins starts from the session's newest parameters; of several that race, one brings the first.",
    area="reads",
)
def test_workers_that_start_together_agree(shared: RemoteOptions, threads: ThreadPoolExecutor) -> None:
    """Of several that race to create a session one gives it its parameters, and all have those."""
    joining = [threads.submit(Worker, shared, f"w{index}", seed=index) for index in range(6)]
    workers = [future.result() for future in joining]
    for worker in workers[1:]:
        check_parameters(worker.parameters, workers[0].parameters)


@pytest.mark.promise(
    "A worker that joins with other options or parameters is refused, and the first difference is named.",
    area="bad input",
)
def test_other_options_are_refused_naming_the_difference(shared: RemoteOptions) -> None:
    """Optimizer, an option, a mode, a shape or a count that differs: the error says which, and nobody has joined."""
    first = Worker(shared, "w0")
    first_options: dict[str, object] = {"lr": LR, "foreach": False, "worker": "w1", **shared}
    cases: list[tuple[str, str, list[Tensor], dict[str, object]]] = [
        ("its optimizer is Adagrad, not Adamax", "Adamax", drawn(0), {}),
        ("lr of its group 0 was created as 0.1, not 0.2", "Adagrad", drawn(0), {"lr": 0.2}),
        ("its parameter 0 is", "Adagrad", drawn(0, [(5, 7), *SHAPES[1:]]), {}),
        ("float64", "Adagrad", drawn(0, dtype=torch.float64), {}),
        ("6 parameters, not 5", "Adagrad", drawn(0)[:-1], {}),
        ("consistency", "Adagrad", drawn(0), {"consistency": Sync(workers=2)}),
        ("kernel", "Adagrad", drawn(0), {"kernel": "auto"}),
        ("nonfinite", "Adagrad", drawn(0), {"nonfinite": "allow"}),
    ]
    for said, kind, tensors, options in cases:
        with pytest.raises(OptionsDiffer) as refused:
            ours(kind)(parameters(tensors), **{**first_options, **options})
        assert said in str(refused.value)
    first.step(drawn(1))
    assert first.optimizer.version == 1


@pytest.mark.promise(
    "Another process under a worker's name fences the earlier one, which may `rejoin()`.",
    area="client errors",
)
def test_a_worker_that_joins_again_fences_its_older_self(shared: RemoteOptions) -> None:
    """Two processes under one name: the newer one goes on, the older one learns it, changes nothing and may rejoin."""
    older = Worker(shared, "w0")
    older.step(drawn(1))
    newer = Worker(shared, "w0")
    before = [p.detach().clone() for p in older.parameters]
    for _ in range(2):
        with pytest.raises(Fenced, match="w0"):
            older.step(drawn(2))
    check_parameters(older.parameters, before)
    newer.step(drawn(2))
    assert newer.optimizer.version == 2
    assert not older.optimizer.rejoin()
    assert older.optimizer.version == 2
    check_parameters(older.parameters, newer.parameters)
    older.step(drawn(3))
    with pytest.raises(Fenced):
        newer.step(drawn(4))
    newer.optimizer.close()  # of an epoch that is over: takes nothing away from the one that goes on
    older.step(drawn(4))
    assert older.optimizer.version == 4


@pytest.mark.promise(
    "An older version is never shown as the same session: a session that begins anew has another incarnation.",
    area="reads",
)
def test_a_session_that_is_created_anew_is_not_taken_for_the_old_one(shared: RemoteOptions, talk: Conversation) -> None:
    """Another session under the old name is another one: reading it is refused, rejoining it takes its parameters."""
    old = Worker(shared, "w0")
    old.step(drawn(1))
    before = [p.detach().clone() for p in old.parameters]
    talk.control("DELETE", f"/v1/sessions/{old.optimizer.session}")
    new = Worker(shared, "w1", seed=5)
    for call in (old.optimizer.pull, old.optimizer.state_dict, lambda: old.step(drawn(2))):
        with pytest.raises(SessionLost):
            call()
    check_parameters(old.parameters, before)
    assert not old.optimizer.rejoin()
    check_parameters(old.parameters, new.parameters)
    old.step(drawn(2))
    assert old.optimizer.version == 1


def test_options_of_a_worker_that_rejoins_are_its_own(shared: RemoteOptions, talk: Conversation) -> None:
    """After a session was created anew, the options that were changed since the first creation count from its start."""
    worker = Worker(shared, "w0")
    reference = Reference()
    for optimizer in (worker.optimizer, reference.optimizer):
        optimizer.param_groups[0]["lr"] = 0.03
    worker.step(drawn(1))
    reference.step(drawn(1))
    state = worker.optimizer.state_dict()
    talk.control("DELETE", f"/v1/sessions/{worker.optimizer.session}")
    with pytest.raises(SessionLost):
        worker.step(drawn(2))
    assert worker.optimizer.rejoin(state)
    worker.step(drawn(2))
    reference.step(drawn(2))
    check_parameters(worker.parameters, reference.parameters)


# -- pushes of unknown outcome at a barrier --------------------------------------------------------------------------


class Impatient(Carrying):
    """Interrupt the caller when a push has waited a moment, while `armed`."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.armed and request.url.path.endswith("/push"):
            request.extensions["timeout"] = {**request.extensions["timeout"], "read": 0.1}
            try:
                super().handle_request(request)
            except httpx.ReadTimeout:
                raise KeyboardInterrupt from None
        return super().handle_request(request)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("completed", [True, False])
def test_a_step_after_one_that_still_waits_at_the_barrier(
    shared: RemoteOptions, threads: ThreadPoolExecutor, talk: Conversation, same: bool, completed: bool
) -> None:
    """The same gradients join the push that waits; others wait until the barrier has decided about it."""
    transport = Impatient()
    place = synced(shared, 2, deadline_s=30.0 if completed else 1.5)
    first, second = Worker({**place, "transport": transport}, "w0"), Worker(place, "w1")
    reference = Reference()
    transport.armed = True
    with pytest.raises(KeyboardInterrupt):
        first.step(drawn(1))
    transport.armed = False
    waits(talk, first)

    again = threads.submit(first.step, drawn(1 if same else 2))
    if not completed:
        # Nobody comes to the first barrier. The second one gives all the time they need.
        session = f"/v1/sessions/{first.optimizer.session}"
        longer = {"consistency": to_options(Sync(workers=2, deadline_s=30.0))}
        if same:
            with pytest.raises(BarrierTimeout):
                again.result()
            talk.control("PUT", f"{session}/consistency", longer)
            again = threads.submit(first.step, drawn(1))
        else:
            while talk.control("GET", f"{session}/workers/w0")["waiting"]:
                pass
            talk.control("PUT", f"{session}/consistency", longer)
        waits(talk, first)
    second.step(drawn(11))
    reference.step(drawn(1 if same or completed else 2), drawn(11))
    if not same and completed:
        waits(talk, first)
        second.step(drawn(12))
        reference.step(drawn(2), drawn(12))
    again.result()
    for worker in (first, second):
        check_parameters(worker.parameters, reference.parameters)
        assert worker.optimizer.version == (2 if not same and completed else 1)
    report = first.optimizer.last_step
    assert report is not None
    assert report.earlier == (None if same else "applied" if completed else "dropped")


def test_the_embedded_place_has_one_worker() -> None:
    """A sync session of several needs a server, and the error says how to get one."""
    with pytest.raises(ValueError, match=r"needs a server.*farstep serve"):
        Adagrad(parameters(drawn(0)), consistency=Sync(workers=2))
    alone = Adagrad(parameters(drawn(0)), consistency=Sync(workers=1))
    alone.step()
    assert alone.version == 1
