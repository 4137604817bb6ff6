"""Comparisons in a thread: all of them are made before the end, however often they are stopped."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest

from farstep.tensors import BackgroundCompare, Edited

PATIENCE_S = 20.0


def test_everything_is_compared_once_though_it_is_stopped() -> None:
    """What was stopped goes on where it was, and the end is waited for."""
    compared: list[int] = []
    begun = Event()

    def check(place: int) -> Callable[[], bool]:
        def compare() -> bool:
            compared.append(place)
            begun.set()
            return False

        return compare

    looking = BackgroundCompare(lambda: [check(place) for place in range(1000)])
    looking.start()
    assert begun.wait(PATIENCE_S)
    looking.stop()
    looking.start()
    looking.glance()
    looking.finish()
    looking.stop()
    assert compared == list(range(1000))


def test_what_differs_is_told_at_the_end_and_whenever_it_is_asked_for() -> None:
    """The first difference ends the looking; nothing after it is compared."""
    looking = BackgroundCompare(lambda: [lambda: False, lambda: True, lambda: 1 / 0])
    looking.start()
    for tell in (looking.finish, looking.glance):
        with pytest.raises(Edited):
            tell()
    looking.stop()


def test_an_error_in_the_thread_reaches_who_waits() -> None:
    """What goes wrong in comparing is raised where its end is waited for."""
    looking = BackgroundCompare(lambda: [lambda: 1 / 0])
    looking.start()
    with pytest.raises(ZeroDivisionError):
        looking.finish()
