"""The workers of a launch, and their variables."""

import sys

import pytest

from farstep.errors import InvalidOption
from farstep_service.launch import LaunchPlan
from farstep_service.launch.own_server import environment_of
from farstep_service.launch.plan import command_of


def test_the_variables_of_a_worker():
    """Variables of torchrun have its meaning, on the second of two machines, too."""
    plan = LaunchPlan(command=("x",), workers=6, nodes=2, node=1, max_restarts=2)
    variables = plan.environment(5, 1, "http://box:7171", "run", {"PATH": "/bin", "FARSTEP_WORKER": "mine"})
    assert variables == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "FARSTEP_SERVER": "http://box:7171",
        "FARSTEP_SESSION": "run",
        "FARSTEP_RUN": "run",
        "FARSTEP_WORKER": "w11",
        "FARSTEP_RESTART": "1",
        "RANK": "11",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "5",
        "LOCAL_WORLD_SIZE": "6",
        "GROUP_RANK": "1",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "2",
        "TORCHELASTIC_RUN_ID": "run",
    }


def test_what_the_user_has_set_stays():
    """Threads are the user's choice; a worker alone has all of them."""
    alone = LaunchPlan(command=("x",)).environment(0, 0, "u", "s", {})
    assert "OMP_NUM_THREADS" not in alone
    several = LaunchPlan(command=("x",), workers=2).environment(0, 0, "u", "s", {"OMP_NUM_THREADS": "4"})
    assert several["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(("workers", "first"), [(1, "w0"), (10, "w0"), (11, "w00"), (1000, "w000")])
def test_names_sort_as_ranks_do(workers: int, first: str):
    """The order of names, in which a sync step sums gradients, is that of the ranks."""
    plan = LaunchPlan(command=("x",), workers=workers)
    names = [plan.name(local) for local in range(workers)]
    assert names[0] == first
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [({"workers": 0}, "nproc_per_node"), ({"workers": 2000}, "nproc_per_node"), ({"node": 1}, "node_rank")],
)
def test_numbers_that_cannot_be(wrong: dict[str, int], field: str):
    """Too many workers, none, and a machine that is not among those counted are refused by name."""
    with pytest.raises(InvalidOption) as refused:
        LaunchPlan(command=("x",), **wrong)
    assert refused.value.field == field


def test_commands():
    """A script, a module, or a program by itself."""
    assert command_of(__file__, ["-x"]) == (sys.executable, __file__, "-x")
    assert command_of("pkg.train", ["-x"], module=True) == (sys.executable, "-m", "pkg.train", "-x")
    assert command_of("train.sh", ["-x"], python=False) == ("train.sh", "-x")


def test_the_server_of_a_run_is_nobody_elses():
    """The server that a run starts takes neither the address nor the data directory of a server beside it."""
    others = {"FARSTEP_SERVE_PORT": "7171", "FARSTEP_SERVE_DATA_DIR": "/data", "FARSTEP_SERVE_DURABILITY": "journal"}
    assert environment_of({"FARSTEP_SERVE_MAX_GIB": "2", "PATH": "/bin", **others}) == {
        "FARSTEP_SERVE_MAX_GIB": "2",
        "PATH": "/bin",
    }
