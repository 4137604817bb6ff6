"""`farstep.worker()` in processes of several launchers, and of none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.launch.launching import LIMIT_S, NO_SERVER, said
from tests.support.service.servers import farstep

WHO = """
import json
import farstep

me = farstep.worker()
mine = [me.name, me.rank, me.count, me.local_rank, me.restart, me.session, me.share(list(range(5)))]
print(json.dumps(mine) + "\\n", end="", flush=True)  # at once: torchrun's workers share a pipe
"""


def test_one_script_is_a_worker_of_any_launcher(tmp_path: Path):
    """By farstep launch, torchrun, by hand with variables and alone: each process knows who it is, and its share."""
    script = tmp_path / "train.py"
    script.write_text(WHO)
    launched = farstep("launch", *NO_SERVER, "--session", "run", "-n", "2", str(script))
    assert [json.loads(said(launched.stdout, name)[0]) for name in ("w0", "w1")] == [
        ["w0", 0, 2, 0, 0, "run", [0, 2, 4]],
        ["w1", 1, 2, 1, 0, "run", [1, 3]],
    ]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    assert sorted(json.loads(line) for line in printed(*torchrun)) == [
        ["w0", 0, 2, 0, 0, None, [0, 2, 4]],
        ["w1", 1, 2, 1, 0, None, [1, 3]],
    ]
    by_hand = {"FARSTEP_WORKER": "box-b", "RANK": "1", "WORLD_SIZE": "3", "FARSTEP_SESSION": "digits"}
    assert json.loads(*printed(sys.executable, str(script), **by_hand)) == ["box-b", 1, 3, 0, 0, "digits", [1, 4]]
    _, *alone = json.loads(*printed(sys.executable, str(script)))
    assert alone == [0, 1, 0, 0, None, [0, 1, 2, 3, 4]]


def printed(*command: str, **environment: str) -> list[str]:
    """Return the lines that a program writes to its standard output."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout.splitlines()


def test_a_worker_with_an_invalid_rank_ends_with_a_line_that_names_it():
    """An invalid rank is refused, with the name of its variable, before anything is joined or trained."""
    done = subprocess.run(
        [sys.executable, "-c", "import farstep; farstep.worker()"],
        env={**os.environ, "RANK": "2", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "RANK is 2, but WORLD_SIZE is 2: ranks are numbered from 0." in done.stderr.splitlines()[-1]
