"""The demo as people run it: real processes, real digits."""

import json
import os
import re
import signal
from urllib.parse import urlsplit

import pytest

from farstep_service.demo.digits import largest_difference
from farstep_service.demo.processes import Ended, Processes, started
from farstep_service.demo.remote import fetch, follow, start_workers
from farstep_service.demo.reports import TOLERANCE, Pace, Report
from farstep_service.demo.run import SERVER, server_url, start_server
from farstep_service.demo.training import Training, train_locally

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


def test_the_training_survives_a_killed_worker_and_a_killed_server():
    """A worker that is killed and replaced, and then a server that is, leave the training to end as it would have."""
    training = Training(epochs=5)
    notes: list[str] = []
    with started() as processes:
        server = start_server(processes)
        url = server_url(processes)
        workers = start_workers(processes, training, url)

        def disturb(report: Report, pace: Pace) -> None:
            nonlocal server
            if report.note:
                notes.append(report.note)
            if workers and report.epoch == 1:
                os.kill(workers["worker-01"], signal.SIGKILL)
                processes.stop("worker-01")
                start_workers(processes, training, url, only=["worker-01"])
                workers.clear()
            if server and report.epoch == 3:
                os.kill(server, signal.SIGKILL)
                processes.stop(SERVER)
                start_server(processes, port=urlsplit(url).port or 0)
                server = 0
                assert server_url(processes) == url

        last = follow(processes, training, disturb)
        trained = fetch(training, url)
    assert (workers, server) == ({}, 0)
    assert [report.version for report in last.values()] == [training.steps] * 2
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
    """A worker whose variables cannot be ends with one line that says so."""
    with started() as processes:
        settings = {"FARSTEP_SERVER": "http://127.0.0.1:9", **environment}
        processes.start("worker", "-m", "farstep_service.demo.worker", environment=settings)
        lines, ended = until_the_end(processes)
        assert (lines, ended.code) == ([], 1)
        assert complaint in str(processes.failure(ended))
