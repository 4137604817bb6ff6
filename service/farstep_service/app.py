"""The composition of a server: sessions, routes, and the edge around them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from farstep_service.routes import (
    Edge,
    control_router,
    data_routes,
    error_of,
    history_router,
    page_of,
    session_file_routes,
)
from farstep_service.routes.auth import AllowedHosts, Tokens
from farstep_service.routes.problems import PROBLEM, problem_of
from farstep_service.sessions.coroutines import in_task
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings

DESCRIPTION = """An optimizer as a service.

The control routes below speak JSON. Gradients, parameters and optimizer state move as msgpack streams on
`POST /v1/sessions/{name}/push`, `GET|PUT /v1/sessions/{name}/contents` and `POST /v1/sessions/{name}/groups`,
described in `farstep/protocol/PROTOCOL.md`; `GET|PUT /v1/sessions/{name}/file` moves a whole session as a safetensors
file, described in `docs/sessions.md`.
Every error is an `application/problem+json` document with a stable `code`."""


@final
class Service:
    """The ASGI application of one server, and its actions before the server stops.

    Args:
        app: answers requests.
        registry: its sessions.
    """

    def __init__(self, app: ASGIApp, registry: Registry) -> None:
        self.app = app
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    async def interrupt(self) -> None:
        """Answer every push that waits for others, so that the server can stop."""
        await asyncio.gather(*(actor.interrupt() for actor in self._registry.actors), return_exceptions=True)


def create_app(settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> Service:
    """Return the ASGI application of one server.

    Args:
        settings: limits, tokens and device.
        clock: monotonic seconds, for the leases and deadlines of its sessions.
    """
    executor = ThreadPoolExecutor(max_workers=settings.threads, thread_name_prefix="farstep-step")
    registry = Registry(settings, executor, clock=clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await registry.begin()
        yield
        await registry.end()
        executor.shutdown(wait=True)

    app = Application(
        title="farstep",
        version=version("farstep"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # FastAPI would build it on the event loop
        docs_url=None,  # the framework's pages load scripts from other sites
        redoc_url=None,
    )
    app.include_router(control_router(registry, settings))
    app.include_router(history_router(registry))
    data = [*data_routes(registry, settings), *session_file_routes(registry, settings)]
    app.router.routes.extend(data)

    description = Description(app)

    async def openapi(_: Request) -> Response:
        return Response((await description.made())[0], media_type="application/json")

    async def docs(_: Request) -> Response:
        return (await description.made())[1]

    app.add_route("/openapi.json", openapi, include_in_schema=False)
    app.add_route("/docs", docs, include_in_schema=False)

    async def problem(_: Request, exc: Exception) -> Response:
        error = error_of(exc)
        return ProblemResponse(problem_of(error), error.status, getattr(exc, "headers", None))

    app.add_exception_handler(HTTPException, problem)
    app.add_exception_handler(RequestValidationError, problem)
    return Service(Edge(FastLane(app, data), Tokens(settings.tokens), AllowedHosts.of(settings)), registry)


@final
class Description:
    """The answers of `/openapi.json` and `/docs`: built in a thread on the first request, and cached.

    Args:
        app: the described application.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._turn = asyncio.Lock()
        self._made: tuple[bytes, Response] | None = None

    async def made(self) -> tuple[bytes, Response]:
        """Return the description as JSON, and as a page."""
        async with self._turn:
            if self._made is None:
                self._made = await asyncio.to_thread(self._make)
            return self._made

    def _make(self) -> tuple[bytes, Response]:
        described = self._app.openapi()
        return json.dumps(described).encode(), page_of(described)


class FastLane:
    """Route pushes and pulls directly to their endpoints: a framework's layers would cost more than a small step.

    Args:
        app: answers everything else, and wrong methods on these paths; it has these routes, too.
        routes: the data routes.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self.app = app
        self._lanes = [(route.path_regex, frozenset(route.methods or ()), route.app) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("root_path"):
            for path, methods, endpoint in self._lanes:
                if scope["method"] in methods and (match := path.match(scope["path"])):
                    scope["path_params"] = match.groupdict()
                    await endpoint(scope, receive, send)
                    return
            await in_task()  # needed by everything based on anyio
        await self.app(scope, receive, send)


class Application(FastAPI):
    """FastAPI without its outermost layer, which would answer 500 to farstep's errors before the edge sees them."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return the stack inside `ServerErrorMiddleware`."""
        stack = super().build_middleware_stack()
        return stack.app if isinstance(stack, ServerErrorMiddleware) else stack


class ProblemResponse(Response):
    """An error found by the framework, as a problem document."""

    media_type = PROBLEM.decode()

    def __init__(self, problem: bytes, status: int, headers: Mapping[str, str] | None) -> None:
        super().__init__(problem, status_code=status, headers=headers)
