"""The demo as people run it: real processes, real digits."""

import json
import os
import re
import signal
from urllib.parse import urlsplit

import pytest

from farstep_service.demo.local import train_locally
from farstep_service.demo.model import largest_difference
from farstep_service.demo.processes import Ended, Processes, started
from farstep_service.demo.remote import fetch, follow, start_workers
from farstep_service.demo.reports import Pace, Report
from farstep_service.demo.result import TOLERANCE
from farstep_service.demo.server import SERVER, server_url, start_server
from farstep_service.demo.training import Training

LIMIT_S = 90.0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until_the_end(processes: Processes) -> tuple[list[str], Ended]:
    lines: list[str] = []
    while True:
        event = processes.next(LIMIT_S)
        if isinstance(event, Ended):
            return lines, event
        lines.append(event.text)


@pytest.mark.promise(
    "`farstep demo` recognises 97 % of the digits and ends at the parameters of local training.",
    area="launch",
)
def test_the_demo_meets_its_targets():
    """`farstep demo --json` prints one JSON line: both trainings recognise 97 % and end at the same parameters."""
    with started() as processes:
        processes.start("demo", "-m", "farstep_service", "demo", "--json")
        lines, ended = until_the_end(processes)
        assert ended.code == 0, processes.failure(ended)
    (line,) = lines
    result = json.loads(line)
    assert result["ok"] is True
    assert result["accuracy_remote"] == result["accuracy_local"] >= 0.97
    assert result["max_parameter_difference"] <= TOLERANCE
    assert (result["workers"], result["optimizer"], result["kernel"]) == (2, "Adagrad", "reference")
    assert result["steps"] == Training().steps
    assert min(result["steps_per_s"], result["mb_per_s"]) > 0
    assert 0 < result["seconds"] < 120


@pytest.mark.parametrize("victim", ["worker-01", SERVER])
def test_a_killed_process_ends_the_demo(victim: str):
    """When a worker or the server is killed in the middle, the demo names it in one line, fails, and leaves nobody."""
    pids: dict[str, int] = {}
    with started() as processes:
        processes.start("demo", "-m", "farstep_service", "demo")
        while True:
            line = processes.line_of("demo", LIMIT_S)
            if named := re.match(r"(\S+) .*is process (\d+)", line):
                pids[named[1]] = int(named[2])
            if re.search(r"epoch +1 ", line):
                break
        os.kill(pids[victim], signal.SIGKILL)
        _, ended = until_the_end(processes)
        assert ended.code == 1
        assert f"error process_ended: {victim} was ended by SIGKILL" in str(processes.failure(ended))
    assert set(pids) == {SERVER, "worker-00", "worker-01"}
    assert [name for name, pid in pids.items() if alive(pid)] == []


def test_the_workers_survive_a_restart_of_the_server():
    """When the server is killed and started again in the middle, the workers finish as if nothing had happened."""
    training = Training(epochs=6)
    notes: list[str] = []
    with started() as processes:
        server = start_server(processes)
        url = server_url(processes)

        def restart(report: Report, pace: Pace) -> None:
            nonlocal server
            if report.note:
                notes.append(report.note)
            if server and report.epoch == 2:
                os.kill(server, signal.SIGKILL)
                processes.stop(SERVER)
                start_server(processes, port=urlsplit(url).port or 0)
                server = 0
                assert server_url(processes) == url

        start_workers(processes, training, url)
        last = follow(processes, training, restart)
        trained = fetch(training, url)
    assert [report.version for report in last.values()] == [training.steps] * 2
    assert sorted(notes) == [
        *["joined the session"] * 2,
        "the session was gone; created it anew",
        "the session was gone; joined it again",
    ]
    assert largest_difference(trained, train_locally(training)) <= TOLERANCE


def test_a_worker_that_is_killed_and_replaced_goes_on():
    """A new process under the name of a killed worker takes its place, and the training ends as it would have."""
    training = Training(epochs=4)
    with started() as processes:
        start_server(processes)
        url = server_url(processes)
        pids = start_workers(processes, training, url)
        killed = False

        def replace(report: Report, pace: Pace) -> None:
            nonlocal killed
            if not killed and report.epoch == 1:
                killed = True
                os.kill(pids["worker-01"], signal.SIGKILL)
                processes.stop("worker-01")
                start_workers(processes, training, url, only=["worker-01"])

        last = follow(processes, training, replace)
        trained = fetch(training, url)
    assert killed
    assert [report.version for report in last.values()] == [training.steps] * 2
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
    """A worker whose variables cannot be ends with one line that says so."""
    with started() as processes:
        settings = {"FARSTEP_SERVER": "http://127.0.0.1:9", **environment}
        processes.start("worker", "-m", "farstep_service.demo.worker", environment=settings)
        lines, ended = until_the_end(processes)
        assert (lines, ended.code) == ([], 1)
        assert complaint in str(processes.failure(ended))
