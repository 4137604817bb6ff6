"""Scripts with several optimizers under `farstep launch`: each has a session of its own, the same on every worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launch import several
from tests.support.launch.launching import said
from tests.support.launch.several import SCRIPTS, by_torch
from tests.support.service.servers import RunningServer, farstep, running_server

SCRIPT = str(several.__file__)
SESSIONS = {
    "gan": ("generator", "discriminator"),
    "actor_critic": ("actor", "critic"),
    "sac": ("actor", "critic0", "critic1", "alpha"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run one server for all runs of this file; each has sessions of its own."""
    with running_server(loaded=True) as running:
        yield running


@pytest.mark.parametrize(("count", "named"), [("1", True), ("2", False)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_several_optimizers_train_as_torchs_do(name: str, named: bool, count: str, server: RunningServer):
    """A GAN, an actor-critic and SAC come to torch's bits, with sessions that are numbered, or named within the run."""
    session = [] if named else ["--session", name]
    arguments = [name, "--named"] if named else [name]
    done = farstep("launch", "-n", count, "--server", server.url, *session, SCRIPT, *arguments, loaded=True)
    assert done.returncode == 0, done.stderr
    lines = [said(done.stdout, f"w{rank}") for rank in range(int(count))]
    assert all(line == lines[0] for line in lines)
    found, *sessions = lines[0][0].split()
    assert found == SCRIPTS[name](by_torch)
    run = sessions[0].removesuffix(f".{SESSIONS[name][0]}")
    if named:
        assert sessions == [f"{run}.{each}" for each in SESSIONS[name]]
        assert run.startswith("launch-")
    else:
        assert sessions == [name, *(f"{name}.{number}" for number in range(2, len(sessions) + 1))]


RESTARTED = """
import os, signal
import torch, farstep

made = []
for rate in (1.0, 2.0):
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    made.append((p, farstep.optim.SGD([p], lr=rate)))
print(*(f"{each.session} {each.version} {p[0].item()}" for p, each in made), sep=", ", flush=True)
for _, each in made:
    each.step()
if farstep.worker().restart == 0:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_is_started_again_finds_each_of_its_sessions(tmp_path: Path, server: RunningServer):
    """After a kill each optimizer is in its own session again, with the values and the version that it had there."""
    script = tmp_path / "train.py"
    script.write_text(RESTARTED)
    done = farstep("launch", "--server", server.url, "--session", "run", str(script), loaded=True)
    assert done.returncode == 0, done.stderr
    assert said(done.stdout, "w0") == ["run 0 0.0, run.2 0 0.0", "run 1 -1.0, run.2 1 -2.0"]
