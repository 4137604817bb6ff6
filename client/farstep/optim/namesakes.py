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
from farstep.settings import Place

Seat = tuple[str | None, str, str]
"""Server, session and worker."""

_MADE: Final[Counter[Seat]] = Counter()
"""How many optimizers were made under a name of the environment's."""
_SEATED: Final[weakref.WeakValueDictionary[Seat, Membership]] = weakref.WeakValueDictionary()
"""The latest membership of this process in each seat."""
_TURN: Final = threading.Lock()


@contextmanager
def told_apart(place: Place) -> Iterator[Place]:
    """Yield the place of an optimizer that is made inside the block: with a session of its own where nothing named one.

    Raises:
        InvalidOption: the name, with the number, is too long for one.
    """
    if place.counted_as is None:
        yield place
        return
    seat = (place.server, place.session, place.counted_as)
    with _TURN:
        _MADE[seat] += 1
        number = _MADE[seat]
    try:
        session = place.session if number == 1 else f"{place.session}.{number}"
        check_name(session, "session")
        yield replace(place, session=session)
    except BaseException:
        with _TURN:
            if _MADE[seat] == number:
                _MADE[seat] -= 1
        raise


def take_seat_(membership: Membership, place: Place) -> None:
    """Take note that a membership is the latest in its seat."""
    _SEATED[_seat(place)] = membership


@contextmanager
def told_why(place: Place, membership: Membership | None = None) -> Iterator[None]:
    """Name the optimizer of this process that is the cause, where the session refuses this one because of it.

    Args:
        place: of the optimizer.
        membership: the optimizer's, None while it is being made.

    Raises:
        Fenced, OptionsDiffer: as the session did.
    """
    try:
        yield
    except (Fenced, OptionsDiffer) as error:
        other = _SEATED.get(_seat(place))
        if other is None or other is membership or not other.close.alive:
            raise
        raise type(error)(
            f"Another optimizer of this process is in session {place.session!r} as worker {place.worker!r}, too. "
            f"{error.detail}",
            remedy="Give each optimizer a session of its own, session='actor' and session='critic', or none, which "
            "numbers them; or close() the earlier one before the later is made.",
            field="session",
            limit=error.limit,
            side=error.side,
            **error.extra,
        ) from error


def _seat(place: Place) -> Seat:
    return place.server, place.session, place.worker
