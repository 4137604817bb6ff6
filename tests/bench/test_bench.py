"""`farstep bench` as people run it, against a server in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from farstep.conversation import Conversation
from farstep_service.bench import PARTS, Workload
from farstep_service.bench.steps import open_session
from farstep_service.cli.bench import PART_LABELS
from farstep_service.cli.entry import program
from tests.support.client.carrying import Carrying
from tests.support.service.servers import TOKEN, RunningServer, farstep, running_server

SMALL = ("--parameters", "100k", "--tensors", "4", "--steps", "5", "--wait", "0")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server that has room for sessions of 8 MB and asks for a token."""
    with running_server("--max-session-gib", "0.008", token=TOKEN, loaded=True) as running:
        yield running


@pytest.fixture
def talk(server: RunningServer) -> Iterator[Conversation]:
    """Speak with the server, on which nothing may be left at the end."""
    conversation = Conversation(server.url, TOKEN)
    yield conversation
    left: Any = conversation.control("GET", "/v1/sessions")
    assert left == []
    conversation.close()


@pytest.fixture
def bench(server: RunningServer, talk: Conversation) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the verb against the server."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return farstep("bench", *arguments, env={"FARSTEP_SERVER": server.url, "FARSTEP_TOKEN": TOKEN}, loaded=True)

    return run


Bench = Callable[..., subprocess.CompletedProcess[str]]


def test_a_person_reads_link_device_and_what_to_expect(bench: Bench, server: RunningServer) -> None:
    """The model, the link, every part of the step, other sizes, and when it is worth it; then nothing is left."""
    done = bench(*SMALL)
    assert done.returncode == 0, done.stderr
    for each in ("100,000 float32 parameters in 4 tensors (400 kB)", "Adagrad, ", server.url, "on cpu", "round trip",
                 "p99",
                 "/s up", "/s down", "400 kB there and 400 kB back", "steps per second", "1,000,000,000", "estimated",
                 "less than 10% of it, the backward pass has to take", *PART_LABELS.values()):  # fmt: skip
        assert each in done.stdout
    assert "measuring steps of 100,000 parameters" in done.stderr


def test_the_document_holds_what_was_measured(bench: Bench, server: RunningServer) -> None:
    """--json prints one line of seconds and bytes; the parts add up to the step, and all numbers are possible."""
    done = bench(*SMALL, "--optimizer", "Adam", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["server"] == server.url
    assert found["model"] == {
        "optimizer": "Adam", "dtype": "float32", "parameters": 100_000, "tensors": 4, "bytes": 400_000,
    }  # fmt: skip
    assert found["device"]["name"] == "cpu"
    assert found["device"]["kernel"] in ("fused", "reference")
    assert found["bytes"] == {"sent": 400_000, "received": 400_000}
    assert found["step_s"]["steps"] == 5
    assert 0 < found["step_s"]["median"] <= found["step_s"]["p90"] < 60
    assert found["steps_per_s"] == pytest.approx(1 / found["step_s"]["median"])
    where = found["where_s"]
    assert set(where) == {"total", *PARTS}
    assert sum(where[part] for part in PARTS) == pytest.approx(where["total"])
    assert min(where[part] for part in ("up", "check", "update", "down", "copy", "client")) > 0
    link = found["link"]
    assert 0 < link["round_trip_s"]["median"] <= link["round_trip_s"]["p99"]
    assert min(link["up_bytes_per_s"], link["down_bytes_per_s"]) > 1e6
    assert [each["parameters"] for each in found["sizes"]] == [4, 100_000, 1_000_000]
    assert found["costs"]["fixed_s"] >= 0
    assert [each["parameters"] for each in found["estimates"]] == [10**6, 10**7, 10**8, 10**9]
    assert found["estimates"][0]["step_s"] == pytest.approx(found["sizes"][-1]["median_s"])
    assert found["break_even"] == {"share": 0.1, "backward_s": pytest.approx(10 * found["step_s"]["median"])}


def test_shapes_and_halves_are_measured(bench: Bench, tmp_path: Path) -> None:
    """A model is given by its shapes; bfloat16 parameters travel in two bytes."""
    file = tmp_path / "shapes"
    file.write_text("64x3x7x7\n1000x512\n1000\n")
    done = bench("--shapes", str(file), "--dtype", "bfloat16", "--optimizer", "Muon", "--json")
    assert json.loads(done.stdout)["field"] == "optimizer"
    done = bench("--shapes", str(file), "--dtype", "bfloat16", "--json", "--steps", "2", "--wait", "0")
    found = json.loads(done.stdout)
    assert (found["model"]["parameters"], found["model"]["tensors"]) == (64 * 3 * 49 + 512_000 + 1_000, 3)
    assert found["bytes"]["sent"] == 2 * found["model"]["parameters"]


def test_without_a_server_a_step_is_embedded() -> None:
    """No server: no link and no bytes, and a step is its update and the bookkeeping around it."""
    env = {"FARSTEP_SERVER": "", "FARSTEP_SESSION": "somebody-elses"}
    found = json.loads(farstep("bench", *SMALL, "--json", env=env, loaded=True).stdout)
    assert (found["server"], found["link"], found["bytes"]) == (None, None, {"sent": 0, "received": 0})
    assert found["where_s"]["total"] == pytest.approx(found["where_s"]["update"] + found["where_s"]["client"])
    told = farstep("bench", *SMALL, env=env, loaded=True).stdout
    assert "embedded in this process" in told
    assert PART_LABELS["down"] not in told


# -- interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_session(
    server: RunningServer, talk: Conversation, number: signal.Signals
) -> None:
    """Ctrl-C, and a container runtime's signal, end it in the middle of its steps; the session is removed first."""
    command = [sys.executable, "-m", "farstep_service", "bench", "--server", server.url, "--token", TOKEN]
    command += ["--parameters", "1M", "--seconds", "60", "--wait", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("measuring" in line for line in process.stderr)
            sessions: Any = talk.control("GET", "/v1/sessions")
            (session,) = sessions
            assert session["name"].startswith("bench-")
            process.send_signal(number)
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode not in (0, -number)
    assert "Traceback" not in errors
    assert output == ""


class StopsAfterJoining(Carrying):
    """Interrupt the caller when the answer to the first request, which creates a session, is there."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request, and drop the answer."""
        super().handle_request(request).read()
        raise KeyboardInterrupt


def test_a_session_whose_creation_was_interrupted_is_removed(talk: Conversation) -> None:
    """The server has created it and the client does not know: it is found by its name and removed."""
    work = Workload.of("Adagrad", "float32", 10, 1)
    with pytest.raises(KeyboardInterrupt), open_session(work, talk, TOKEN, StopsAfterJoining()):
        pytest.fail("a session that the client does not know was entered")


# -- refused


def test_a_server_that_is_away() -> None:
    """If no server listens there are two lines and status 1, before anything is measured."""
    done = farstep("bench", "--server", "http://127.0.0.1:9", loaded=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error unavailable: http://127.0.0.1:9 does not answer: Connection refused."


def test_a_session_that_the_server_does_not_allow(bench: Bench) -> None:
    """A model larger than the server's limit is refused in the server's words; nothing is left."""
    done = bench("--parameters", "3M", "--steps", "2", "--wait", "0", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "limit_exceeded"
    assert "--max-session-gib" in json.loads(done.stdout)["remedy"]


def test_a_token_is_asked_for(server: RunningServer) -> None:
    """Without the token there is status 2 and the server's word."""
    done = farstep("bench", *SMALL, "--server", server.url, env={"FARSTEP_TOKEN": ""}, loaded=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error unauthorized: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--parameters", "1e12"], "are available"),
        (["--parameters", "lots"], "Write 25M"),
        (["--parameters", "3", "--tensors", "5"], "one for each tensor"),
        (["--optimizer", "Adagrad2"], "There are"),
        (["--optimizer", "LBFGS"], "closure"),
        (["--dtype", "int8"], "float32"),
        (["--shapes", "/nothing/there"], "Cannot read"),
        (["--shapes", "/nothing/there", "--tensors", "5"], "Leave --parameters"),
        (["--steps", "1"], "--steps"),
        (["--seconds", "0"], "--seconds"),
        (["--tensors", "0"], "--tensors"),
        (["--server", "ftp://box"], "Invalid server"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], word: str) -> None:
    """Bad arguments, and a model that no memory holds: status 2, in words, at once."""
    done = CliRunner().invoke(program(), ["bench", *arguments], env={"FARSTEP_SERVER": ""})
    assert (done.exit_code, done.stdout) == (2, "")
    assert word in done.stderr
    assert isinstance(done.exception, SystemExit)
