"""The demo's processes: started together and ended together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farstep_service.demo.display import Silent
from farstep_service.demo.remote import ProcessEnded, RemoteRun, failure_of
from farstep_service.demo.run import environment_of, processes
from farstep_service.demo.training import Training
from farstep_service.launch.children import ProcessExited
from tests.support.launch.launching import LIMIT_S, Gone, alive, events_of, line_of, watcher_of

ROOT = Path(__file__).parents[2]
FOREVER = "import signal; print('here', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


PARENT_OF_TWO = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
child.wait()
"""

DEMO = """
import os, sys
from farstep_service.demo.run import processes
from tests.support.launch.launching import events_of, line_of
with processes() as started:
    pid = started.start("child", [sys.executable, "-c", {code!r}], os.environ)
    print(pid, line_of(events_of(started), "child"), flush=True)
    started.wait(30)
"""
"""A program that starts one process as the demo does, and waits."""


def test_no_process_outlives_the_demo():
    """Leaving ends what still runs, also by an error, and also a process that does not listen to SIGTERM."""
    pids = []

    def fail() -> None:
        with processes() as started:
            for name, code in (("mild", FOREVER), ("stubborn", STUBBORN)):
                pids.append(started.start(name, [sys.executable, "-c", code], os.environ))
                assert line_of(events_of(started), name) == "here"
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fail()
    assert [alive(pid) for pid in pids] == [False, False]


def test_the_error_of_a_failed_process_holds_its_last_words():
    """A process that ended too early is named, with its exit code or signal and the last line of its standard error."""
    clumsy = failure_of(ProcessExited("clumsy", 1, "the disk is full."))
    assert clumsy.detail == "clumsy ended with exit code 1: the disk is full."
    with processes() as started:
        run = RemoteRun(started, Training(), Silent(), {})
        pid = started.start("victim", [sys.executable, "-c", FOREVER], os.environ)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProcessEnded, match=r"victim was ended by SIGKILL\.$"):
            run.to_the_end()


def test_silence_is_an_error():
    """If no process writes for the time given, the error names all that were expected to."""
    with processes() as started:
        started.start("sleeper", [sys.executable, "-c", "import signal; signal.pause()"], os.environ)
        with pytest.raises(ProcessEnded, match=r"Nothing was heard from sleeper for 0\.1 s"):
            RemoteRun(started, Training(), Silent(), {}, silence_s=0.1).to_the_end()


def test_a_process_does_not_see_the_users_server():
    """The variables that lead to the user's own server are not handed on; the kernel cache is."""
    user = {
        "PATH": "/bin",
        "FARSTEP_TOKEN": "secret",
        "FARSTEP_SERVER": "http://production:7171",
        "FARSTEP_KERNEL_CACHE": "/somewhere",
    }
    assert environment_of(user) == {
        "PATH": "/bin",
        "FARSTEP_KERNEL_CACHE": "/somewhere",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_the_children_first(number: signal.Signals, code: int):
    """Ctrl-C and SIGTERM end the demo's processes before the demo."""
    with subprocess.Popen(
        [sys.executable, "-c", DEMO.format(code=FOREVER)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid, said = parent.stdout.readline().split()
        assert said == "here"
        parent.send_signal(number)
        assert parent.wait(LIMIT_S) == code
    assert not alive(int(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd")
def test_nothing_outlives_a_demo_that_is_killed(tmp_path: Path):
    """After a SIGKILL of the demo its process, and the process that this one had started, are gone; no file is left."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", DEMO.format(code=PARENT_OF_TWO)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        gone = [Gone(int(pid)) for pid in parent.stdout.readline().split()]
        watcher_gone = Gone(watcher_of(parent.pid))
        parent.kill()
    assert len(gone) == 2
    assert [each() for each in (*gone, watcher_gone)] == [True] * 3
    assert not [*tmp_path.iterdir()]
