"""The demo as people run it: real processes, real digits."""

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from farstep_service.demo.digits import largest_difference
from farstep_service.demo.display import Silent
from farstep_service.demo.remote import RemoteRun, failure_of
from farstep_service.demo.reports import TOLERANCE, Pace, Report
from farstep_service.demo.run import STOP_S, environment_of, processes
from farstep_service.demo.training import Training, train_locally
from farstep_service.launch.children import Event, LineWritten, ProcessExited
from farstep_service.launch.own_server import SERVER, command_on_loopback
from tests.support.launch.launching import alive, events_of, line_of

DEMO = (sys.executable, "-m", "farstep_service", "demo")


def until_the_end(events: Iterator[Event]) -> tuple[list[str], ProcessExited]:
    """Return the lines of the standard output of one process, and its exit."""
    lines: list[str] = []
    for event in events:
        if isinstance(event, ProcessExited):
            return lines, event
        if isinstance(event, LineWritten) and event.stream == "stdout":
            lines.append(event.line.decode())
    raise AssertionError("unreachable")


@pytest.mark.promise(
    "`farstep demo` recognises 97 % of the digits and ends at the parameters of local training.",
    area="launch",
)
def test_the_demo_meets_its_targets():
    """`farstep demo --json` prints one JSON line: both trainings recognise 97 % and end at the same parameters."""
    with processes() as started:
        started.start("demo", [*DEMO, "--json"], environment_of(os.environ))
        lines, exited = until_the_end(events_of(started))
        assert exited.code == 0, failure_of(exited)
    (line,) = lines
    result = json.loads(line)
    assert result["ok"] is True
    assert result["accuracy_remote"] == result["accuracy_local"] >= 0.97
    assert result["max_parameter_difference"] <= TOLERANCE
    assert (result["workers"], result["optimizer"], result["kernel"]) == (2, "Adagrad", "reference")
    assert result["steps"] == Training().steps
    assert min(result["steps_per_s"], result["mb_per_s"]) > 0
    assert 0 < result["seconds"] < 120


@pytest.mark.promise(
    "`farstep demo --chaos` kills its server in the middle, and ends with the bits of a run without the kill.",
    area="durability",
)
def test_the_demo_survives_its_server():
    """The server is killed with SIGKILL once; no worker joins again, no bit of a parameter differs, nothing is left."""
    with processes() as started, tempfile.TemporaryDirectory() as place:
        environment = environment_of(os.environ) | {"TMPDIR": place}
        started.start("demo", [*DEMO, "--chaos", "--json", "--epochs", "12"], environment)
        lines, exited = until_the_end(events_of(started))
        assert exited.code == 0, failure_of(exited)
        assert [name for name in os.listdir(place) if name.startswith("farstep-demo-")] == []
    result = json.loads(lines[0])
    assert (result["ok"], result["server_kills"], result["rejoins"]) == (True, 1, 0)
    assert result["max_parameter_difference"] == 0
    assert result["seconds"] < 120


@pytest.mark.parametrize("victim", ["worker-01", SERVER])
def test_a_killed_process_ends_the_demo(victim: str):
    """When a worker or the server is killed, the demo names it in one line, fails, and leaves no process."""
    pids: dict[str, int] = {}
    with processes() as started:
        started.start("demo", DEMO, environment_of(os.environ))
        events = events_of(started)
        while True:
            line = line_of(events, "demo")
            if named := re.match(r"(\S+) .*is process (\d+)", line):
                pids[named[1]] = int(named[2])
            if re.search(r"epoch +1 ", line):
                break
        os.kill(pids[victim], signal.SIGKILL)
        _, exited = until_the_end(events)
        assert exited.code == 1
        assert exited.last_error.startswith(f"error process_ended: {victim} was ended by SIGKILL")
    assert set(pids) == {SERVER, "worker-00", "worker-01"}
    assert [name for name, pid in pids.items() if alive(pid)] == []


def test_the_training_survives_a_killed_worker_and_a_killed_server():
    """A worker that is killed and replaced, and then a server that is, leave the training to end as it would have."""
    training = Training(epochs=5)
    notes: list[str] = []

    class Disturbing(Silent):
        """Kill and replace a worker after one epoch, and the server after three."""

        def __init__(self) -> None:
            self.left = ["worker-01", SERVER]

        def remote(self, report: Report, pace: Pace) -> None:
            if report.note:
                notes.append(report.note)
            if report.epoch == 1 and "worker-01" in self.left:
                self.kill("worker-01")
                run.start_workers(only=["worker-01"])
            if report.epoch == 3 and SERVER in self.left:
                self.kill(SERVER)
                command = command_on_loopback(urlsplit(run.url).port or 0)
                started.start(SERVER, command, environment)

        def kill(self, name: str) -> None:
            self.left.remove(name)
            started.signal(name, signal.SIGKILL)
            started.stop(name, within_s=STOP_S)

    environment = environment_of(os.environ)
    with processes() as started:
        disturbing = Disturbing()
        started.start(SERVER, command_on_loopback(), environment)
        run = RemoteRun(started, training, disturbing, environment)
        run.to_the_end()
        trained = run.fetch()
    assert disturbing.left == []
    assert [report.version for report in run.last.values()] == [training.steps] * 2
    assert sorted(notes) == [
        *["joined the session"] * 3,
        "the session was gone; created it anew",
        "the session was gone; joined it again",
    ]
    assert largest_difference(trained, train_locally(training)) <= TOLERANCE


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"FARSTEP_WORKER": "worker-02"}, "Invalid worker: 'worker-02'. A worker's name ends in its number, 0 to 1."),
        ({"FARSTEP_WORKER": "worker-00", "FARSTEP_SERVER": "localhost:7171"}, "Invalid server: 'localhost:7171'."),
    ],
    ids=["number", "server"],
)
def test_a_worker_says_what_is_wrong_with_its_settings(environment: dict[str, str], complaint: str):
    """A worker with invalid variables ends with one line that names them."""
    with processes() as started:
        settings = {"FARSTEP_SERVER": "http://127.0.0.1:9", **environment}
        command = (sys.executable, "-m", "farstep_service.demo.worker")
        started.start("worker", command, environment_of(os.environ) | settings)
        lines, exited = until_the_end(events_of(started))
        assert (lines, exited.code) == ([], 1)
        assert complaint in exited.last_error
