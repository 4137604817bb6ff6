"""The output of `farstep launch`: to terminals, which may be closed, and pipes, which may be full."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from farstep_service.launch.terminal import Terminal
from tests.support.launch.launching import LIMIT_S, NO_SERVER, Gone

ERASED = "\x1b[2K"
"""What a terminal is sent before a line is drawn anew."""
MARK = b"<mark>"


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
    lines = [line.rpartition(ERASED)[2].rstrip("\r") for line in shown.split("\n")]
    assert [line for line in lines if line.startswith("w0")] == ["w0     | a line", "w0     | told"]
    assert lines[-1] == ""


def test_a_terminal_that_is_closed_is_a_signal_for_the_workers(script: Path, tmp_path: Path):
    """Workers get its SIGHUP and may take their time; output that cannot be written meanwhile does not end the run."""
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
        os.execv(sys.executable, [sys.executable, "-m", "farstep_service", "launch", *NO_SERVER, str(script)])
    until(terminal, "w0     | here")
    os.close(terminal)
    assert Gone(pid)()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert (tmp_path / "told").read_text() == f"hears {int(signal.SIGHUP)}\n"


def test_output_that_does_not_wait_for_its_reader_arrives_whole(script: Path):
    """A full standard output that is non-blocking makes the launcher wait, and loses no line."""
    script.write_text("for i in range(3000): print(i, 'x' * 100)")
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with subprocess.Popen(
        [sys.executable, "-m", "farstep_service", "launch", *NO_SERVER, str(script)],
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
        except OSError:  # Linux answers so when no process has the terminal open any more
            chunk = b""
        if not chunk:
            assert wanted is None, shown.decode()
            break
        shown += chunk
    return shown.decode()


# -- the terminal by itself


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Open a terminal of 20 columns: what a person sees, and what a program writes to."""
    ours, theirs = pty.openpty()
    resize(theirs, 20)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def resize(terminal: int, columns: int) -> None:
    """Give a terminal another width."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))


def sent(ours: int, theirs: int) -> bytes:
    """Return what was written since the last call; a mark behind it shows that all of it has come."""
    os.write(theirs, MARK)
    seen = b""
    while not seen.endswith(MARK):
        seen += os.read(ours, 65536)
    return seen.removesuffix(MARK)


def test_the_line_of_progress_fits_the_terminal(terminal: tuple[int, int]):
    """A narrow terminal shows the beginning in one row, and a wider one more, also if the text is the same."""
    ours, theirs = terminal
    shown = Terminal(["w0"], {"stdout": theirs, "stderr": theirs})
    for columns in (20, 7, 33):
        resize(theirs, columns)
        shown.progress("0123456789" * 5)
        last = sent(ours, theirs).decode().rpartition(ERASED)[2]
        assert re.sub(r"\x1b\[\?25[lh]", "", last) == ("0123456789" * 5)[:columns]
    shown.progress("0123456789" * 5)
    assert sent(ours, theirs) == b""


def test_the_cursor_stays_visible(terminal: tuple[int, int]):
    """The cursor is visible while the run goes on, because a killed launch could not bring it back."""
    ours, theirs = terminal
    shown = Terminal(["w0"], {"stdout": theirs, "stderr": theirs})
    shown.progress("digits")
    shown.line("w0", "stdout", b"a line")
    assert re.findall(rb"\x1b\[\?25[lh]", sent(ours, theirs))[-1] == b"\x1b[?25h"


def test_lines_are_written_as_they_are(terminal: tuple[int, int]):
    """Colours, long lines, tabs and bytes that are no text reach the terminal unchanged above the line of progress."""
    ours, theirs = terminal
    shown = Terminal(["w0"], {"stdout": theirs, "stderr": theirs})
    shown.progress("digits")
    for line in (b"\x1b[31mred\x1b[0m", b"x" * 50, b"a\tb [bold]c[/bold] :smile:", b"\xff\xfe caf\xc3\xa9 caf\xe9"):
        sent(ours, theirs)
        shown.line("w0", "stderr", line)
        before, after = sent(ours, theirs).split(b"w0 | " + line + b"\r\n")
        assert before.endswith(ERASED.encode())
        assert after == b"digits"


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_no_control_codes_where_they_are_not_understood(
    term: str, kind: str, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    """Only a terminal that understands control codes is sent any, whatever FORCE_COLOR and its like ask for."""
    for name, value in (("TERM", term), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("TTY_INTERACTIVE", "1")):
        monkeypatch.setenv(name, value)
    ours, theirs = os.pipe() if kind == "pipe" else terminal
    shown = Terminal(["w0"], {"stdout": theirs, "stderr": theirs})
    shown.progress("digits")
    shown.line("w0", "stdout", b"one")
    shown.line("w0", "stderr", b"two")
    shown.progress("")
    understood = kind == "terminal" and term == "xterm"
    assert shown.live == understood
    if understood:
        assert ERASED.encode() in sent(ours, theirs)
    else:
        assert sent(ours, theirs).replace(b"\r\n", b"\n") == b"w0 | one\nw0 | two\n"
    if kind == "pipe":
        os.close(ours)
        os.close(theirs)


def test_a_file_gets_lines_only(terminal: tuple[int, int], tmp_path: Path):
    """With the standard output in a file the line of progress stays on the terminal, and the file has whole lines."""
    ours, theirs = terminal
    with open(tmp_path / "log", "wb") as log:
        shown = Terminal(["w0"], {"stdout": log.fileno(), "stderr": theirs})
        shown.progress("digits")
        shown.line("w0", "stdout", b"\xff one")
        shown.line("w0", "stderr", b"two")
        shown.progress("")
    assert (tmp_path / "log").read_bytes() == b"w0 | \xff one\n"
    assert b"one" not in (seen := sent(ours, theirs))
    assert b"w0 | two\r\n" in seen
