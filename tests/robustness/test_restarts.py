"""A server that is asked to end, as a deployment does, and the next one on its directory: no worker notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import farstep
from farstep.settings import RemoteOptions
from tests.robustness.twins import CASES, Steps, disturbed, train
from tests.support.service.servers import RunningServer, running_server

LEVELS: dict[str, Any] = {
    "journal": farstep.Journal(sync="os"),
    "snapshot": farstep.Snapshot(every_steps=1000, every_s=3600.0),
}


@pytest.mark.promise("A rolling restart fails no step, at every level but `none`.", area="durability")
@pytest.mark.parametrize("level", LEVELS)
def test_a_rolling_restart_fails_no_step(level: str, tmp_path: Path) -> None:
    """SIGTERM three times within a training: the server exits with 0, and the training has the same bits."""
    remote: RemoteOptions = {"durability": LEVELS[level]}
    codes: list[int] = []

    def ask_to_end(running: RunningServer) -> None:
        codes.append(running.stop())

    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server:
        calm = train(server.url, "calm", CASES["sync Adam"], remote, Steps())
        ended = disturbed(server, "s", CASES["sync Adam"], remote, times=3, seed=5, end=ask_to_end)
    assert codes == [0, 0, 0]
    assert [one.differences(other) for one, other in zip(calm, ended, strict=True)] == [[], []]
