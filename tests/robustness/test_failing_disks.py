"""A disk that fails for a while: nothing is left over, the journal keeps its bound, and a session goes on by itself."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from farstep.errors import InvalidOption, NotDurable
from farstep.protocol.durability import Journal
from farstep_service.durability.directory import DataDirectory
from farstep_service.durability.snapshots import PART, STATE
from farstep_service.durability.storage import DiskStorage
from farstep_service.sessions import keeper
from tests.robustness.host import Host, plan_of, push, put

MEBI = 1 << 20


def test_a_start_on_a_full_disk_leaves_a_directory_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first start that fails midway is no foreign directory for the next one."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(json, "dump", full)
        with pytest.raises(InvalidOption, match="No space left"):
            DataDirectory(str(tmp_path), "one")
    DataDirectory(str(tmp_path), "two").close()
    assert json.loads((tmp_path / "farstep.json").read_text()) == {"format": 1}


def test_snapshots_that_fail_leave_nothing_and_keep_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no snapshot can be written, pushes are refused when the journal is full; afterwards all goes on."""
    plan, whole = plan_of(shapes={"p": (1 << 18,)}), DiskStorage.write
    monkeypatch.setattr(keeper, "RETRY_S", 0.0)

    def failing(self: DiskStorage, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        if name.endswith(STATE + PART):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, name, pieces)

    async def live() -> None:
        host = Host(tmp_path, max_journal_bytes=3 * MEBI)
        actor = await host.session(plan)
        await actor.join("w0", 1)
        await put(actor)
        kept, done = actor.keeper, 0
        assert kept is not None
        with monkeypatch.context() as broken:
            broken.setattr(DiskStorage, "write", failing)
            for _ in range(100):
                try:
                    await push(actor, "w0", 2 + done, done, value=0.5)
                    done += 1
                except NotDurable:
                    pass
                await asyncio.gather(*kept._tasks)
            assert done < 100, "nothing was refused"
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in files if ".journal" in path.name) < 100 * MEBI
            assert len([path for path in files if ".safetensors" in path.name]) <= 2
        for _ in range(20):
            try:
                await push(actor, "w0", 2 + done, done, value=0.5)
                done += 1
            except NotDurable:
                await asyncio.gather(*kept._tasks)
        assert done > 10
        assert (await actor.summary()).version == done
        host.die()

    asyncio.run(live())


def test_a_session_is_there_again_without_another_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one sync that failed, readers and workers that join are served again as soon as a snapshot is written."""
    plan, whole, left = plan_of(level=Journal(sync="group")), DiskStorage.sync, [1]

    def failing(self: DiskStorage, name: str) -> None:
        if left[0] and name.endswith(".journal"):
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        whole(self, name)

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await actor.join("w0", 1)
        await put(actor)
        monkeypatch.setattr(DiskStorage, "sync", failing)
        with pytest.raises(NotDurable):
            await push(actor, "w0", 2, 0)
        assert actor.keeper is not None
        await asyncio.gather(*actor.keeper._tasks)
        view = await actor.reads.parameters()
        assert view.version == 1
        view.release()
        await actor.join("w1", 1)
        assert (await push(actor, "w0", 2, 0)).duplicate, "it was taken, and the snapshot has it"
        host.die()

    asyncio.run(live())


def test_a_name_stays_taken_while_its_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that the disk refuses can be asked for again, and no second session takes the name meanwhile."""
    plan = plan_of()

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def live() -> None:
        host = Host(tmp_path)
        await host.session(plan)
        with monkeypatch.context() as broken:
            broken.setattr(DiskStorage, "rename", failing)
            with pytest.raises(NotDurable):
                await host.remove("s")
            with pytest.raises(NotDurable):
                await host.session(plan)
        assert len(list(tmp_path.glob("sessions/*"))) == 1
        await host.remove("s")
        assert not list(tmp_path.glob("sessions/*"))
        host.die()

    asyncio.run(live())
