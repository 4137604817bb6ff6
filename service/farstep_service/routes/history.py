"""The routes of a session's history: what made each version, back to one, from one, and through some again.

GET   /v1/sessions/{name}/log          the versions that are kept, in pages
GET   /v1/sessions/{name}/replay       some of them again, looked at closely
POST  /v1/sessions/{name}/rollback     the session goes on at an earlier version
POST  /v1/sessions/{name}/fork         another session begins with what this one is, or was
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from farstep_service.keeping.scratch import Replayed
from farstep_service.routes.control import PROBLEMS, page_answer
from farstep_service.routes.documents import Digits, Document, Name, NamePath
from farstep_service.routes.reading import DocumentRoute
from farstep_service.sessions import Actor
from farstep_service.sessions.registry import Registry

LOG_PAGE: Final = 1000
"""The most versions of a page."""
LARGEST_VERSION: Final = 2**53

Version = Annotated[int, Field(ge=0, le=LARGEST_VERSION)]
VersionQuery = Annotated[int, Digits, Query(ge=0, le=LARGEST_VERSION)]
VersionBefore = Annotated[int, Digits, Query(ge=0, le=LARGEST_VERSION)]
LogLimit = Annotated[int, Digits, Query(ge=1, le=LOG_PAGE)]


class RollbackDocument(Document):
    """Say which version a session is to go back to."""

    version: Version


class ForkDocument(Document):
    """Say how another session is called, and at which version it begins; null for the present one."""

    name: Name
    version: Version | None = None


class LineDocument(BaseModel):
    """One version of a session.

    `at`: seconds since 1970. `write`: a step, contents or a group. `norm`: of a step's gradients, where a policy of the
    session says it. `hash`: the chain of the journal, which covers all that happened up to there.
    """

    version: int
    at: float
    write: str
    workers: list[str]
    staleness: int
    norm: float | None
    kernel: str
    hash: str


class GradientDocument(BaseModel):
    """The gradient of a worker: its norm, and its largest element; null for what is not finite."""

    worker: str
    norm: float | None
    largest: float | None
    parameter: str


class ReplayedDocument(BaseModel):
    """One version that happened again.

    `change`: the norm of the change of the parameters. `growth`: the largest norm of a gradient, as a multiple of the
    one before. `jump`: this is the version with the largest growth. Null stands for what is not finite.
    """

    version: int
    at: float
    gradients: list[GradientDocument]
    change: float | None
    growth: float | None
    jump: bool


class LifeDocument(BaseModel):
    """A session that goes on, or begins, at a version."""

    name: str
    incarnation: str
    version: int
    durability: str


def finite(value: Any) -> Any:
    """Return a value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def document_of(replayed: Replayed) -> dict[str, Any]:
    """Return the document of a version that happened again."""
    document: dict[str, Any] = finite(asdict(replayed))
    return document


async def life_of(actor: Actor) -> LifeDocument:
    """Return the document of a session that goes on, or begins."""
    summary = await actor.summary()
    return LifeDocument(
        name=actor.name, incarnation=actor.incarnation, version=summary.version, durability=actor.plan.level
    )


def history_router(registry: Registry) -> APIRouter:
    """Return the routes of the sessions' history."""
    router = APIRouter(route_class=DocumentRoute, responses=PROBLEMS)

    @router.get("/v1/sessions/{name}/log", tags=["history"], response_model=list[LineDocument])
    async def log(name: NamePath, after: VersionBefore | None = None, limit: LogLimit = LOG_PAGE) -> Response:
        """List the versions of a session after one, as far back as its journal goes."""
        first = -1 if after is None else after
        found = await registry.histories.log(registry.find(name), first, limit + 1)
        body = json.dumps([finite(asdict(line)) for line in found[:limit]]).encode()
        more = len(found) > limit
        return page_answer(body, found[limit - 1].version if more else "", limit, more=more)

    @router.get("/v1/sessions/{name}/replay", tags=["history"], response_model=list[ReplayedDocument])
    async def replay(
        name: NamePath,
        first: Annotated[VersionQuery, Query(alias="from")],
        last: Annotated[VersionQuery, Query(alias="to")],
    ) -> Response:
        """Let versions of a session happen again, beside it, and describe the gradients that made them."""
        found = await registry.histories.replayed(registry.find(name), first, last)
        return Response(json.dumps([document_of(each) for each in found]), media_type="application/json")

    @router.post("/v1/sessions/{name}/rollback", tags=["history"])
    async def rollback(name: NamePath, document: RollbackDocument) -> LifeDocument:
        """Let a session go on at an earlier version. Its workers are told that the state was rolled back."""
        return await life_of(await registry.roll_back(name, document.version))

    @router.post("/v1/sessions/{name}/fork", tags=["history"], status_code=201)
    async def fork(name: NamePath, document: ForkDocument) -> LifeDocument:
        """Add a session that begins with what this one is, or was at a version."""
        return await life_of(await registry.fork(name, document.name, document.version))

    return router
