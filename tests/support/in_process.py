"""Keep the tests of pure rooms pure: while one runs, nothing starts a process or opens a connection.

`make fast` runs these tests alone. The guard holds in `make test`, too, so that a test that starts a process fails
there and does not slow `make fast` down unseen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOMS = (
    "coordinator",
    "durability",
    "session",
    "store",
    "wire",
)
"""The directories whose tests are pure."""
FILES = (
    "bench/test_expectation.py",
    "bench/test_workload.py",
    "benchmarks/test_rows.py",
    "client/test_gradient_sender.py",
    "client/test_errors.py",
    "client/test_backward_order.py",
    "client/test_streaming_copy.py",
    "client/test_background_compare.py",
    "client/test_retry.py",
    "client/test_payload.py",
    "client/test_sequence.py",
    "client/test_settings.py",
    "client/test_stage.py",
    "demo/test_reports.py",
    "launch/test_restart_policy.py",
    "launch/test_lines.py",
    "launch/test_plan.py",
    "launch/test_progress.py",
    "optimizers/test_complex.py",
    "optimizers/test_hyper.py",
    "optimizers/test_sparse.py",
    "parity/test_comparison.py",
    "promises/test_promises.py",
    "service/test_coroutines.py",
    "transport/test_head.py",
    "transport/test_pieces.py",
)
"""Pure files of other directories."""
LONG = ("coordinator/test_network.py",)
"""Files of pure rooms that take too long for `make fast`."""

STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.spawn"})
CONNECTS = frozenset({"socket.bind", "socket.connect"})


def is_fast(path: Path) -> bool:
    """Return whether the tests of a file belong to `make fast`."""
    try:
        inside = path.relative_to(TESTS)
    except ValueError:
        return False
    name = inside.as_posix()
    return name not in LONG and (inside.parts[0] in ROOMS or name in FILES)


def leads_to_fast(directory: Path) -> bool:
    """Return whether a directory holds files of `make fast`, or directories that do."""
    if not directory.is_relative_to(TESTS):
        return TESTS.is_relative_to(directory)
    first = directory.relative_to(TESTS).parts[:1]
    return not first or first[0] in {*ROOMS, *(name.partition("/")[0] for name in FILES)}


class Guard:
    """Refuse to start processes and to use addresses while armed, and remember what was tried.

    Python calls it for everything that can be audited (`sys.addaudithook`), for the rest of the process's life.

    Attributes:
        tried: what was refused since it was armed.
    """

    def __init__(self) -> None:
        self._armed = False
        self.tried: list[str] = []
        sys.addaudithook(self._audit)

    def arm(self) -> None:
        """Refuse from now on."""
        self.tried, self._armed = [], True

    def disarm(self) -> Sequence[str]:
        """Refuse no more, and return what was tried."""
        self._armed = False
        return self.tried

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        # Other threads may belong to a fixture that tests of other files still use.
        if self._armed and event in STARTS | CONNECTS and threading.current_thread() is threading.main_thread():
            what = f"{event}{arguments!r:.200}"
            self.tried.append(what)
            raise RuntimeError(f"A test of a pure room starts no process and opens no connection: {what}")
