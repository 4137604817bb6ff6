"""The control routes: JSON documents, described in OpenAPI at `/openapi.json` and `/docs`.

No answer keeps the event loop for long, however large a session is and however many there are. What lists things
answers with a page of them, and names the next one in a `Link` header (RFC 8288) as long as there is one; a session
shows the first of its workers and param groups, and how many there are. Work that grows with a session is done in a
thread.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from farstep.errors import InvalidOption
from farstep.protocol.consistency import from_options, to_options
from farstep.protocol.fields import FieldKind
from farstep.protocol.header import VERSION
from farstep_service.machine import available_bytes
from farstep_service.optimizers import METHODS
from farstep_service.plan import Plan
from farstep_service.routes.documents import (
    ConsistencyDocument,
    Digits,
    EpochQuery,
    GroupsDocument,
    LeaseDocument,
    MemoryDocument,
    NamePath,
    SessionDocument,
    parts_of,
    plan_of,
)
from farstep_service.routes.problems import PROBLEM, Problem, over_unix
from farstep_service.routes.reading import DocumentRoute
from farstep_service.sessions import Actor, SharedMemoryHandle, WorkerPage
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings

SESSIONS_PAGE: Final = 100
"""Sessions of a page at most."""
MEMBERS_PAGE: Final = 500
"""Workers or param groups of a page at most, and in the description of a session."""
LISTED: Final = 50
"""Workers and param groups that a listing shows of each session at most."""
INLINE_PARTS: Final = 500
"""Parameters and param groups of a document that is made a plan on the event loop."""

After = Annotated[str, Query(max_length=63)]
GroupBefore = Annotated[int, Digits, Query(ge=0)]
SessionsLimit = Annotated[int, Digits, Query(ge=1, le=SESSIONS_PAGE)]
MembersLimit = Annotated[int, Digits, Query(ge=1, le=MEMBERS_PAGE)]

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
    """A session as it is now, with the first of its param groups and workers, and how many there are.

    `bytes`: the memory it takes. `readers`: how many read parameters, state or a file, how many wait for others, and
    how many were cut off; the bytes that are kept for them, and how many that may be.
    """

    name: str
    incarnation: str
    version: int
    initialised: bool
    optimizer: str
    groups: list[dict[str, Any]]
    group_count: int
    consistency: dict[str, Any]
    nonfinite: str
    kernel: str
    policy: dict[str, Any]
    parameters: int
    segments: int
    bytes: dict[str, int]
    readers: dict[str, int]
    workers: dict[str, WorkerDocument]
    worker_count: int


class Info(BaseModel):
    """What this server is. `available_bytes`: what its device could still give, null where nobody says."""

    farstep: str
    protocol: int
    device: str
    optimizers: list[str]
    sessions: int
    parameter_bytes: int
    held_bytes: int
    in_flight_bytes: int
    max_bytes: int
    available_bytes: int | None
    authentication: bool


def worker_document(actor: Actor, page: WorkerPage) -> WorkerDocument:
    """Say where a worker of a session stands."""
    return WorkerDocument(
        incarnation=actor.incarnation,
        epoch=page.epoch,
        sequence=page.sequence,
        waiting=page.waiting,
        live=page.live,
        lease_s=page.lease_s,
    )


async def view_of(actor: Actor, most: int) -> SessionView:
    """Describe a session with the first `most` of its groups and workers."""
    plan, summary = actor.plan, await actor.summary(most)
    return SessionView(
        name=actor.name,
        incarnation=actor.incarnation,
        version=summary.version,
        initialised=summary.initialised,
        optimizer=plan.rule.name,
        groups=summary.groups,
        group_count=summary.group_count,
        consistency=to_options(plan.consistency),
        nonfinite=plan.nonfinite,
        kernel=plan.kernel,
        policy=plan.policies.to_options(),
        parameters=plan.layout.elements,
        segments=len(plan.layout.segments),
        bytes=summary.bytes,
        readers=asdict(summary.readers),
        workers={name: worker_document(actor, page) for name, page in summary.workers.items()},
        worker_count=summary.worker_count,
    )


def page_answer(body: bytes, after: object, limit: int, *, more: bool) -> Response:
    """Answer with a page of a listing, and if there may be more with the way to the next one.

    Args:
        after: what the next page begins after.
        limit: how much it may hold.
    """
    following = urlencode({"after": after, "limit": limit})
    headers = {"link": f'<?{following}>; rel="next"'} if more else None
    return Response(body, media_type="application/json", headers=headers)


def groups_answer(actor: Actor, document: object, last: int, limit: int) -> Response:
    """Answer with options of param groups, the last of which has the number `last`."""
    return page_answer(json.dumps(document).encode(), last, limit, more=last + 1 < len(actor.plan.groups))


def planned(document: SessionDocument) -> Plan:
    """Return the plan of a document, with the sum over all parameters that is asked for later."""
    plan = plan_of(document)
    _ = plan.layout.elements
    return plan


def control_router(registry: Registry, settings: Settings) -> APIRouter:
    """Return the control routes of a server."""
    router = APIRouter(route_class=DocumentRoute, responses=PROBLEMS)
    installed = version("farstep")  # which reads a file

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """Say that the server answers. The one route that never asks for a token."""
        return {"status": "ok"}

    @router.get("/v1/info", tags=["server"])
    async def info() -> Info:
        """Say what this server is and what it can do."""
        return Info(
            farstep=installed,
            protocol=VERSION,
            device=settings.device,
            optimizers=sorted(METHODS),
            sessions=len(registry),
            parameter_bytes=registry.parameter_bytes,
            held_bytes=registry.budget.held_bytes,
            in_flight_bytes=registry.budget.in_flight_bytes,
            max_bytes=registry.budget.limit_bytes,
            available_bytes=available_bytes(settings.device),
            authentication=bool(settings.tokens),
        )

    @router.post("/v1/sessions", tags=["sessions"])
    async def create_or_join(document: SessionDocument, request: Request) -> JoinedDocument:
        """Create a session, or join the one of that name. Other options are refused, naming the difference."""
        few = parts_of(document) <= INLINE_PARTS
        plan = planned(document) if few else await asyncio.to_thread(planned, document)
        if await request.is_disconnected():  # a session that nobody heard of would stay for ever
            raise ClientDisconnect
        actor, created = await registry.place(plan, options=document.options is None)
        joined = await actor.join(document.worker, len(plan.groups), named=document.named)
        return JoinedDocument(
            name=actor.name,
            incarnation=actor.incarnation,
            created=created,
            initialised=joined.initialised,
            initialise=joined.initialise,
            version=joined.version,
            worker=document.worker,
            epoch=joined.epoch,
            fields=plan.rule.kinds,
            eager=plan.rule.has_initial_state,
            groups=[group.to_options() for group in actor.options],
            placement=[Shard(url="", segments=[0, len(plan.layout.segments)])],
        )

    @router.get("/v1/sessions", tags=["sessions"], response_model=list[SessionView])
    async def sessions(after: After = "", limit: SessionsLimit = SESSIONS_PAGE) -> Response:
        """List the sessions whose names come after one, in the order of their names."""
        views = []
        found = registry.actors_after(after, limit + 1)
        for actor in found[:limit]:
            views.append((await view_of(actor, LISTED)).model_dump_json().encode())
            await asyncio.sleep(0)  # others have their turn between two sessions
        more = len(found) > limit
        return page_answer(b"[%b]" % b",".join(views), found[limit - 1].name if more else "", limit, more=more)

    @router.get("/v1/sessions/{name}", tags=["sessions"], response_model=SessionView)
    async def session(name: NamePath) -> Response:
        """Describe one session."""
        view = await view_of(registry.find(name), MEMBERS_PAGE)
        return Response(view.model_dump_json(), media_type="application/json")

    @router.delete("/v1/sessions/{name}", tags=["sessions"], status_code=204)
    async def remove(name: NamePath) -> Response:
        """Remove a session with its parameters and state. Whoever waits in it is told."""
        await registry.remove(name)
        return Response(status_code=204)

    @router.get("/v1/sessions/{name}/groups", tags=["sessions"], response_model=dict[str, list[dict[str, Any]]])
    async def groups(name: NamePath, after: GroupBefore = -1, limit: MembersLimit = MEMBERS_PAGE) -> Response:
        """List the options in force of the param groups that follow one, in the order of their numbers."""
        actor = registry.find(name)
        found = await actor.groups(after + 1, limit)
        return groups_answer(actor, {"groups": found}, after + len(found), limit)

    @router.patch("/v1/sessions/{name}/groups", tags=["sessions"], response_model=list[dict[str, Any]])
    async def set_groups(name: NamePath, document: GroupsDocument) -> Response:
        """Change options of param groups, effective from the next step on, and list the first groups."""
        actor = registry.find(name)
        await actor.set_groups({int(group): options for group, options in document.groups.items()})
        found = await actor.groups(0, MEMBERS_PAGE)
        return groups_answer(actor, found, len(found) - 1, MEMBERS_PAGE)

    @router.put("/v1/sessions/{name}/consistency", tags=["sessions"])
    async def set_consistency(name: NamePath, document: ConsistencyDocument) -> dict[str, Any]:
        """Go on in another consistency mode, and return it. Pushes that wait are offered to it."""
        mode = from_options(document.consistency)
        await registry.find(name).set_consistency(mode)
        return {"consistency": to_options(mode)}

    @router.get("/v1/sessions/{name}/workers", tags=["workers"], response_model=dict[str, WorkerDocument])
    async def workers(name: NamePath, after: After = "", limit: MembersLimit = MEMBERS_PAGE) -> Response:
        """List where the workers stand whose names come after one, in the order of their names."""
        actor = registry.find(name)
        found = await actor.workers(after, limit)
        body = json.dumps({worker: worker_document(actor, each).model_dump() for worker, each in found.items()})
        return page_answer(body.encode(), next(reversed(found), ""), limit, more=len(found) == limit)

    @router.get("/v1/sessions/{name}/workers/{worker}", tags=["workers"])
    async def worker_page(name: NamePath, worker: NamePath) -> WorkerDocument:
        """Say where a worker stands; epoch 0 is one that has not joined."""
        actor = registry.find(name)
        return worker_document(actor, await actor.worker(worker))

    @router.put("/v1/sessions/{name}/workers/{worker}/lease", tags=["workers"])
    async def renew(name: NamePath, worker: NamePath, document: LeaseDocument) -> RenewedDocument:
        """Renew the lease of a worker that has nothing to push or pull, and say how things are."""
        actor = registry.find(name)
        renewed = await actor.renew(worker, document.epoch, document.incarnation)
        return RenewedDocument(
            incarnation=actor.incarnation,
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
        actor = registry.find(name)
        registry.check_room_to_share(actor)
        await actor.share(worker, SharedMemoryHandle(document.epoch, document.key, document.pid, document.fd))
        return Response(status_code=204)

    @router.delete("/v1/sessions/{name}/workers/{worker}", tags=["workers"], status_code=204)
    async def leave(name: NamePath, worker: NamePath, epoch: EpochQuery) -> Response:
        """Give a worker's place up, if the epoch is its current one."""
        await registry.find(name).leave(worker, epoch)
        return Response(status_code=204)

    return router
