"""Who a worker is: what launchers say, what is refused, and its share of the data."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import farstep
from farstep.errors import InvalidOption
from farstep.identity import NAME
from farstep.settings import RemoteOptions, resolve
from farstep_service.launch import LaunchPlan
from tests.support.client.twins import drawn, parameters

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "12", "TORCHELASTIC_RESTART_COUNT": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "12", "SLURM_RESTART_COUNT": "2"}


# -- what launchers say ----------------------------------------------------------------------------------------------


def test_a_worker_of_farstep_launch_is_who_it_was_told_to_be() -> None:
    """Name, rank, count, restarts, session and server are those that the launcher says."""
    plan = LaunchPlan(command=("x",), workers=6, nodes=2, node=1)
    me = farstep.worker(environment=plan.environment(5, 1, "http://box:7171", "run", {}))
    assert (me.name, me.rank, me.count, me.local_rank, me.restart) == ("w11", 11, 12, 5, 1)
    assert (me.session, me.server) == ("run", "http://box:7171")


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_a_worker_of_another_launcher_has_a_name_by_its_rank(environment: dict[str, str]) -> None:
    """Names sort as ranks do, as those of `farstep launch`, and stay when the process is started again."""
    me = farstep.worker(environment=environment)
    assert (me.name, me.rank, me.count, me.local_rank, me.restart) == ("w05", 5, 12, 1, 2)
    assert (me.session, me.server) == (None, None)
    assert farstep.worker(environment={**environment, "FARSTEP_WORKER": "mine"}).name == "mine"


def test_launchers_inside_slurm_count() -> None:
    """What was started by torchrun within a step of Slurm has torchrun's rank, not that of the step's task."""
    me = farstep.worker(environment={**SRUN, **TORCHRUN, "RANK": "7"})
    assert (me.rank, me.name) == (7, "w07")


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "", "WORLD_SIZE": ""}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}]
)
def test_a_process_that_was_told_nothing_is_the_only_worker(environment: dict[str, str]) -> None:
    """It has a fresh name and all the data; a script of sbatch without srun is such a process."""
    me, other = farstep.worker(environment=environment), farstep.worker(environment=environment)
    assert (me.rank, me.count, me.local_rank, me.restart) == (0, 1, 0, 0)
    assert NAME.fullmatch(me.name)
    assert me.name != other.name
    assert me.share([3, 1, 2]) == [3, 1, 2]


def test_arguments_win_over_the_environment() -> None:
    """A name, and a rank with a count, hide the variables of the same meaning."""
    me = farstep.worker("pod-a", rank=2, count=3, environment=TORCHRUN)
    assert (me.name, me.rank, me.count) == ("pod-a", 2, 3)
    assert farstep.worker(rank=2, count=11, environment={}).name == "w02"


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an environment it is that of the process, as it is at the call."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert farstep.worker().name == "w05"


def test_a_name_without_a_number_has_no_share() -> None:
    """One of several workers that does not know which one would take everything: it says what is missing instead."""
    me = farstep.worker(environment={"FARSTEP_WORKER": "w1"})
    asked: list[Any] = [lambda: me.rank, lambda: me.count, lambda: me.share([1])]
    for ask in asked:
        with pytest.raises(InvalidOption, match=r"'w1' was given a name, but no number.*Set RANK and WORLD_SIZE"):
            ask()
    assert repr(me) == "Worker(name='w1', local_rank=0, restart=0, session=None, server=None)"


@pytest.mark.parametrize(
    ("environment", "field", "said"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK", "RANK is 4, but WORLD_SIZE is 4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK", "WORLD_SIZE is 0"),
        ({"RANK": "1"}, "WORLD_SIZE", "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK", "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK", "Invalid RANK: '-1'"),
        ({"RANK": "1.0", "WORLD_SIZE": "4"}, "RANK", r"Invalid RANK: '1\.0'"),
        ({"RANK": "\u0663", "WORLD_SIZE": "4"}, "RANK", "Invalid RANK"),
        ({"RANK": "0", "WORLD_SIZE": "four"}, "WORLD_SIZE", "Invalid WORLD_SIZE: 'four'"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE", "Invalid WORLD_SIZE"),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS is 8"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK", "Invalid LOCAL_RANK: 'gpu0'"),
        ({"FARSTEP_RESTART": "often"}, "FARSTEP_RESTART", "Invalid FARSTEP_RESTART"),
        ({"FARSTEP_WORKER": "w 1"}, "worker", "Invalid worker: 'w 1'"),
        ({"FARSTEP_WORKER": "a" * 64}, "worker", "at most 63"),
        ({"FARSTEP_WORKER": "../w1"}, "worker", "Invalid worker"),
        ({"FARSTEP_WORKER": "wörker"}, "worker", "Invalid worker"),
        ({"FARSTEP_WORKER": "w1\n"}, "worker", "Invalid worker"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_variable(
    environment: dict[str, str], field: str, said: str
) -> None:
    """The error names the variable to blame, on this side, in a line."""
    with pytest.raises(InvalidOption, match=said) as refused:
        farstep.worker(environment=environment)
    assert (refused.value.field, refused.value.side) == (field, "client")
    assert refused.value.remedy or field == "worker"
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"rank": 1}, "count"),
        ({"count": 2}, "rank"),
        ({"rank": 2, "count": 2}, "rank"),
        ({"rank": -1, "count": 2}, "rank"),
        ({"rank": 0, "count": 2.0}, "count"),
        ({"rank": True, "count": 2}, "rank"),
        ({"name": ""}, "worker"),
        ({"name": 3}, "worker"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(said: dict[str, Any], field: str) -> None:
    """Half of a rank and a count, one outside the other, and what is no number or no name."""
    with pytest.raises(InvalidOption) as refused:
        farstep.worker(**said, environment={})
    assert refused.value.field == field


# -- who it is, it stays ---------------------------------------------------------------------------------------------


def test_a_worker_does_not_change() -> None:
    """It is frozen and equal to its copies, and another name makes another worker, which is checked."""
    me = farstep.worker(environment=TORCHRUN)
    with pytest.raises(FrozenInstanceError):
        me.name = "other"  # type: ignore[misc]
    assert copy.deepcopy(me) == me
    assert replace(me, name="other").rank == me.rank
    with pytest.raises(InvalidOption, match="Invalid worker: 'no name'"):
        replace(me, name="no name")
    assert "name='w05', rank=5, count=12" in repr(me)


def test_an_optimizer_takes_a_worker_where_it_takes_a_name(place: RemoteOptions) -> None:
    """`worker=` is the worker or its name, and the optimizer has it for life, whatever the environment says later."""
    me = farstep.worker("mine", rank=1, count=2)
    there: RemoteOptions = {**place, "worker": me}
    optimizer = farstep.optim.Adagrad(parameters(drawn(0)), **there)
    assert optimizer.worker == "mine"
    with pytest.raises(AttributeError, match="worker"):
        optimizer.worker = "other"  # type: ignore[misc]
    assert resolve({"worker": me}, {"FARSTEP_WORKER": "w7"}).worker == "mine"


@pytest.mark.parametrize("name", [3, b"w0", ["w0"], "w0/../w1", "w 0", "-w0", "a" * 64])
def test_an_optimizer_refuses_what_is_no_name(name: Any) -> None:
    """Nothing that would have to be escaped in a path is a name, nor is what is not text."""
    with pytest.raises(InvalidOption, match="Invalid worker"):
        resolve({"worker": name}, {})


# -- shares ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 40))
def test_shares_are_all_of_it_and_never_twice(size: int, count: int) -> None:
    """For any number of items and workers each item is in one share, and shares differ by one item at most."""
    items = list(range(size))
    shares = [farstep.worker(rank=rank, count=count).share(items) for rank in range(count)]
    assert sorted(each for share in shares for each in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_is_what_was_shared() -> None:
    """Lists, ranges, text and tensors are shared as what they are, a tensor by its rows and without a copy."""
    me = farstep.worker(rank=1, count=2)
    assert me.share(range(5)) == range(1, 5, 2)
    assert list(me.share((1, 2, 3))) == [2]
    assert me.share("abcd") == "bd"
    rows = torch.arange(8.0).reshape(4, 2)
    assert torch.equal(me.share(rows), rows[[1, 3]])
    assert me.share(rows).data_ptr() == rows[1].data_ptr()


class Squares(Dataset[int]):
    """A data set of torch's kind, without slices."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return index**2


@pytest.mark.parametrize(
    "items",
    [Squares(), TensorDataset(torch.arange(7.0)), {1: 2}, iter([1]), torch.tensor(1.0), 5],
    ids=lambda items: type(items).__name__,
)
def test_what_has_no_slices_is_refused_with_what_to_do(items: Any) -> None:
    """A data set that would answer a slice with something else is not shared in silence."""
    with pytest.raises(InvalidOption, match=r"no slices to share.*Subset\(dataset"):
        farstep.worker(rank=1, count=2).share(items)


def test_a_data_set_is_shared_by_its_indices() -> None:
    """What the refusal says works: loaders of all workers together see everything once."""
    dataset, seen = Squares(), []
    for rank in range(3):
        me = farstep.worker(rank=rank, count=3)
        for batch in DataLoader(Subset(dataset, me.share(range(len(dataset)))), batch_size=2):
            seen += batch.tolist()
    assert sorted(seen) == [index**2 for index in range(7)]


def test_rank_and_count_are_what_torchs_sampler_wants() -> None:
    """`DistributedSampler` shuffles anew each epoch and pads; with `drop_last` nobody has what another has."""
    dataset, seen = Squares(), []
    for rank in range(3):
        me = farstep.worker(rank=rank, count=3)
        sampler: DistributedSampler[int] = DistributedSampler(
            dataset, num_replicas=me.count, rank=me.rank, drop_last=True
        )
        sampler.set_epoch(4)
        seen += list(sampler)
    assert len(seen) == len(set(seen)) == 6
