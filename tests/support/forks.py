"""Doing something in a fork of the process that runs the tests."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

PATIENCE_S = 20


def in_a_fork(act: Callable[[], object]) -> int:
    """Do something in a fork, and return its exit code: 0 if it was done, 1 if it raised, which standard error shows.

    One that hangs is ended by a signal.
    """
    child = os.fork()
    if not child:
        code = 1
        signal.alarm(PATIENCE_S)
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
