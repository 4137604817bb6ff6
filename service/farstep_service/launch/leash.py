"""Run a command that does not outlive who started it: `python -I -S leash.py PARENT COMMAND ...`.

Linux ends this process, and the command that takes its place, when the parent ends, even by SIGKILL. Run by its path
and with nothing but the standard library, so that it takes no time.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("The launcher has ended.")
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        print(f"Cannot run {sys.argv[2]}: {error.strerror}.", file=sys.stderr)
        sys.exit(127)
