"""Nothing outlives a launcher, even one that was ended by SIGKILL.

    run PARENT COMMAND ...   becomes the command; Linux ends it when its parent ends
    watch DIRECTORY          outlives the launcher for a moment: ends the groups of processes that it had started, with
                             all that they had started, and removes its directory

The watcher reads `+GROUP` and `-GROUP` from its standard input, line by line. Only the launcher has the other end: that
it closes is the launcher's end, whatever the reason. Run by its path and with nothing but the standard library, so that
it takes no time.

`farstep launch` and `farstep demo` are the launchers: `dying_with_parent` is the command of each process that they
start, and `watched` yields the watcher, which is told of each.
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
    """Return the command of a process that ends when this one does; as it was where there is no Linux.

    The thread that starts it must not end before this process, since Linux watches the thread.
    """
    return [*DIE_WITH_PARENT, "run", str(os.getpid()), *command] if sys.platform == "linux" else [*command]


class Watcher:
    """A process that outlives this one for a moment, to leave nothing behind.

    Args:
        pipe: the descriptor of its standard input.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def begun(self, group: int) -> None:
        """Note that a group of processes has begun."""
        self._tell("+", group)

    def over(self, group: int) -> None:
        """Note that its leader has ended; the number may soon be another's."""
        self._tell("-", group)

    def _tell(self, sign: str, group: int) -> None:
        with suppress(OSError):  # somebody has killed it; then there is no watcher
            os.write(self._pipe, f"{sign}{group}\n".encode())


@contextmanager
def watched(directory: str = "") -> Iterator[Watcher]:
    """Yield a watcher, which removes the directory at the end of this process, if one is named."""
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
    """Wait for the launcher's end, and leave nothing behind."""
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
