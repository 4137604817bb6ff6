"""A real server: uvicorn with a small application that answers with what it was sent."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.support.transport.scripted import PATIENCE_S


async def echo(request: Request) -> Response:
    """Answer with the body."""
    return Response(await request.body())


async def echo_in_chunks(request: Request) -> Response:
    """Answer with the body in chunks of an odd size, its length untold."""
    body = await request.body()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 99_991):
            yield body[start : start + 99_991]

    return StreamingResponse(chunks())


async def headers(request: Request) -> Response:
    """Answer with the request's headers, a line each."""
    return Response("\n".join(f"{name}: {value}" for name, value in request.headers.items()))


async def digest(request: Request) -> Response:
    """Answer with the body's length and checksum."""
    total, checksum = 0, hashlib.sha256()
    async for chunk in request.stream():
        total += len(chunk)
        checksum.update(chunk)
    return Response(f"{total} {checksum.hexdigest()}")


async def refuse(request: Request) -> Response:
    """Answer 401 without having read the body."""
    return Response("who are you?", status_code=401)


async def nothing(request: Request) -> Response:
    return Response(status_code=204)


application = Starlette(
    routes=[
        Route("/echo", echo, methods=["POST", "PUT"]),
        Route("/prefix/echo", echo, methods=["POST"]),
        Route("/chunks", echo_in_chunks, methods=["POST"]),
        Route("/headers", headers, methods=["GET", "HEAD", "POST"]),
        Route("/digest", digest, methods=["POST"]),
        Route("/refuse", refuse, methods=["POST"]),
        Route("/nothing", nothing, methods=["GET", "POST"]),
    ]
)


@contextlib.contextmanager
def running(certificate: trustme.LeafCert | None = None) -> Iterator[str]:
    """Run the application in a thread and give its URL."""
    config = uvicorn.Config(
        application, http="httptools", ws="none", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
    )
    config.load()
    if certificate is not None:
        import ssl

        config.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(config.ssl)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http{'s' if certificate else ''}://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
