"""A data directory that an earlier server left is recovered by today's code, to the bits that were recorded then."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.support.durability.golden import AFTER, BEFORE, DIRECTORY, OPTIONS, PARAMETERS, WRITTEN, push, state_of
from tests.support.service.histories import came_back
from tests.support.service.raw import RawClient, RawWorker
from tests.support.service.servers import running_server

SAID = json.loads(WRITTEN.read_text())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return the directory, unpacked."""
    with tarfile.open(DIRECTORY) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "data"


@pytest.mark.promise(
    "A data directory of this format is recovered by later releases, with its bits.", area="durability"
)
def test_a_directory_of_format_1_is_recovered(data: Path) -> None:
    """Parameters, momentum and log are those that were recorded; the last push, sent again, gets its first receipt."""
    pushes = BEFORE + AFTER
    with running_server("--data-dir", str(data), loaded=True) as server, RawClient(server.url) as raw:
        came_back(raw, "golden")
        assert state_of(raw) == SAID["state"]
        assert raw.request("GET", "/v1/sessions/golden/log").document == SAID["log"]
        worker = RawWorker(raw, "golden", "w0", SAID["joined"], PARAMETERS, SAID["sequence"])
        repeated = push(worker, pushes - 1, seq=SAID["sequence"])
        assert (repeated["duplicate"], repeated["receipt"]) == (True, SAID["receipt"])
        assert push(worker, pushes)["receipt"]["applied"]  # with the round that waited in the directory
        (twin,) = raw.begun("twin", parameters=PARAMETERS, **OPTIONS)
        for number in range(pushes + 1):
            push(twin, number)
        assert [each.tolist() for each in worker.pull()[1]] == [each.tolist() for each in twin.pull()[1]]


def test_the_older_snapshot_and_the_journal_lead_to_the_same_bits(data: Path) -> None:
    """Without the newer snapshot, the whole journal happens again."""
    (folder,) = (data / "sessions").iterdir()
    for each in folder.glob("00000002.*"):
        if each.suffix != ".journal":
            each.unlink()
    with running_server("--data-dir", str(data), loaded=True) as server, RawClient(server.url) as raw:
        came_back(raw, "golden")
        assert state_of(raw) == SAID["state"]
