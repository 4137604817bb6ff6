"""Why a connection to a server failed, in words: the cause, the remedy, and whether retrying can help.

    heals            refused, timed out, cut off, no route      the server may be starting, or the network be mended
    does not heal    the certificate, TLS or not, the host's name, this process's own descriptors

An unknown host name heals if it led to the server before: a restarted container briefly has no name. Nothing here needs
httpx, so `farstep healthcheck` gives the same explanations.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

from farstep.errors.tree import invalid_option

SERVE: Final = "Check the URL, and that `farstep serve` runs there."
_UNKNOWN_NAME: Final = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_WRONG_HOST: Final = {62, 64}
_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
_SELF_SIGNED: Final = {18, 19, 20, 21}
_NOT_TLS: Final = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
_AUTHORITY: Final = (
    "Name its authority in SSL_CERT_FILE, or give transport=farstep.transport.SocketTransport(verify=context)."
)
_WITHOUT_ROUTE: Final = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a connection failed.

    Attributes:
        reason: what happened, as a part of a sentence.
        remedy: what to do.
        heals: whether trying again may succeed.
    """

    reason: str
    remedy: str
    heals: bool = True


def cause_of(error: BaseException, *, reached: bool = False) -> Cause | None:
    """Return why a connection failed, None if unknown.

    Args:
        error: the error raised; the system's own error is this one or among its causes.
        reached: the server has answered before.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and (each.errno == errno.EMFILE or _without_descriptors()):
            return Cause(
                "this process has too many files and connections open for another one",
                "Raise its limit (`ulimit -n`), or close some.",
                heals=False,
            )
        if isinstance(each, ssl.SSLError):
            return _tls(each)
        if isinstance(each, socket.gaierror):
            return _name(each, reached=reached)
        if isinstance(each, OSError):
            return _system(each)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _without_descriptors() -> bool:
    """Return whether this process has no file descriptor left; a name lookup then fails without saying so."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as exc:
        return exc.errno == errno.EMFILE
    return False


def _tls(error: ssl.SSLError) -> Cause:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate(error)
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return Cause("the connection was cut while TLS began", "Check that the server behind this port speaks TLS.")
    reason = error.reason or ""
    if reason in _NOT_TLS:
        return Cause("what listens there does not speak TLS", "Give the URL as http://.", heals=False)
    return Cause(
        f"TLS did not come about: {reason.lower().replace('_', ' ') or error}",
        "Check the TLS settings of the server, or of what is in front of it.",
        heals=False,
    )


def _certificate(error: ssl.SSLCertVerificationError) -> Cause:
    code, said = error.verify_code, error.verify_message
    if code in _WRONG_HOST:
        return Cause(
            f"its certificate is for another host: {said}",
            "Use a name that the certificate has, or a certificate that has this name.",
            heals=False,
        )
    if code == _EXPIRED:
        return Cause("its certificate has expired", "Renew it, and check this machine's clock.", heals=False)
    if code == _NOT_YET_VALID:
        return Cause("its certificate is not valid yet", "Check the clocks of both machines.", heals=False)
    if code in _SELF_SIGNED:
        return Cause(f"its certificate is of no authority known here ({said})", _AUTHORITY, heals=False)
    return Cause(f"its certificate is refused: {said}", _AUTHORITY, heals=False)


def _name(error: socket.gaierror, *, reached: bool) -> Cause:
    if error.errno in _UNKNOWN_NAME:
        return Cause("the name of its host is not known", "Check the name in the URL, and the DNS.", heals=reached)
    return Cause(f"the name of its host could not be looked up: {error.strerror}", "Check this machine's DNS.")


def _system(error: OSError) -> Cause:
    if error.errno == errno.ENFILE:
        return Cause("this machine has too many files open for another connection", "Close some, or raise fs.file-max.")
    if isinstance(error, ConnectionRefusedError):
        return Cause("nothing accepts connections there", SERVE)
    if isinstance(error, FileNotFoundError):
        return Cause("nothing accepts connections there: no such socket exists", SERVE)
    if isinstance(error, TimeoutError):
        return Cause(
            "it did not accept a connection in time",
            "Check the address and the port, and that no firewall drops what is sent there.",
        )
    if error.errno in _WITHOUT_ROUTE:
        return Cause("no route leads to it", "Check the address, and this machine's network.")
    return Cause(f"the connection failed: {error.strerror or error}", SERVE)


def check_address(url: str, *, field: str = "server") -> None:
    """Refuse a URL that holds credentials, a query or a fragment, and show none of them.

    Raises:
        InvalidOption: it does.
    """
    if url.startswith("unix://"):
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        return  # not a URL; its own check refuses it
    if "@" in parts.netloc:
        raise invalid_option(
            f"Invalid {field}: {without_secrets(url)!r} was given with a user or a password in it.",
            remedy="Give the server's token as token=... or FARSTEP_TOKEN; a URL is shown in messages and logs.",
            field=field,
        )
    if parts.query or parts.fragment:
        raise invalid_option(
            f"Invalid {field}: {without_secrets(url)!r} was given with a query or a fragment.",
            remedy="Give scheme, host, port and, behind a proxy, a path.",
            field=field,
        )


def without_secrets(url: str) -> str:
    """Return a URL for display: without user, password, query and fragment, which may be secrets, and in one line."""
    if url.startswith("unix://"):
        return url
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        shown = SplitResult(parts.scheme, host, parts.path, "", "").geturl()
    except ValueError:
        shown = url.rpartition("@")[2]
    return "".join(each for each in shown if each.isprintable())[:300]
