"""Authorisation: tokens, and the names that a server answers to, checked before the first body byte is read.

Two checks surround every route.

Tokens: public routes are an exact list; all others need a token if the server has any. Tokens are kept as SHA-256
digests and compared in constant time.

Hosts: a web page whose own name resolves to this machine ("DNS rebinding") could read and change the sessions of a
server without a token. It cannot change the host name in its requests, so a server answers only to these:

    localhost, 127.0.0.1, [::1] and their like      always
    the address it listens on                       always; on 0.0.0.0 and [::] any address: no name server moves those
    the names of `--allowed-hosts`                  `*.lab` for all below lab, `*` for any
    any name                                        with tokens and without `--allowed-hosts`: a page has no token
    any name                                        over a unix socket, which no page reaches

A page under its own name sends an `Origin`, which must be the requested host, or one of the first three.
`X-Forwarded-Host` and similar headers are ignored: any client can set them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import final

from farstep.errors import HostNotAllowed, InvalidRequest, OriginNotAllowed, Unauthorized
from farstep_service.settings import ANY_HOST, Settings, is_address, is_loopback

PUBLIC = frozenset({("GET", "/healthz"), ("HEAD", "/healthz")})
"""Method and path of the public routes, compared exactly."""


class Tokens:
    """The accepted tokens, as digests."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = tuple(_digest(token.encode()) for token in tokens)

    @property
    def required(self) -> bool:
        """Return whether a token is required at all."""
        return bool(self._digests)

    def check(self, method: str, path: str, authorization: Iterable[bytes]) -> None:
        """Let a request through, or refuse it.

        Args:
            path: the raw path of the request line, as it was received.
            authorization: the values of its `Authorization` headers.

        Raises:
            Unauthorized: no token, more than one header, or a wrong token.
        """
        if not self.required or (method, path) in PUBLIC:
            return
        values = list(authorization)
        scheme, _, credential = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = _digest(credential.strip())
        known = False
        for each in self._digests:  # every digest is compared, so that the time reveals nothing
            known |= hmac.compare_digest(digest, each)
        if scheme.lower() != b"bearer" or not known:
            raise Unauthorized(
                "The request shows no valid token.",
                remedy="Send `Authorization: Bearer ...`: give token=..., or set FARSTEP_TOKEN.",
            )

    def masked(self, text: bytes, authorization: Iterable[bytes]) -> bytes:
        """Return a text with asterisks in place of every accepted token, and of the request's own credential.

        Args:
            text: may repeat what a client sent, such as a path with a token in it.
            authorization: the values of the request's `Authorization` headers.
        """
        for value in authorization:
            credential = value.partition(b" ")[2].strip()
            if len(credential) >= SHORTEST_SECRET:
                text = text.replace(credential, b"*" * len(credential))
        if not self.required:
            return text
        return _WORD.sub(lambda word: b"*" * len(word[0]) if _digest(word[0]) in self._digests else word[0], text)


SHORTEST_SECRET = 8
"""The least bytes of a credential to mask; a shorter one is not a secret, and may be part of any word."""
_WORD = re.compile(rb"[A-Za-z0-9._~+=-]{16,}")  # a token of `farstep_service.settings`, but for slashes


@final
class AllowedHosts:
    """The names that a server answers to.

    Args:
        bound: the address that it listens on, "" for none.
        allowed: further names: `box`, `*.lab`, or `*` for any.
        guarded: it has tokens; then any name is accepted if `allowed` is empty.
    """

    def __init__(self, bound: str = "", allowed: Iterable[str] = (), *, guarded: bool = False) -> None:
        names = frozenset(map(_spelled_once, allowed))
        self._any = ANY_HOST in names
        self._any_host = self._any or (guarded and not names)
        self._below = tuple(name.removeprefix("*") for name in names if name.startswith("*."))
        self._names = names | {_spelled_once(bound)}
        self._any_address = not bound or (is_address(bound) and ipaddress.ip_address(bound).is_unspecified)
        self._known = lru_cache(maxsize=64)(self._decide)  # a worker uses one name, step after step

    @classmethod
    def of(cls, settings: Settings) -> AllowedHosts:
        """Return the names of the server that these settings describe."""
        return cls(settings.host if settings.tcp else "", settings.allowed_hosts, guarded=bool(settings.tokens))

    def check(self, *, version: str, hosts: Sequence[bytes], origins: Sequence[bytes], unix: bool) -> None:
        """Let a request through, or refuse it.

        Args:
            version: of HTTP, as the request states it.
            hosts, origins: the values of its `Host` and `Origin` headers.
            unix: it came over a unix socket.

        Raises:
            InvalidRequest: it has more than one `Host`, none in HTTP/1.1, or an invalid one.
            HostNotAllowed: the name is not this server's.
            OriginNotAllowed: it is from a page of another origin.
        """
        if not hosts and version == "1.0" and not origins:
            return
        if len(hosts) != 1:
            raise InvalidRequest(f"The request has {len(hosts)} Host headers; it must have one.", field="host")
        host = _host_of(hosts[0])
        if host is None:
            raise InvalidRequest("The Host header is not the name of a host, with a port or without.", field="host")
        if not unix and not self._any_host and not self._known(host, by_address=True):
            raise HostNotAllowed(
                f"This server does not answer to the name {host!r}.",
                remedy=f"Use an address that it listens on, or start it with --allowed-hosts {host}.",
                field="host",
            )
        if origins and not self._any:
            scheme, _, authority = origins[0].partition(b"://")
            origin = _host_of(authority) if scheme in (b"http", b"https") and len(origins) == 1 else None
            if origin is None or (origin != host and not self._known(origin, by_address=False)):
                raise OriginNotAllowed(
                    f"Pages of {origin or 'an unknown place'} may not use this server.",
                    remedy=f"If they are yours, start it with --allowed-hosts {origin}." if origin else "",
                    field="origin",
                )

    def _decide(self, host: str, *, by_address: bool) -> bool:
        if host in self._names or is_loopback(host) or host.endswith(self._below):
            return True
        return by_address and self._any_address and is_address(host)


_HOST = re.compile(rb"(?:([A-Za-z0-9._-]{1,253})|\[([0-9A-Fa-f:.]{2,45})(?:%[^\]]{1,20})?\])(?::[0-9]{0,5})?")


@lru_cache(maxsize=256)  # a worker says the same, step after step
def _host_of(authority: bytes) -> str | None:
    """Return the host of `host:port` in lower case, an IPv6 address without brackets; None if invalid."""
    found = _HOST.fullmatch(authority)
    if found is None:
        return None
    name, address = found.groups()
    host = _spelled_once((name or address).decode())
    return host if name or is_address(host) else None


def _spelled_once(host: str) -> str:
    """Return a host in a canonical spelling."""
    host = host.lower().partition("%")[0].removesuffix(".")
    return str(ipaddress.ip_address(host)) if is_address(host) else host


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
