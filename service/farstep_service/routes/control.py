"""The control routes: JSON documents, described in OpenAPI at `/openapi.json` and `/docs`.

No answer blocks the event loop for long, even with large sessions and many of them. Lists are answered in pages, with a
`Link` header (RFC 8288) to the next one; a session shows the first of its workers and param groups, and their numbers.
Work that grows with a session is done in a thread.
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
"""The most sessions of a page."""
MEMBERS_PAGE: Final = 500
"""The most workers or param groups of a page, and in the description of a session."""
LISTED: Final = 50
"""The most workers and param groups of each session in a list."""
INLINE_PARTS: Final = 500
"""The parameters and param groups of a document up to which its plan is built on the event loop."""

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
    """The server of some segments. An empty URL is this server's own."""

    url: str
    segments: list[int]


class JoinedDocument(BaseModel):
    """The answer to a worker that joins.

    `initialise`: this worker is asked to send the first parameters. `initialised`: they have arrived. `fields`: the
    state fields with their kinds, which determine their shapes; the number field `present` tells which of them a
    parameter has. `groups`: the options in force. `durability`: what is kept of the session on disk.
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
    durability: str


class WorkerDocument(BaseModel):
    """Where a worker stands.

    Its epoch, its last committed write, whether a push of it is waiting, whether it is live, and the rest of its lease.
    """

    incarnation: str
    epoch: int
    sequence: int
    waiting: bool
    live: bool
    lease_s: float


class RenewedDocument(BaseModel):
    """The answer to a heartbeat.

    `lapsed`: the lease had run out. `lease_s`: the seconds of the new one. `live`: the number of live workers.
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
    """The present state of a session, with the first of its param groups and workers, and their numbers.

    `archived_version`: that of the newest snapshot in the server's archive. `bytes`: its memory. `readers`: the number
    of readers of parameters, state or files, of those that wait and that were cut off; the bytes that they hold, and
    their limit.
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
    durability: str
    archived_version: int | None
    parameters: int
    segments: int
    bytes: dict[str, int]
    readers: dict[str, int]
    workers: dict[str, WorkerDocument]
    worker_count: int


class Info(BaseModel):
    """The properties of this server. `available_bytes`: the free memory of its device, null if unknown."""

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
    """Return the document of a worker."""
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
        durability=plan.level,
        archived_version=actor.archived_version,
        parameters=plan.layout.elements,
        segments=len(plan.layout.segments),
        bytes=summary.bytes,
        readers=asdict(summary.readers),
        workers={name: worker_document(actor, page) for name, page in summary.workers.items()},
        worker_count=summary.worker_count,
    )


def page_answer(body: bytes, after: object, limit: int, *, more: bool) -> Response:
    """Answer with a page of a list, and a link to the next one if there may be more.

    Args:
        after: the last entry of this page.
        limit: of a page.
    """
    following = urlencode({"after": after, "limit": limit})
    headers = {"link": f'<?{following}>; rel="next"'} if more else None
    return Response(body, media_type="application/json", headers=headers)


def groups_answer(actor: Actor, document: object, last: int, limit: int) -> Response:
    """Answer with options of param groups up to number `last`."""
    return page_answer(json.dumps(document).encode(), last, limit, more=last + 1 < len(actor.plan.groups))


def planned(document: SessionDocument) -> Plan:
    """Return the plan of a document, with its cached sum over all parameters."""
    plan = plan_of(document, document.durability)
    _ = plan.layout.elements
    return plan


def control_router(registry: Registry, settings: Settings) -> APIRouter:
    """Return the control routes of a server."""
    router = APIRouter(route_class=DocumentRoute, responses=PROBLEMS)
    installed = version("farstep")  # read once: it reads a file

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """Report that the server answers. The only route that never needs a token."""
        return {"status": "ok"}

    @router.get("/v1/info", tags=["server"])
    async def info() -> Info:
        """Describe this server."""
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
        settings.check_durability(plan.durability)
        if await request.is_disconnected():  # a session without a worker would stay forever
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
            durability=actor.plan.level,
        )

    @router.get("/v1/sessions", tags=["sessions"], response_model=list[SessionView])
    async def sessions(after: After = "", limit: SessionsLimit = SESSIONS_PAGE) -> Response:
        """List the sessions after a name, in the order of names."""
        views = []
        found = registry.actors_after(after, limit + 1)
        for actor in found[:limit]:
            views.append((await view_of(actor, LISTED)).model_dump_json().encode())
            await asyncio.sleep(0)  # other requests run between two sessions
        more = len(found) > limit
        return page_answer(b"[%b]" % b",".join(views), found[limit - 1].name if more else "", limit, more=more)

    @router.get("/v1/sessions/{name}", tags=["sessions"], response_model=SessionView)
    async def session(name: NamePath) -> Response:
        """Describe one session."""
        view = await view_of(registry.find(name), MEMBERS_PAGE)
        return Response(view.model_dump_json(), media_type="application/json")

    @router.delete("/v1/sessions/{name}", tags=["sessions"], status_code=204)
    async def remove(name: NamePath) -> Response:
        """Remove a session with its parameters and state. Waiting requests get an error."""
        await registry.remove(name)
        return Response(status_code=204)

    @router.get("/v1/sessions/{name}/groups", tags=["sessions"], response_model=dict[str, list[dict[str, Any]]])
    async def groups(name: NamePath, after: GroupBefore = -1, limit: MembersLimit = MEMBERS_PAGE) -> Response:
        """List the options in force of the param groups after a number, in order."""
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
        """Switch to another consistency mode, and return it. Waiting pushes are offered to it."""
        mode = from_options(document.consistency)
        await registry.find(name).set_consistency(mode)
        return {"consistency": to_options(mode)}

    @router.get("/v1/sessions/{name}/workers", tags=["workers"], response_model=dict[str, WorkerDocument])
    async def workers(name: NamePath, after: After = "", limit: MembersLimit = MEMBERS_PAGE) -> Response:
        """List the workers after a name, in the order of names."""
        actor = registry.find(name)
        found = await actor.workers(after, limit)
        body = json.dumps({worker: worker_document(actor, each).model_dump() for worker, each in found.items()})
        return page_answer(body.encode(), next(reversed(found), ""), limit, more=len(found) == limit)

    @router.get("/v1/sessions/{name}/workers/{worker}", tags=["workers"])
    async def worker_page(name: NamePath, worker: NamePath) -> WorkerDocument:
        """Describe a worker; epoch 0 means that it has not joined."""
        actor = registry.find(name)
        return worker_document(actor, await actor.worker(worker))

    @router.put("/v1/sessions/{name}/workers/{worker}/lease", tags=["workers"])
    async def renew(name: NamePath, worker: NamePath, document: LeaseDocument) -> RenewedDocument:
        """Renew the lease of a worker that has nothing to push or pull, and describe the session."""
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
        """Map memory of a worker on this machine for its following pushes; over a unix socket only."""
        if not over_unix(request.scope):
            raise InvalidOption("Memory is shared over a unix socket only.", field="memory")
        actor = registry.find(name)
        registry.check_room_to_share(actor)
        await actor.share(worker, SharedMemoryHandle(document.epoch, document.key, document.pid, document.fd))
        return Response(status_code=204)

    @router.delete("/v1/sessions/{name}/workers/{worker}", tags=["workers"], status_code=204)
    async def leave(name: NamePath, worker: NamePath, epoch: EpochQuery) -> Response:
        """Release a worker's place, if the epoch is its current one."""
        await registry.find(name).leave(worker, epoch)
        return Response(status_code=204)

    return router
