"""Processes that are started together and ended together."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farstep_service.demo.processes import Ended, Line, ProcessEnded, started

LIMIT_S = 30.0
FOREVER = "import signal; print('here', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


PARENT_OF_TWO = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
child.wait()
"""


class Gone:
    """Whether a process is gone, asked of the process itself and not of its number."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def __call__(self) -> bool:
        """Wait for its end and return whether it came."""
        return bool(select.select([self._fd], [], [], LIMIT_S)[0])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_lines_arrive_before_the_end():
    """What a process prints arrives line by line, and then that it has ended."""
    with started() as processes:
        processes.start("short", "-c", "print('one'); print('two')")
        heard = [processes.next(LIMIT_S) for _ in range(3)]
    assert heard == [Line("short", "one"), Line("short", "two"), Ended("short", 0)]


def test_nobody_outlives_the_demo():
    """Leaving ends what still runs, also by an error, and also a process that does not listen to SIGTERM."""
    pids = []

    def fail() -> None:
        with started() as processes:
            for name, code in (("mild", FOREVER), ("stubborn", STUBBORN)):
                pids.append(processes.start(name, "-c", code))
                assert processes.line_of(name, LIMIT_S) == "here"
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fail()
    assert [alive(pid) for pid in pids] == [False, False]


def test_waiting_for_one_process_keeps_what_others_say():
    """The line of one process is found behind those of another, which are not lost."""
    with started() as processes:
        processes.start("first", "-c", "print('early')")
        heard = [processes.next(LIMIT_S)]
        processes.start("second", "-c", "print('late')")
        assert processes.line_of("second", LIMIT_S) == "late"
        heard += [processes.next(LIMIT_S), processes.next(LIMIT_S)]
    assert heard[0] == Line("first", "early")
    assert set(heard[1:]) == {Ended("first", 0), Ended("second", 0)}  # whichever is noticed first


def test_the_error_of_a_failed_process_holds_its_last_words():
    """A process that ended too early is named, with its exit code or signal and the last line of its standard error."""
    with started() as processes:
        processes.start("clumsy", "-c", "import sys; sys.exit('the disk is full.')")
        ended = processes.next(LIMIT_S)
        assert isinstance(ended, Ended)
        assert processes.failure(ended).detail == "clumsy ended with exit code 1: the disk is full."
        pid = processes.start("victim", "-c", FOREVER)
        assert processes.line_of("victim", LIMIT_S) == "here"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProcessEnded, match=r"victim was ended by SIGKILL\.$"):
            processes.line_of("victim", LIMIT_S)


def test_silence_is_an_error():
    """Nothing from anybody for the time given is an error that names who was expected to speak."""
    with started() as processes:
        processes.start("sleeper", "-c", "import signal; signal.pause()")
        with pytest.raises(ProcessEnded, match=r"Nothing was heard from sleeper for 0\.1 s"):
            processes.next(0.1)


def test_what_was_stopped_is_not_heard_of_again():
    """The end of a process that was stopped, and replaced by one of the same name, is no news."""
    with started() as processes:
        processes.start("server", "-c", FOREVER)
        processes.stop("server")
        processes.start("server", "-c", "print('again')")
        assert [processes.next(LIMIT_S), processes.next(LIMIT_S)] == [Line("server", "again"), Ended("server", 0)]


def test_a_process_does_not_see_the_users_server(monkeypatch: pytest.MonkeyPatch):
    """The variables that lead to the user's own server are not handed on; the kernel cache is."""
    monkeypatch.setenv("FARSTEP_TOKEN", "secret")
    monkeypatch.setenv("FARSTEP_SERVER", "http://production:7171")
    monkeypatch.setenv("FARSTEP_KERNEL_CACHE", "/somewhere")
    code = "import os; print(sorted(name for name in os.environ if name.startswith('FARSTEP')))"
    with started() as processes:
        processes.start("child", "-c", code, environment={"FARSTEP_SESSION": "digits"})
        assert processes.line_of("child", LIMIT_S) == "['FARSTEP_KERNEL_CACHE', 'FARSTEP_SESSION']"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_the_children_first(number: signal.Signals, code: int, tmp_path: Path):
    """Ctrl-C and SIGTERM end the demo's processes before the demo."""
    program = tmp_path / "parent.py"
    program.write_text(
        "from farstep_service.demo.processes import started\n"
        "with started() as processes:\n"
        f"    print(processes.start('child', '-c', {FOREVER!r}), processes.line_of('child', 30), flush=True)\n"
        "    processes.next(30)\n"
    )
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, said = parent.stdout.readline().split()
        assert said == "here"
        parent.send_signal(number)
        assert parent.wait(LIMIT_S) == code
    assert not alive(int(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd")
def test_nothing_outlives_a_demo_that_is_killed(tmp_path: Path):
    """After a SIGKILL of the demo its process, the process that this one had started, and the directory are gone."""
    program = tmp_path / "parent.py"
    program.write_text(
        "from farstep_service.demo.processes import started\n"
        "with started() as processes:\n"
        f"    pid = processes.start('child', '-c', {PARENT_OF_TWO!r})\n"
        "    print(pid, processes.line_of('child', 30), flush=True)\n"
        "    processes.next(30)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        gone = [Gone(int(pid)) for pid in parent.stdout.readline().split()]
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        (watcher,) = (pid for pid in children if b"\0watch\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        watcher_gone = Gone(int(watcher))
        assert [*tmp_path.glob("farstep-demo-*")]
        parent.kill()
    assert len(gone) == 2
    assert [each() for each in (*gone, watcher_gone)] == [True] * 3
    assert not [*tmp_path.glob("farstep-demo-*")]
