"""`farstep healthcheck` for machines, `farstep status` for people."""

from __future__ import annotations

from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPSConnection, RemoteDisconnected
from typing import Annotated
from urllib.parse import urlsplit

import typer

from farstep.errors import FarstepError, InvalidOption
from farstep.errors.connecting import cause_of, check_address, without_secrets
from farstep.protocol.unix import check_path, connected, path_of_url
from farstep_service.cli.output import FAILED, JsonOutput, print_json, reporting, size
from farstep_service.cli.remote import Server, Token, document_of, local_server, open_conversation, sessions_of
from farstep_service.cli.sessions import print_sessions

HEALTHY = b'"status":"ok"'
SESSIONS_SHOWN = 15


def healthcheck(
    server: Server,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Longest wait.")] = 4.0,
    json_output: JsonOutput = False,
) -> None:
    """Exit 0 if a server answers, 1 if not: for containers and load balancers."""
    fault = fault_of(server, timeout_s)
    if json_output:
        print_json({"healthy": not fault, "server": without_secrets(server), "detail": fault})
    elif fault:
        typer.echo(f"{without_secrets(server)}: {fault}", err=True)
    if fault:
        raise typer.Exit(FAILED)


def fault_of(server: str, timeout_s: float) -> str:
    """Return what is wrong with a server, "" if nothing is.

    It uses the standard library: it runs every few seconds in a new process, and httpx takes longer to import.
    """
    try:
        check_address(server)
        connection, base = _connection(server, timeout_s)
    except InvalidOption as exc:
        return exc.detail
    except (ValueError, KeyError):
        return f"not the URL of a server; give one such as {local_server()}"
    try:
        connection.request("GET", base + "/healthz")
        answer = connection.getresponse()
        if answer.status != 200:
            return f"answers {answer.status}"
        if answer.getheader("content-encoding", "identity") != "identity":
            return "answers with compression, which the request does not allow"
        return "" if HEALTHY in answer.read(1024).replace(b" ", b"") else "answers, but is not a farstep server"
    except FarstepError as exc:
        return f"no answer: {exc.detail}"
    except (ConnectionResetError, RemoteDisconnected, BadStatusLine):  # a TLS port answers a plain request like this
        return "no answer: it closed the connection, or does not speak HTTP; if it speaks TLS, its URL begins with https://"
    except (OSError, HTTPException, ValueError) as exc:
        cause = None if isinstance(exc, ConnectionError) else cause_of(exc)
        if isinstance(exc, ConnectionError) and exc.strerror:
            return f"no answer: {exc.strerror}"
        return f"no answer: {cause.reason if cause else str(exc) or type(exc).__name__}"
    finally:
        connection.close()


def _connection(server: str, timeout_s: float) -> tuple[HTTPConnection, str]:
    """Return a connection to a server, not yet open, and the prefix of its paths."""
    path = path_of_url(server)
    if path is not None:
        check_path(path, field="server", side="client")
        return _UnixConnection(path, timeout_s), ""
    url = urlsplit(server)
    kind = {"http": HTTPConnection, "https": HTTPSConnection}[url.scheme]
    return kind(url.hostname or "", url.port, timeout=timeout_s), url.path.rstrip("/")


class _UnixConnection(HTTPConnection):
    """A connection to a socket at a path."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = connected(self._path, self.timeout)


def status(server: Server, token: Token = None, json_output: JsonOutput = False) -> None:
    """Show a server and its sessions on one screen."""
    with reporting(json_output), open_conversation(server, token) as conversation:
        info = document_of(conversation, "/v1/info", "farstep")
        sessions = sessions_of(conversation)
    if json_output:
        print_json({"server": info | {"url": server}, "sessions": sessions})
        return
    asks = "asks for a token" if info["authentication"] else "asks for no token"
    typer.echo(f"farstep {info['farstep']} at {server}, on {info['device']}, {asks}")
    typer.echo(f"optimizers: {', '.join(info['optimizers'])}")
    typer.echo(f"sessions: {info['sessions']}, with {size(info['parameter_bytes'])} of parameters")
    print_sessions(sessions[:SESSIONS_SHOWN])
    if len(sessions) > SESSIONS_SHOWN:
        typer.echo(f"and {len(sessions) - SESSIONS_SHOWN} more: farstep sessions ls")
