"""Scripts with several optimizers under `farstep launch`: each has a session of its own, the same on every worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import said
from tests.launch.several import SCRIPTS, by_torch
from tests.service.servers import farstep

SCRIPT = str(Path(__file__).with_name("several.py"))
SESSIONS = {
    "gan": ("generator", "discriminator"),
    "actor_critic": ("actor", "critic"),
    "sac": ("actor", "critic0", "critic1", "alpha"),
}


@pytest.mark.parametrize(("count", "named"), [("1", True), ("2", False)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_several_optimizers_train_as_torchs_do(name: str, named: bool, count: str):
    """A GAN, an actor-critic and SAC come to torch's bits, with sessions that are numbered, or named within the run."""
    session = ("--session", "run") if not named else ()
    arguments = [name, "--named"] if named else [name]
    done = farstep("launch", "-n", count, *session, SCRIPT, *arguments)
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
        assert sessions == ["run", *(f"run.{number}" for number in range(2, len(sessions) + 1))]
