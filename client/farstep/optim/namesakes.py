"""Optimizers of one process that would share a session by accident: numbered, or named in the error.

A script with two optimizers (a GAN, an actor and its critics) gets one session name, from FARSTEP_SESSION or from
`farstep launch`, which sets it. The optimizers are numbered in the order in which they are made:

    first          NAME
    second         NAME.2
    third          NAME.3

The number counts optimizers made before, not those still alive: so it is the same on all workers, which run one script,
and on a restarted worker, and does not depend on when Python frees an optimizer. A failed construction does not count,
so that a second try gets the same name. Optimizers with workers of their own, `worker="w0"` and `worker="w1"` in two
threads, are counted by worker. Copies have private sessions and are not counted.

A session named in the script is used as it is. A second optimizer under the same name and worker takes the place of the
first, as a restarted worker does; the first gets `Fenced`, and this module adds the cause.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, final

from farstep.errors import Fenced, OptionsDiffer
from farstep.identity import check_name
from farstep.optim.membership import Membership
from farstep.settings import WorkerSettings

MemberKey = tuple[str | None, str, str]
"""Server, session and worker."""

_MADE: Final[Counter[MemberKey]] = Counter()
"""The number of optimizers made under a name from the environment."""
_LATEST: Final[weakref.WeakValueDictionary[MemberKey, Membership]] = weakref.WeakValueDictionary()
"""The latest membership of this process under each key."""
_TURN: Final = threading.Lock()


@contextmanager
def numbered_session(settings: WorkerSettings) -> Iterator[WorkerSettings]:
    """Yield the settings of the optimizer that the block makes: with a numbered session where its name is not its own.

    Raises:
        InvalidOption: the name, with the number, is too long for one.
    """
    if settings.counted_as is None:
        yield settings
        return
    key = (settings.server, settings.session, settings.counted_as)
    with _TURN:
        _MADE[key] += 1
        number = _MADE[key]
    try:
        session = settings.session if number == 1 else f"{settings.session}.{number}"
        check_name(session, "session")
        yield replace(settings, session=session)
    except BaseException:
        with _TURN:
            if _MADE[key] == number:
                _MADE[key] -= 1
        raise


def note_latest_(membership: Membership, settings: WorkerSettings) -> None:
    """Record a membership as the latest under its key."""
    _LATEST[_key(settings)] = membership


@final
class explaining_namesake:  # used like a function, and made at each step: cheaper than a generator
    """Name the other optimizer of this process in the error, where the session refuses this one because of it.

    Args:
        settings: of the optimizer.
        membership: the optimizer's, None while it is being made.

    Raises:
        Fenced, OptionsDiffer: as the session did.
    """

    __slots__ = ("_membership", "_settings")

    def __init__(self, settings: WorkerSettings, membership: Membership | None = None) -> None:
        self._settings = settings
        self._membership = membership

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Fenced | OptionsDiffer):
            return
        settings = self._settings
        other = _LATEST.get(_key(settings))
        if other is None or other is self._membership or not other.close.alive:
            return
        raise type(error)(
            f"Another optimizer of this process is in session {settings.session!r} as worker {settings.worker!r}, too. "
            f"{error.detail}",
            remedy="Give each optimizer a session of its own, session='actor' and session='critic', or none, which "
            "numbers them; or close() the earlier one before the later is made.",
            field="session",
            limit=error.limit,
            side=error.side,
            **error.extra,
        ) from error


def _key(settings: WorkerSettings) -> MemberKey:
    return settings.server, settings.session, settings.worker
