"""The time of a session goes on where it stopped, whatever the clock of the machine says after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farstep.protocol.consistency import Async, to_options
from farstep.protocol.durability import Journal, to_document
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.sessions.actor import Actor
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings

LEASE_S = 60.0
PLAN = Plan.build(
    name="s",
    optimizer="SGD",
    groups=[{"lr": 0.1}],
    segments=[SegmentSpec("p", (4,), "float32")],
    consistency=to_options(Async(lease_s=LEASE_S)),
    nonfinite="refuse",
    kernel="reference",
    durability=to_document(Journal()),
)


class Server:
    """The sessions of a server in this process, with a clock that is set by hand.

    Attributes:
        now: what its clock says, in seconds; that of a machine counts from its start.
    """

    def __init__(self, directory: Path, now: float, executor: ThreadPoolExecutor) -> None:
        self.now = now
        self._registry = Registry(Settings(data_dir=str(directory)), executor, clock=lambda: self.now)

    async def session(self) -> Actor:
        """Return the session, recovered or new."""
        await self._registry.begin()
        assert self._registry._recovery is not None
        await self._registry._recovery
        return (await self._registry.place(PLAN))[0]

    async def end(self, *, clean: bool) -> None:
        """End in order, or as if the process had died."""
        if clean:
            await self._registry.end()
        else:
            assert self._registry._vault is not None
            self._registry._vault.close()


async def leases(session: Actor) -> Mapping[str, float]:
    """Return how long the lease of each worker still runs."""
    return {name: page.lease_s for name, page in (await session.workers("", 9)).items()}


@pytest.mark.promise(
    "Leases go on where they stopped: neither the time of an outage nor a machine's new clock counts.",
    area="durability",
)
@pytest.mark.parametrize("clean", [False, True], ids=["killed", "stopped"])
def test_a_lease_goes_on_where_it_stopped(clean: bool, tmp_path: Path) -> None:
    """After each of three starts, on clocks that jump either way, every worker has as much of its lease as before."""

    async def body() -> None:
        with ThreadPoolExecutor(1) as executor:
            server = Server(tmp_path, 1000.0, executor)
            session = await server.session()
            await session.join("w0", 1)
            server.now += 20.0
            await session.join("w1", 1)
            for started in (3.0, 90_000.0, 7.0):
                await server.end(clean=clean)
                server = Server(tmp_path, started, executor)
                session = await server.session()
                assert await leases(session) == {"w0": LEASE_S - 20.0, "w1": LEASE_S}

    asyncio.run(body())
