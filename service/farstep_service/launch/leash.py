"""What sees to it that nothing outlives a launcher, even one that was ended by SIGKILL.

    leash.py run PARENT COMMAND ...     becomes the command; Linux ends it when its parent ends
    leash.py watch DIRECTORY            outlives the launcher for a moment: ends the groups of processes that it had
                                        started, with all that they had started, and removes its directory

The watcher reads `+GROUP` and `-GROUP` from its standard input, line by line. Only the launcher has the other end: that
it closes is the launcher's end, whatever the reason. Run by its path and with nothing but the standard
library, so that it takes no time.
"""

import os
import signal
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1


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
