"""A damaged data directory: the command says what is whole, what is not, and saves what can be saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import farstep
from farstep.protocol.durability import to_document
from tests.support.service.histories import SHAPES, came_back, equal, lines_of, trained
from tests.support.service.raw import RawClient, gradient
from tests.support.service.servers import farstep as run_farstep
from tests.support.service.servers import running_server


def fsck(directory: Path, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """Return what the command found of each session."""
    done = run_farstep("sessions", "fsck", str(directory), "--json", *arguments, loaded=True)
    assert done.returncode == code, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def turn(file: Path, at: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def folders(directory: Path) -> list[Path]:
    """Return the folders of the sessions."""
    return sorted((directory / "sessions").iterdir())


@pytest.mark.promise(
    "`farstep sessions fsck` names what is damaged, says up to which version a session can be saved, and saves it.",
    area="sessions and files",
)
def test_a_journal_damaged_in_the_middle_is_saved_up_to_there(tmp_path: Path) -> None:
    """The session is refused alone; after --save it is at the last version before the damage, as another life."""
    data = tmp_path / "data"
    with running_server("--data-dir", str(data), loaded=True) as server:
        with RawClient(server.url) as raw:
            old, versions = trained(raw, "s", 5)
            broken = lines_of(raw, "s")[4]["hash"]
            trained(raw, "fine", 2)
        server.kill()
        (folder,) = [each for each in folders(data) if b'"name":"s"' in (each / "00000001.json").read_bytes()]
        (journal,) = folder.glob("*.journal")
        at = journal.read_bytes().index(bytes.fromhex(broken))  # in the head of the result of step 4
        turn(journal, at)
        before = journal.read_bytes()
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "fine")
            refused = raw.request("GET", "/v1/sessions/s")
            assert refused.document["code"] == "damaged_journal"
            assert "farstep sessions fsck" in refused.document["remedy"]
        owned = run_farstep("sessions", "fsck", str(data), loaded=True)
        assert owned.returncode == 2
        assert f"process id {server.pid}" in owned.stderr
        server.stop()

        found = {each["name"]: each for each in fsck(data, code=1)}
        assert found["fine"]["whole"]
        assert (found["s"]["version"], found["s"]["lost"], found["s"]["saved"]) == (3, True, "")
        (damage,) = found["s"]["damage"]
        assert damage["file"].endswith(journal.name)
        assert at - 128 <= damage["byte"] <= at
        assert journal.read_bytes() == before  # it only looked

        saved = {each["name"]: each for each in fsck(data, "--save")}
        assert saved["s"]["version"] in (3, 4)  # the push of step 4 holds, and is taken again
        assert (data / saved["s"]["saved"] / journal.name).read_bytes() == before
        assert all(each["whole"] for each in fsck(data))
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            old.raw = raw
            version, parameters = old.pull()
            assert version == saved["s"]["version"]
            assert equal(parameters, versions[version])
            assert old.push(gradient(9, SHAPES), base=5).document["code"] == "rolled_back"
            fresh = raw.join("s", "w0", SHAPES)
            for step in range(version, 5):
                assert fresh.push(gradient(step, SHAPES), base=step).status == 200
            assert equal(fresh.pull()[1], versions[5])
        server.kill()
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            fresh.raw = raw
            assert equal(fresh.pull()[1], versions[5])


def test_a_damaged_snapshot_loses_nothing_if_the_journal_reaches_back(tmp_path: Path) -> None:
    """The newest snapshot is damaged: the one before it and the journal have all; its worker goes on as before."""
    data = tmp_path / "data"
    with running_server("--data-dir", str(data), loaded=True) as server:
        with RawClient(server.url) as raw:
            old, versions = trained(raw, "s", 4)
        server.stop()
        (folder,) = folders(data)
        turn(folder / "00000002.safetensors", 900)
        (found,) = fsck(data, code=1)
        assert (found["version"], found["lost"]) == (4, False)
        assert [Path(each["file"]).name for each in found["damage"]] == ["00000002.safetensors"]
        (saved,) = fsck(data, "--save")
        assert (data / saved["saved"] / "00000002.safetensors").exists()
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            old.raw = raw
            assert equal(old.pull()[1], versions[4])
            assert old.push(gradient(4, SHAPES), base=4).status == 200


def test_a_segment_that_is_none_ends_what_can_be_saved(tmp_path: Path) -> None:
    """The head of a segment is damaged: what is before it can be saved; where the whole journal is, the snapshot."""
    data = tmp_path / "data"
    with running_server("--data-dir", str(data), loaded=True) as server:
        with RawClient(server.url) as raw:
            trained(raw, "s", 3)
        server.restart()  # a snapshot of version 3, and the next segment
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            worker = raw.join("s", "w9", SHAPES)
            assert worker.push(gradient(3, SHAPES), base=3).status == 200
        server.kill()
        (folder,) = folders(data)
        last = sorted(folder.glob("*.journal"))[-1]
        turn(last, 20)
        (found,) = fsck(data, code=1)
        assert (found["version"], found["lost"]) == (3, True)
        assert [(Path(each["file"]).name, each["byte"]) for each in found["damage"]] == [(last.name, 0)]
        (saved,) = fsck(data, "--save")
        assert saved["version"] == 3
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            assert raw.request("GET", "/v1/sessions/s").document["version"] == 3


def test_without_a_snapshot_that_holds_nothing_is_saved(tmp_path: Path) -> None:
    """Both manifests are damaged: the command says so, touches nothing, and fails."""
    data = tmp_path / "data"
    with running_server("--data-dir", str(data), loaded=True) as server:
        with RawClient(server.url) as raw:
            trained(raw, "s", 1)
        server.stop()
    (folder,) = folders(data)
    for manifest in folder.glob("*.json"):
        turn(manifest, 30)
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    (found,) = fsck(data, "--save", code=1)
    assert (found["version"], found["saved"]) == (None, "")
    assert len(found["damage"]) == 2
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before
    said = run_farstep("sessions", "fsck", str(data), loaded=True)
    assert "nothing can be saved" in said.stdout


def test_a_snapshot_level_session_is_saved_at_the_snapshot_before(tmp_path: Path) -> None:
    """The newest snapshot is damaged, and no journal reaches further: what came after the one before is lost."""
    data = tmp_path / "data"
    level = to_document(farstep.Snapshot(every_steps=1000, every_s=3600.0))
    with running_server("--data-dir", str(data), loaded=True) as server:
        with RawClient(server.url) as raw:
            old, versions = trained(raw, "s", 2, durability=level)
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            old.raw = raw
            assert old.push(gradient(2, SHAPES), base=2).status == 200
        server.stop()
        (folder,) = folders(data)
        turn(sorted(folder.glob("*.state"))[-1], 5)
        (found,) = fsck(data, code=1)
        assert (found["version"], found["lost"]) == (2, True)
        fsck(data, "--save")
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            old.raw = raw
            assert equal(old.pull()[1], versions[2])
            assert old.push(gradient(3, SHAPES), base=3).document["code"] == "rolled_back"


def test_what_is_no_data_directory_is_refused(tmp_path: Path) -> None:
    """A directory without sessions of ours is refused, and left as it is."""
    done = run_farstep("sessions", "fsck", str(tmp_path), loaded=True)
    assert done.returncode == 2
    assert "is not a data directory of farstep" in done.stderr
    assert [*tmp_path.iterdir()] == []
    assert run_farstep("sessions", "fsck", str(tmp_path / "nowhere"), loaded=True).returncode == 2
