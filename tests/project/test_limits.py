"""A promise is broken by who sleeps or computes too long, and not by who is not run."""

from __future__ import annotations

import os
import threading

from tests.support.limits import Limit, held_up_s


def test_time_passes() -> None:
    """While nobody is held up, the limit is the time promised."""
    times = iter([10.0, 10.0, 10.75, 11.0, 12.0])
    limit = Limit(1.0, [1, 2], clock=lambda: next(times), held_up=lambda process: 5.0)
    assert [limit.left_s() for _ in range(4)] == [1.0, 0.25, 0.0, 0.0]


def test_time_in_which_the_machine_ran_others_does_not_count() -> None:
    """What each process was held up for since the beginning is added; one that has ended takes nothing away."""
    now, held_up = 10.0, {1: 5.0, 2: 7.0, 3: 100.0}
    limit = Limit(1.0, [1, 2, 3], clock=lambda: now, held_up=lambda process: held_up[process])
    held_up = {1: 5.5, 2: 9.0, 3: 0.0}
    now = 13.0
    assert limit.left_s() == 0.5
    now = 13.5
    assert limit.left_s() == 0.0


def test_who_sleeps_is_not_held_up() -> None:
    """A thread that waits for something is told from one that waits for a processor."""
    over, begun = threading.Event(), threading.Event()

    def sleep() -> None:
        begun.set()
        over.wait(30)

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    begun.wait(30)
    limit = Limit(0.05, [os.getpid()])
    turns = 0
    while limit.left_s():
        over.wait(limit.left_s())
        turns += 1
    assert turns < 1000
    over.set()
    sleeper.join()
    assert held_up_s(os.getpid()) >= 0


def test_a_process_that_is_gone_is_not_held_up() -> None:
    """There is nothing to be read of a process that is not there."""
    assert held_up_s(2**31 - 1) == 0.0
