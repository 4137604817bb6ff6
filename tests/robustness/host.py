"""A server's sessions in this process, without HTTP: begun on a directory, killed or ended, and begun there again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from farstep.protocol.consistency import Async, Consistency, to_options
from farstep.protocol.durability import Durability, Journal, to_document
from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.sessions import Actor, Answer
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings

ALONE = Async(lease_s=60.0)


def plan_of(
    *,
    optimizer: str = "SGD",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    mode: Consistency = ALONE,
    level: Durability | None = None,
    nonfinite: str = "refuse",
    policy: Mapping[str, Any] | None = None,
) -> Plan:
    """Return the plan of a small session whose steps the reference kernel takes."""
    return Plan.build(
        name="s",
        optimizer=optimizer,
        groups=[{"lr": 0.1}],
        segments=[SegmentSpec(name, shape, "float32", 0) for name, shape in (shapes or {"p": (4,)}).items()],
        consistency=to_options(mode),
        nonfinite=nonfinite,
        kernel="reference",
        durability=to_document(level or Journal()),
        policy=policy,
    )


class Host:
    """One life of a server.

    Args:
        directory: its data directory.
        now: what its clock says; the test moves it.
        settings: further ones of the server.

    Attributes:
        now: as above.
    """

    def __init__(self, directory: Path, now: float = 1000.0, **settings: Any) -> None:
        self.now = now
        self._threads = ThreadPoolExecutor(2)
        self._registry = Registry(Settings(data_dir=str(directory), **settings), self._threads, clock=lambda: self.now)

    async def session(self, plan: Plan) -> Actor:
        """Return the session of a plan: the one that is there, or a new one."""
        if self._registry._recovery is None:
            await self._registry.begin()
            assert self._registry._recovery is not None
        await self._registry._recovery
        actor, _ = await self._registry.place(plan)
        return actor

    async def remove(self, name: str) -> None:
        """Remove a session."""
        await self._registry.remove(name)

    async def end(self) -> None:
        """End in order."""
        await self._registry.end()
        self._threads.shutdown()

    def die(self) -> None:
        """End as by SIGKILL: only what is in the files is left."""
        assert self._registry._vault is not None
        self._registry._vault.close()
        self._threads.shutdown()


async def put(actor: Actor, worker: str = "w0") -> None:
    """Write the first parameters, zeros, as the first write of a worker."""
    head = PutHead(WriteName(worker, 1, 1), actor.incarnation, ("param",), initial=True)
    intake = actor.begin_put(head, actor.plan.layout.nbytes)
    _fill(intake.views, 0.0)
    await actor.put(head, intake, "first")


async def push(actor: Actor, worker: str, sequence: int, base: int, *, value: float = 1.0, **named: Any) -> Answer:
    """Push gradients that are the same everywhere; the indices of sparse ones are zeros."""
    head = PushHead(WriteName(worker, 1, sequence), actor.incarnation, base, **named)
    intake = actor.begin_push(head, actor._session.contribution(head).nbytes)
    if head.sparse:
        for view in intake.views:
            view[:] = bytes(len(view))
    else:
        _fill(intake.views, value)
    return await actor.push(head, intake, f"{worker} {sequence} {value}")


def _fill(views: Sequence[memoryview], value: float) -> None:
    for view in views:
        view[:] = tensor_memory(torch.full((len(view) // 4,), value))
