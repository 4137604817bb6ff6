"""Where a session lives, as its worker finds it: on a server, or in this process.

The session's side of the latter is another package, which says so at the entry point `farstep.hosts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import cast

from torch import Tensor

from farstep.errors import FarstepError
from farstep.http_link import HttpLink
from farstep.link import Link, SessionSpec, Start
from farstep.settings import Place


def open_link(spec: SessionSpec, parameters: Sequence[Tensor], place: Place, start: Start | None = None) -> Link:
    """Open the link that `place` asks for: to a server, or embedded in this process.

    Raises:
        FarstepError: the session exists with other options, or the server does not answer in time.
    """
    if place.server is not None:
        return HttpLink(spec, parameters, place, start)
    for entry in entry_points(group="farstep.hosts", name="embedded"):
        return cast(Link, entry.load()(spec, parameters, place, start))
    raise FarstepError(
        "No server is named and the embedded host is not installed.",
        remedy="Give server=..., set FARSTEP_SERVER, or install farstep completely.",
        side="client",
    )
