"""Optimizers of one process that would have the same session: told apart, or told of each other.

A script with two optimizers (a GAN, an actor and its critics) is given one name, by FARSTEP_SESSION or by `farstep
launch`, which sets it. They are told apart by the order in which they are made:

    first          NAME
    second         NAME.2
    third          NAME.3

The number says how many were made before, not how many there still are: it is the same on all workers, which run one
script, and for a worker that was started again, and does not depend on when Python frees an optimizer. One whose
making failed has not been made, so that a second try gets its name. Optimizers that are given workers of their own,
`worker="w0"` and `worker="w1"` in two threads, are counted by worker. Copies are in private sessions and not counted.

Who names a session has said which one it is. A second optimizer under the same name, for the same worker, takes the
place of the first, as a worker that was started again does; the first gets `Fenced`, and this module adds the cause.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from farstep.errors import Fenced, OptionsDiffer
from farstep.identity import check_name
from farstep.optim.membership import Membership
from farstep.settings import WorkerSettings

MemberKey = tuple[str | None, str, str]
"""Server, session and worker."""

_MADE: Final[Counter[MemberKey]] = Counter()
"""How many optimizers were made under a name of the environment's."""
_LATEST: Final[weakref.WeakValueDictionary[MemberKey, Membership]] = weakref.WeakValueDictionary()
"""The latest membership of this process in each seat."""
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
    """Take note that a membership is the latest in its seat."""
    _LATEST[_key(settings)] = membership


@contextmanager
def explaining_namesake(settings: WorkerSettings, membership: Membership | None = None) -> Iterator[None]:
    """Name the optimizer of this process that is the cause, where the session refuses this one because of it.

    Args:
        settings: of the optimizer.
        membership: the optimizer's, None while it is being made.

    Raises:
        Fenced, OptionsDiffer: as the session did.
    """
    try:
        yield
    except (Fenced, OptionsDiffer) as error:
        other = _LATEST.get(_key(settings))
        if other is None or other is membership or not other.close.alive:
            raise
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
