"""Where `farstep launch` writes to: terminals, which may be closed, and pipes, which may be full."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch.launching import LIMIT_S, NOBODY, Gone


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Name a file for a script."""
    return tmp_path / "train.py"


def test_a_line_of_progress_on_a_terminal(script: Path, tmp_path: Path):
    """On a terminal the last line says where session and workers are; lines of workers push it down, unharmed."""
    os.mkfifo(tmp_path / "fifo")
    script.write_text(
        "import torch, farstep\n"
        "p = torch.zeros(3, requires_grad=True)\n"
        "p.grad = torch.ones(3)\n"
        "optimizer = farstep.optim.SGD([p])\n"
        "for _ in range(7): optimizer.step()\n"
        "print('a line', flush=True)\n"
        f"print(open({str(tmp_path / 'fifo')!r}).read())\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "farstep_service", "launch", "--session", "run", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = until(ours, "run  version 7  ")
        (tmp_path / "fifo").write_text("told")
        shown += until(ours, None)
        os.close(ours)
        assert process.wait(LIMIT_S) == 0
    assert "run  not there yet  |  w0 outside" in shown
    assert "|  w0 trains" in shown
    lines = [line.rpartition("\x1b[K")[2].rstrip("\r") for line in shown.split("\n")]
    assert [line for line in lines if line.startswith("w0")] == ["w0     | a line", "w0     | told"]
    assert lines[-1] == ""


def test_a_terminal_that_is_closed_is_a_signal_for_the_workers(script: Path, tmp_path: Path):
    """Its SIGHUP is handed on and may be answered in peace; what cannot be written meanwhile ends nothing."""
    script.write_text(
        "import signal, sys\n"
        "def leave(number, _frame):\n"
        f"    print('hears', number, file=open({str(tmp_path / 'told')!r}, 'w'), flush=True)\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGHUP, leave)\n"
        "print('here', flush=True)\n"
        "while True: signal.pause()\n"
    )
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "farstep_service", "launch", *NOBODY, str(script)])
    until(terminal, "w0     | here")
    os.close(terminal)
    assert Gone(pid)()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert (tmp_path / "told").read_text() == f"hears {int(signal.SIGHUP)}\n"


def test_output_that_does_not_wait_for_its_reader_arrives_whole(script: Path):
    """A standard output that somebody has set to return at once when it is full holds the launcher up, not down."""
    script.write_text("for i in range(3000): print(i, 'x' * 100)")
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with subprocess.Popen(
        [sys.executable, "-m", "farstep_service", "launch", *NOBODY, str(script)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    ) as process:
        os.close(theirs)
        with open(ours, "rb") as reader:
            assert [int(line.split()[2]) for line in reader] == list(range(3000))
        assert process.wait(LIMIT_S) == 0


def until(terminal: int, wanted: str | None) -> str:
    """Read from a terminal until it has shown something, or to its end."""
    shown = b""
    while wanted is None or wanted not in shown.decode():
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # what Linux says when nobody has the terminal open any more
            chunk = b""
        if not chunk:
            assert wanted is None, shown.decode()
            break
        shown += chunk
    return shown.decode()
