"""The control routes: JSON documents, described in OpenAPI at `/openapi.json` and `/docs`."""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from farstep.consistency import from_options, to_options
from farstep.errors import InvalidOption
from farstep.fields import FieldKind
from farstep.header import VERSION
from farstep_service.hosts import Host, Offer, WorkerPage
from farstep_service.memory import available_bytes
from farstep_service.optimizers import METHODS
from farstep_service.registry import Registry
from farstep_service.routes.documents import (
    ConsistencyDocument,
    DocumentRoute,
    EpochQuery,
    GroupsDocument,
    LeaseDocument,
    MemoryDocument,
    NamePath,
    SessionDocument,
    plan_of,
)
from farstep_service.routes.problems import PROBLEM, Problem, over_unix
from farstep_service.settings import Settings

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error; its `code` is stable, and listed in docs/errors.md.",
        "content": {PROBLEM.decode(): {"schema": Problem.model_json_schema()}},
    }
}


class Shard(BaseModel):
    """Where some segments live. An empty URL is this server's own."""

    url: str
    segments: list[int]


class JoinedDocument(BaseModel):
    """What a worker is told when it has joined.

    `initialise`: this worker is asked for the first parameters. `initialised`: they are there. `fields`: the state
    and the kind of each field, which says its shape; the number field `present` says which of them a parameter has.
    `groups`: the options in force.
    """

    name: str
    incarnation: str
    created: bool
    initialised: bool
    initialise: bool
    version: int
    worker: str
    epoch: int
    fields: dict[str, FieldKind]
    eager: bool
    groups: list[dict[str, Any]]
    placement: list[Shard]


class WorkerDocument(BaseModel):
    """Where a worker stands.

    Its epoch, its last committed write, if a push of its waits, if it is live, and the seconds its lease still runs.
    """

    incarnation: str
    epoch: int
    sequence: int
    waiting: bool
    live: bool
    lease_s: float


class RenewedDocument(BaseModel):
    """What a heartbeat is answered with.

    `lapsed`: the lease had run out. `lease_s`: the seconds of the new one. `live`: how many workers are live.
    """

    incarnation: str
    worker: str
    epoch: int
    lapsed: bool
    lease_s: float
    live: int
    version: int
    consistency: dict[str, Any]


class SessionView(BaseModel):
    """A session as it is now.

    `bytes`: the memory it takes. `readers`: how many read parameters, state or a file, how many wait for others, and
    how many were cut off; the bytes that are kept for them, and how many that may be.
    """

    name: str
    incarnation: str
    version: int
    initialised: bool
    optimizer: str
    groups: list[dict[str, Any]]
    consistency: dict[str, Any]
    nonfinite: str
    kernel: str
    policy: dict[str, Any]
    parameters: int
    segments: int
    bytes: dict[str, int]
    readers: dict[str, int]
    workers: dict[str, WorkerDocument]


class Info(BaseModel):
    """What this server is. `available_bytes`: what its device could still give, null where nobody says."""

    farstep: str
    protocol: int
    device: str
    optimizers: list[str]
    sessions: int
    parameter_bytes: int
    available_bytes: int | None
    authentication: bool


def worker_document(host: Host, page: WorkerPage) -> WorkerDocument:
    """Say where a worker of a session stands."""
    return WorkerDocument(
        incarnation=host.incarnation,
        epoch=page.epoch,
        sequence=page.sequence,
        waiting=page.waiting,
        live=page.live,
        lease_s=page.lease_s,
    )


async def view_of(host: Host) -> SessionView:
    """Describe a session."""
    plan, summary = host.plan, await host.summary()
    return SessionView(
        name=host.name,
        incarnation=host.incarnation,
        version=summary.version,
        initialised=summary.initialised,
        optimizer=plan.rule.name,
        groups=summary.groups,
        consistency=to_options(plan.consistency),
        nonfinite=plan.nonfinite,
        kernel=plan.kernel,
        policy=plan.policy.to_options(),
        parameters=sum(math.prod(each.shape) for each in plan.layout.segments),
        segments=len(plan.layout.segments),
        bytes=summary.bytes,
        readers=asdict(summary.readers),
        workers={name: worker_document(host, page) for name, page in summary.workers.items()},
    )


def control_router(registry: Registry, settings: Settings) -> APIRouter:
    """Return the control routes of a server."""
    router = APIRouter(route_class=DocumentRoute, responses=PROBLEMS)

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """Say that the server answers. The one route that never asks for a token."""
        return {"status": "ok"}

    @router.get("/v1/info", tags=["server"])
    async def info() -> Info:
        """Say what this server is and what it can do."""
        return Info(
            farstep=version("farstep"),
            protocol=VERSION,
            device=settings.device,
            optimizers=sorted(METHODS),
            sessions=len(registry),
            parameter_bytes=registry.parameter_bytes,
            available_bytes=available_bytes(settings.device),
            authentication=bool(settings.tokens),
        )

    @router.post("/v1/sessions", tags=["sessions"])
    async def create_or_join(document: SessionDocument, request: Request) -> JoinedDocument:
        """Create a session, or join the one of that name. Other options are refused, naming the difference."""
        plan = await asyncio.to_thread(plan_of, document)  # there may be 100,000 parameters in it
        if await request.is_disconnected():  # a session that nobody heard of would stay for ever
            raise ClientDisconnect
        host, created = await registry.create_or_join(plan, options=document.options is None)
        joined = await host.join(document.worker, len(plan.groups))
        return JoinedDocument(
            name=host.name,
            incarnation=host.incarnation,
            created=created,
            initialised=joined.initialised,
            initialise=joined.initialise,
            version=joined.version,
            worker=document.worker,
            epoch=joined.epoch,
            fields=plan.rule.kinds,
            eager=plan.rule.eager,
            groups=[group.to_options() for group in host.options],
            placement=[Shard(url="", segments=[0, len(plan.layout.segments)])],
        )

    @router.get("/v1/sessions", tags=["sessions"])
    async def sessions() -> list[SessionView]:
        """List every session."""
        return [await view_of(host) for host in registry.hosts]

    @router.get("/v1/sessions/{name}", tags=["sessions"])
    async def session(name: NamePath) -> SessionView:
        """Describe one session."""
        return await view_of(registry.get(name))

    @router.delete("/v1/sessions/{name}", tags=["sessions"], status_code=204)
    async def remove(name: NamePath) -> Response:
        """Remove a session with its parameters and state. Whoever waits in it is told."""
        await registry.remove(name)
        return Response(status_code=204)

    @router.get("/v1/sessions/{name}/groups", tags=["sessions"])
    async def groups(name: NamePath) -> dict[str, list[dict[str, Any]]]:
        """Return the options in force of each param group."""
        return {"groups": [group.to_options() for group in registry.get(name).options]}

    @router.patch("/v1/sessions/{name}/groups", tags=["sessions"])
    async def set_groups(name: NamePath, document: GroupsDocument) -> list[dict[str, Any]]:
        """Change options of param groups, effective from the next step on, and return all groups."""
        return await registry.get(name).set_groups({int(group): options for group, options in document.groups.items()})

    @router.put("/v1/sessions/{name}/consistency", tags=["sessions"])
    async def set_consistency(name: NamePath, document: ConsistencyDocument) -> dict[str, Any]:
        """Go on in another consistency mode, and return it. Pushes that wait are offered to it."""
        mode = from_options(document.consistency)
        await registry.get(name).set_consistency(mode)
        return {"consistency": to_options(mode)}

    @router.get("/v1/sessions/{name}/workers/{worker}", tags=["workers"])
    async def worker_page(name: NamePath, worker: NamePath) -> WorkerDocument:
        """Say where a worker stands; epoch 0 is one that has not joined."""
        host = registry.get(name)
        return worker_document(host, await host.worker(worker))

    @router.put("/v1/sessions/{name}/workers/{worker}/lease", tags=["workers"])
    async def renew(name: NamePath, worker: NamePath, document: LeaseDocument) -> RenewedDocument:
        """Renew the lease of a worker that has nothing to push or pull, and say how things are."""
        host = registry.get(name)
        renewed = await host.renew(worker, document.epoch, document.incarnation)
        return RenewedDocument(
            incarnation=host.incarnation,
            worker=worker,
            epoch=document.epoch,
            lapsed=renewed.lapsed,
            lease_s=renewed.lease_s,
            live=renewed.live,
            version=renewed.version,
            consistency=to_options(renewed.consistency),
        )

    @router.put("/v1/sessions/{name}/workers/{worker}/memory", tags=["workers"], status_code=204)
    async def share(name: NamePath, worker: NamePath, document: MemoryDocument, request: Request) -> Response:
        """Map memory of a worker on this machine, which its pushes name from then on; over a unix socket only."""
        if not over_unix(request.scope):
            raise InvalidOption("Memory is shared over a unix socket only.", field="memory")
        host = registry.get(name)
        registry.check_room_to_share(host)
        await host.share(worker, Offer(document.epoch, document.key, document.pid, document.fd))
        return Response(status_code=204)

    @router.delete("/v1/sessions/{name}/workers/{worker}", tags=["workers"], status_code=204)
    async def leave(name: NamePath, worker: NamePath, epoch: EpochQuery) -> Response:
        """Give a worker's place up, if the epoch is its current one."""
        await registry.get(name).leave(worker, epoch)
        return Response(status_code=204)

    return router
