"""Signals that are answered in another way for a while, as the demo and the measurements do."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from farstep_service.machine import answered


def test_a_signal_is_answered_as_before_once_the_block_is_left() -> None:
    """Inside it goes to the action, and after it, even by an error, to who had it before."""
    before, heard = signal.getsignal(signal.SIGUSR1), list[int]()

    def failing() -> None:
        with answered(lambda number, _: heard.append(number), signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert heard == [signal.SIGUSR1, signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_in_another_thread_signals_are_left_alone() -> None:
    """A program that runs this beside its main thread keeps its own answers, and gets no error."""

    def inside() -> object:
        with answered(signal.SIG_IGN, signal.SIGUSR1):
            return signal.getsignal(signal.SIGUSR1)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(inside).result() == signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN
