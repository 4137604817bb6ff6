"""Deaths at odd moments of a session: it comes back as it was, or says that it did not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from farstep.errors import NonFinite, StepInterrupted
from farstep.protocol.consistency import Sync
from farstep.protocol.messages import PushHead, Sparse, WriteName
from farstep_service.durability import storage
from farstep_service.keeping.due import MOST_EVENTS
from farstep_service.kernels.kernel import Call, Progress
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.sessions import Actor
from tests.robustness.host import Host, plan_of, push, put

PAIR = Sync(workers=2, deadline_s=600.0, lease_s=3600.0)


async def begun(host: Host, actor: Actor, *workers: str) -> None:
    """Let workers join, the first of which writes the first parameters."""
    for worker in workers:
        await actor.join(worker, 1)
    await put(actor, workers[0])


async def waits(actor: Actor, worker: str) -> None:
    """Return when a push of a worker waits for others."""
    while not (await actor.worker(worker)).waiting:
        await asyncio.sleep(0)


def test_a_step_that_said_nan_comes_back(tmp_path: Path) -> None:
    """A norm that is NaN is the same in a replay, though it equals nothing."""
    plan = plan_of(nonfinite="allow", policy={"clip_norm": 1.0})

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0")
        await push(actor, "w0", 2, 0, value=float("nan"))
        host.die()
        host = Host(tmp_path)
        actor = await host.session(plan)
        assert (await actor.summary()).version == 1
        host.die()

    asyncio.run(live())


def test_a_push_without_gradients_waits_across_a_snapshot_and_a_death(tmp_path: Path) -> None:
    """A push that brings nothing still counts at its barrier when the session is back."""
    plan = plan_of(mode=PAIR)

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0", "w1")
        lost = asyncio.create_task(push(actor, "w0", 2, 0, segments=[]))
        await waits(actor, "w0")
        assert actor.keeper is not None
        await actor.keeper.snapshot()
        lost.cancel()
        host.die()

        host = Host(tmp_path)
        actor = await host.session(plan)
        again = asyncio.create_task(push(actor, "w0", 2, 0, segments=[]))
        await waits(actor, "w0")
        answer = await push(actor, "w1", 1, 0)
        assert answer.receipt.contributors == ("w0", "w1")
        assert (await again).receipt.version == answer.receipt.version == 1
        host.die()

    asyncio.run(live())


def test_options_after_a_restart_do_not_turn_the_clock_back(tmp_path: Path) -> None:
    """The first event of a life, at whatever time it is written down, leaves leases as they were."""
    plan = plan_of(mode=Sync(workers=2, deadline_s=600.0, lease_s=60.0))

    async def live() -> None:
        host = Host(tmp_path, 50_000.0)
        actor = await host.session(plan)
        await begun(host, actor, "w0", "w1")
        host.now += 10.0
        await host.end()
        host = Host(tmp_path, 3.0)
        actor = await host.session(plan)
        await actor.set_groups({0: {"lr": 0.05}})
        host.die()
        host = Host(tmp_path, 90.0)
        actor = await host.session(plan)
        assert {name: page.lease_s for name, page in (await actor.workers("", 9)).items()} == {"w0": 50.0, "w1": 50.0}
        host.die()

    asyncio.run(live())


def test_a_loss_of_power_behind_an_end_in_order_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At journal:os a session that ended in order, went on, and lost its last steps with the power, says so."""
    plan = plan_of()

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.glob("sessions/*/*")}

    async def live() -> None:
        monkeypatch.setattr(storage, "_boot_id", lambda: b"one")
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0")
        await push(actor, "w0", 2, 0)
        await host.end()
        on_disk = files()
        host = Host(tmp_path)
        actor = await host.session(plan)
        before = actor.incarnation
        await push(actor, "w0", 3, 1)
        host.die()
        for path, held in files().items():  # what was not synced is what it was, or zeros
            path.write_bytes(on_disk.get(path, bytes(len(held))))

        monkeypatch.setattr(storage, "_boot_id", lambda: b"two")
        host = Host(tmp_path)
        actor = await host.session(plan)
        assert (await actor.summary()).version == 1
        assert actor.incarnation != before
        host.die()

    asyncio.run(live())


def test_a_step_that_failed_midway_is_finished_after_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies before the interrupted step is finished; its retry gets the step, and so does the one after."""
    plan = plan_of(shapes={"p": (400_000,), "q": (400_000,)})
    whole = ReferenceKernel.execute

    def midway(self: ReferenceKernel, calls: Sequence[Call], progress: Progress) -> None:
        whole(self, calls[:1], progress)
        raise RuntimeError("midway")

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0")
        with monkeypatch.context() as broken:
            broken.setattr(ReferenceKernel, "execute", midway)
            with pytest.raises(StepInterrupted):
                await push(actor, "w0", 2, 0)
        host.die()
        for _ in range(2):
            host = Host(tmp_path)
            actor = await host.session(plan)
            answer = await push(actor, "w0", 2, 0)
            assert (answer.receipt.version, answer.receipt.applied) == (1, True)
            host.die()

    asyncio.run(live())


def test_a_sparse_gradient_waits_while_options_change(tmp_path: Path) -> None:
    """Gradients that were admitted come back, whatever options say by now of such ones."""
    plan = plan_of(optimizer="Adagrad", shapes={"p": (10, 4)}, mode=PAIR)

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0", "w1")
        lost = asyncio.create_task(push(actor, "w0", 2, 0, sparse=(Sparse(0, 1, 2),)))
        await waits(actor, "w0")
        await actor.set_groups({0: {"weight_decay": 0.1}})
        assert actor.keeper is not None
        await actor.keeper.snapshot()
        lost.cancel()
        host.die()
        host = Host(tmp_path)
        actor = await host.session(plan)
        assert (await actor.worker("w0")).waiting
        host.die()

    asyncio.run(live())


def test_what_is_refused_does_not_fill_the_disk(tmp_path: Path) -> None:
    """Pushes that are refused, or never come to their end, take room in the journal, which is bounded."""
    plan = plan_of(shapes={"p": (1 << 18,)})  # 1 MiB a push

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0")
        for _ in range(100):
            with pytest.raises(NonFinite):
                await push(actor, "w0", 2, 0, value=float("nan"))
            head = PushHead(WriteName("w0", 1, 2), actor.incarnation, 0)
            actor.begin_push(head, plan.layout.nbytes)  # and the connection is gone
            await asyncio.sleep(0)
        assert actor.keeper is not None
        assert actor.keeper.journal is not None
        await asyncio.gather(*actor.keeper._tasks)
        assert actor.keeper.place.last > 1, "no snapshot was written"
        assert actor.keeper.journal.nbytes < 200 << 20
        host.die()

    asyncio.run(live())


def test_heartbeats_alone_lead_to_a_snapshot(tmp_path: Path) -> None:
    """Events that are no writes count, so that a restart has a bounded number of them to read."""
    plan = plan_of()

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0")
        for _ in range(MOST_EVENTS + 10):
            await actor.renew("w0", 1, actor.incarnation)
        assert actor.keeper is not None
        await asyncio.gather(*actor.keeper._tasks)
        assert actor.keeper.place.last > 1
        host.die()

    asyncio.run(live())


def test_an_option_beyond_64_bits_is_written_down(tmp_path: Path) -> None:
    """A number of any size that torch takes as an option is there again after a death."""
    plan = plan_of()

    async def live() -> None:
        host = Host(tmp_path)
        actor = await host.session(plan)
        await begun(host, actor, "w0")
        await actor.set_groups({0: {"lr": 10**25}})
        (options,) = actor.options
        host.die()
        host = Host(tmp_path)
        actor = await host.session(plan)
        assert [*actor.options] == [options]
        host.die()

    asyncio.run(live())
