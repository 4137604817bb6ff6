"""Let nothing outlive a launcher, even one that SIGKILL ended.

    run PARENT COMMAND ...   becomes the command; Linux kills it when its parent ends
    watch DIRECTORY          outlives the launcher for a moment: kills the process groups that the launcher started, and
                             removes its directory

The watcher reads `+GROUP` and `-GROUP` from its standard input, line by line. Only the launcher holds the other end, so
end-of-file means that the launcher has ended, whatever the reason. This file runs by its path, and imports the standard
library alone, so that it starts fast.

The launchers are `farstep launch` and `farstep demo`: `children` wraps the command of each process that they start in
`dying_with_parent`, and reports it to the watcher that `watched` yields.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

PR_SET_PDEATHSIG = 1
DIE_WITH_PARENT = (sys.executable, "-I", "-S", os.path.abspath(__file__))


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """Return the command of a process that ends when this one does; unchanged on systems other than Linux.

    The thread that starts it must not end before this process, because Linux watches the thread.
    """
    return [*DIE_WITH_PARENT, "run", str(os.getpid()), *command] if sys.platform == "linux" else [*command]


class Watcher:
    """Report process groups to the watcher, a process that outlives this one for a moment.

    Args:
        pipe: the descriptor of the watcher's standard input.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def started(self, group: int) -> None:
        """Report that a process group has started."""
        self._write("+", group)

    def ended(self, group: int) -> None:
        """Report that a group's leader has ended; another process may soon get its number."""
        self._write("-", group)

    def _write(self, sign: str, group: int) -> None:
        with suppress(OSError):  # the watcher was killed
            os.write(self._pipe, f"{sign}{group}\n".encode())


@contextmanager
def watched(directory: str = "") -> Iterator[Watcher]:
    """Yield the watcher of this process, which removes `directory`, if any, when this process ends."""
    import subprocess

    with subprocess.Popen(
        [*DIE_WITH_PARENT, "watch", directory],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        yield Watcher(process.stdin.fileno())


def run(parent: int, command: list[str]) -> None:
    """Become a command that ends with its parent."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("The launcher has ended.")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"Cannot run {command[0]}: {error.strerror}.", file=sys.stderr)
        sys.exit(127)


def watch(directory: str) -> None:
    """Wait for the launcher's end, kill its process groups and remove its directory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    if directory:
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(int(sys.argv[2]), sys.argv[3:])
    else:
        watch(sys.argv[2])
