"""A server's settings: one frozen record, filled by the command line or by code."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from farstep.errors import InvalidOption
from farstep.protocol.durability import NONE, Durability, Journal, to_text

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7171
GIB = 2**30
ANY_HOST = "*"
HELD_VERSIONS = 2
Replay = Literal["recorded", "reference"]
MAX_JOURNAL_BYTES = 8 * GIB

_HOST_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one server.

    Attributes:
        host: address to listen on; loopback by default.
        port: TCP port, 0 for any free one.
        tcp: listen on that address and port.
        unix: path of a socket to listen at, which only this process's user may use; "" for none.
        device: torch device of the sessions: `cpu`, `cuda`, `cuda:1`.
        tokens: accepted bearer tokens; without any, none is required.
        allowed_hosts: names that it answers to in addition to its addresses (`routes/auth.py`): `box`, `*.lab`, `*`.
        insecure_no_auth: allow another address than loopback without a token.
        max_sessions: the largest number of sessions.
        max_session_bytes: the largest size of one session's parameters.
        max_bytes: the memory of all sessions and requests together; None for most of what this process may use.
        held_versions: the number of old versions of a session that may be held for pulls, and again for answers to
            pushes; also the number of copies of a session that may be sent at the same time.
        idle_body_s: seconds of silence within a request body after which the connection is closed.
        threads: threads that run kernels; each uses torch's own threads inside one step.
        data_dir: the directory that sessions are kept in; "" for none.
        durability: what is kept of sessions that name no level; None for the default, see `default_durability`.
        max_journal_bytes: the largest journal of one session; a snapshot is taken before it is reached.
        replay: which kernels take the steps of a journal again: those that are `recorded`, or the `reference` one.
        archive: the URL of a store to which snapshots and closed segments are copied; "" for none.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    tcp: bool = True
    unix: str = ""
    device: str = "cpu"
    tokens: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    insecure_no_auth: bool = False
    max_sessions: int = 10_000
    max_session_bytes: int = 64 * GIB
    max_bytes: int | None = None
    held_versions: int = HELD_VERSIONS
    idle_body_s: float = 30.0
    threads: int = 2
    data_dir: str = ""
    durability: Durability | None = None
    max_journal_bytes: int = MAX_JOURNAL_BYTES
    replay: Replay = "recorded"
    archive: str = ""

    def __post_init__(self) -> None:
        for token in self.tokens:
            if len(token) < 16:
                raise InvalidOption(
                    "A token is shorter than 16 characters.",
                    remedy="Make one with `openssl rand -hex 32`.",
                    field="token",
                )
        for name in self.allowed_hosts:
            if name != ANY_HOST and not _HOST_NAME.fullmatch(name.lower()) and not is_address(name):
                raise InvalidOption(
                    f"Invalid allowed_hosts: {name!r:.80} is not the name of a host.",
                    remedy="Give names without scheme and port: box.example, *.example, or * for any.",
                    field="allowed_hosts",
                )
        if not self.tcp and not self.unix:
            raise InvalidOption(
                "There is nothing to listen on: no TCP port and no socket.", remedy="Give --unix PATH.", field="tcp"
            )
        if self.tcp and not self.tokens and not self.insecure_no_auth and not is_loopback(self.host):
            raise InvalidOption(
                f"Refusing to listen on {self.host} without a token: any client could change every session.",
                remedy="Set FARSTEP_TOKEN (or --token-file), listen on 127.0.0.1, or pass --insecure-no-auth.",
                field="host",
            )
        self.check_durability(self.durability)
        if self.archive and not self.data_dir:
            raise InvalidOption(
                "This server has no data directory, so there is nothing to copy to an archive.",
                remedy="Start it with `farstep serve --data-dir DIR --archive URL`.",
                field="archive",
            )

    @property
    def default_durability(self) -> Durability:
        """Return what is kept of sessions that name no level: a journal if there is a data directory, else nothing."""
        if self.durability is not None:
            return self.durability
        return Journal() if self.data_dir else NONE

    def check_durability(self, durability: Durability | None) -> None:
        """Refuse a level that needs a disk on a server without a data directory.

        Raises:
            InvalidOption: it is such a level.
        """
        if durability is not None and durability != NONE and not self.data_dir:
            raise InvalidOption(
                f"This server has no data directory, so it cannot keep a session at the level {to_text(durability)}.",
                remedy="Start it with `farstep serve --data-dir DIR`, or ask for the durability none.",
                field="durability",
            )


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
