"""Signals that are answered in another way for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SignalAction = Callable[[int, FrameType | None], object] | signal.Handlers


@contextmanager
def answered(action: SignalAction, *numbers: signal.Signals) -> Iterator[None]:
    """Answer signals with `action` for a while. Only the main thread can; in another one nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, action) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
