"""The verbs that ask a server, and those that answer without one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from farstep.conversation import Conversation
from farstep.errors import UnknownSession
from farstep_service.cli.output import printable, size
from tests.support.service.servers import TOKEN, RunningServer, farstep, running_server

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ask(server: RunningServer) -> Run:
    """Run a verb against the server of this file."""

    def run(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        return farstep(*arguments, "--server", server.url, loaded="python" not in how, **how)

    return run


@pytest.fixture
def talk(server: RunningServer) -> Iterator[Conversation]:
    """Speak with the server of this file as a client does."""
    conversation = Conversation(server.url, None)
    yield conversation
    conversation.close()


@pytest.fixture
def session(talk: Conversation) -> Iterator[str]:
    """Create a session of one small parameter that a worker has joined, and remove it."""
    document = {
        "name": "digits",
        "worker": "w0",
        "optimizer": "Adagrad",
        "groups": [{"lr": 0.25}],
        "segments": [{"name": "weight", "shape": [10, 3], "dtype": "float32"}],
    }
    talk.control("POST", "/v1/sessions", document)
    yield "digits"
    if any(each["name"] == "digits" for each in names_of(talk)):
        talk.control("DELETE", "/v1/sessions/digits")


def names_of(talk: Conversation) -> Any:
    return talk.control("GET", "/v1/sessions")


@pytest.fixture
def impostor() -> Iterator[Callable[..., str]]:
    """Start servers that are not ours: each answers everything with one status, type and body."""
    running: list[tuple[HTTPServer, threading.Thread]] = []

    def start(body: str, *, status: int = 200, kind: str = "application/json", location: str = "") -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body.encode())))
                if location:
                    self.send_header("Location", location)
                self.end_headers()
                self.wfile.write(body.encode())

            do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        http = HTTPServer(("127.0.0.1", 0), Answer)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        running.append((http, thread))
        return f"http://127.0.0.1:{http.server_port}"

    yield start
    for http, thread in running:
        http.shutdown()
        thread.join()
        http.server_close()


# -- status and sessions


def test_status_shows_a_server_and_its_sessions(ask: Run, server: RunningServer, session: str) -> None:
    """One screen: version, address, device, optimizers, and a line for each session."""
    done = ask("status")
    assert (done.returncode, done.stderr) == (0, "")
    for each in (server.url, "on cpu", "no token", "Adagrad", "sessions: 1", "120 B", session, "async"):
        assert each in done.stdout


def test_status_as_json_holds_the_documents_of_the_server(ask: Run, server: RunningServer, session: str) -> None:
    """--json prints one line with what the server says about itself and its sessions."""
    done = ask("status", "--json")
    assert len(done.stdout.splitlines()) == 1
    document = json.loads(done.stdout)
    assert document["server"]["url"] == server.url
    assert document["server"]["device"] == "cpu"
    assert [each["name"] for each in document["sessions"]] == [session]


def test_sessions_are_listed(ask: Run, session: str) -> None:
    """`sessions ls` has a line for each session, `--json` a list of their documents."""
    assert session in ask("sessions", "ls").stdout
    assert [each["name"] for each in json.loads(ask("sessions", "ls", "--json").stdout)] == [session]


def test_no_sessions_is_not_an_error(ask: Run) -> None:
    """A server without sessions says so."""
    done = ask("sessions", "ls")
    assert done.returncode == 0
    assert "no sessions" in done.stdout
    assert json.loads(ask("sessions", "ls", "--json").stdout) == []


def test_a_session_is_shown(ask: Run, session: str) -> None:
    """`sessions show` tells options, size and workers."""
    done = ask("sessions", "show", session)
    assert (done.returncode, done.stderr) == (0, "")
    for each in ("Adagrad", "lr 0.25", "30 in 1 tensors", "w0", "not arrived"):
        assert each in done.stdout
    assert json.loads(ask("sessions", "show", session, "--json").stdout)["workers"]["w0"]["epoch"] == 1


def test_a_session_is_removed_when_it_is_certain(ask: Run, talk: Conversation, session: str) -> None:
    """`sessions rm` asks first, and removes after a yes."""
    assert ask("sessions", "rm", session, answer="n\n").returncode == 1
    assert ask("sessions", "rm", session, answer="").returncode == 1
    assert len(names_of(talk)) == 1
    done = ask("sessions", "rm", session, answer="y\n")
    assert done.returncode == 0
    assert f"Removed session {session}" in done.stdout
    assert names_of(talk) == []


def test_a_session_is_removed_without_a_question(ask: Run, talk: Conversation, session: str) -> None:
    """--yes asks nobody; --json alone, where nobody can be asked, is refused."""
    assert ask("sessions", "rm", session, "--json").returncode == 2
    assert len(names_of(talk)) == 1
    done = ask("sessions", "rm", session, "--json", "--yes")
    assert json.loads(done.stdout) == {"removed": session}
    with pytest.raises(UnknownSession):
        talk.control("GET", f"/v1/sessions/{session}")


# -- errors


@pytest.mark.parametrize("verb", [["show", "nobody"], ["rm", "nobody"], ["rm", "nobody", "--yes"]])
def test_an_error_of_the_server_is_shown_in_its_words(ask: Run, verb: list[str]) -> None:
    """A session that is not there: the server's code, detail and remedy in two lines, and status 1."""
    done = ask("sessions", *verb)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("error unknown_session: ")
    assert "nobody" in first
    assert "restarted" in second


def test_an_error_as_json_is_its_problem_document(ask: Run) -> None:
    """With --json the error is one line on the standard output."""
    done = ask("sessions", "show", "nobody", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["code"] == "unknown_session"


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 64])
def test_a_name_that_no_session_can_have_is_refused(ask: Run, name: str) -> None:
    """What could not be a session's name is not sent."""
    done = ask("sessions", "show", "--", name) if name == "-x" else ask("sessions", "rm", name, "--yes")
    assert done.returncode == 2


@pytest.mark.parametrize("verb", [["status"], ["sessions", "ls"], ["sessions", "rm", "x", "--yes"]])
def test_a_server_that_is_not_there(verb: list[str]) -> None:
    """Nobody listens: two lines that say where and what to do, and status 1."""
    done = farstep(*verb, env={"FARSTEP_SERVER": "http://127.0.0.1:9"}, loaded=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error unavailable: http://127.0.0.1:9 does not answer: Connection refused.",
        "  Check the URL, and that `farstep serve` runs there.",
    ]


@pytest.mark.parametrize("url", ["127.0.0.1:7171", "ftp://127.0.0.1", "http://", "http://[::1", "http://h:99999999"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    """What is no URL of a server is refused in one or two lines."""
    done = farstep("status", "--server", url, loaded=True)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error ")
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("body", "kind"),
    [("<html>hello</html>", "text/html"), ("[]", "application/json"), ("{}", "application/json"), ("", "")],
)
def test_something_else_answers(impostor: Callable[..., str], body: str, kind: str) -> None:
    """A web server that is not ours is recognised, whatever it answers."""
    done = farstep("status", "--server", impostor(body, kind=kind), loaded=True)
    assert done.returncode == 1
    assert "does not answer as a farstep server" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_server_says_cannot_steer_the_terminal(impostor: Callable[..., str]) -> None:
    """Control characters of an answer are not printed."""
    problem = {"code": "busy", "detail": "\x1b[2Jgone\x07\r", "remedy": "[red]wait[/nonsense]"}
    done = farstep(
        "status", "--server", impostor(json.dumps(problem), status=503, kind="application/problem+json"), loaded=True
    )
    assert done.returncode == 1
    assert done.stderr == "error busy: [2Jgone\n  [red]wait[/nonsense]\n"
    assert printable("a\x9bb\x7f") == "ab"


def test_a_token_is_shown_where_it_is_asked_for() -> None:
    """Without the token or with another one status exits with 2; FARSTEP_TOKEN opens, as --token does."""
    with running_server(token=TOKEN, loaded=True) as server:
        env = {"FARSTEP_SERVER": server.url}
        for token in ("", "another-token-of-32-characters!!"):
            done = farstep("status", env={**env, "FARSTEP_TOKEN": token}, loaded=True)
            assert done.returncode == 2
            assert done.stderr.startswith("error unauthorized: ")
        assert "asks for a token" in farstep("status", env={**env, "FARSTEP_TOKEN": TOKEN}, loaded=True).stdout
        assert farstep("sessions", "ls", "--token", TOKEN, env=env, loaded=True).returncode == 0
        assert farstep("healthcheck", env=env, loaded=True).returncode == 0


# -- healthcheck


def test_a_healthy_server_is_silent(ask: Run, server: RunningServer) -> None:
    """A healthcheck exits 0 without a word; without --server it asks the port that `serve` has in this environment."""
    done = ask("healthcheck")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert farstep("healthcheck", env={"FARSTEP_SERVE_PORT": str(server.port)}, loaded=True).returncode == 0
    assert json.loads(ask("healthcheck", "--json").stdout)["healthy"] is True


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://h:port", "https://127.0.0.1:9"])
def test_a_server_that_is_not_healthy(url: str) -> None:
    """A healthcheck exits 1 with one line that says why."""
    done = farstep("healthcheck", "--server", url, loaded=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(farstep("healthcheck", "--server", url, "--json", loaded=True).stdout)["healthy"] is False


@pytest.mark.parametrize(("body", "status"), [("<html>", 200), ('{"status": "ok"}', 503), ("", 204)])
def test_another_server_is_not_healthy(impostor: Callable[..., str], body: str, status: int) -> None:
    """Whatever else listens on the port is not taken for a farstep server."""
    assert farstep("healthcheck", "--server", impostor(body, status=status), loaded=True).returncode == 1


# -- what is loaded, and how it looks


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip() for line in lines}


@pytest.mark.parametrize("verb", [["--help"], ["sessions", "--help"], ["status"], ["sessions", "ls"], ["healthcheck"]])
def test_a_question_loads_neither_torch_nor_fastapi(ask: Run, verb: list[str]) -> None:
    """Help and questions to a server are quick, because they import neither torch, fastapi nor uvicorn."""
    python = ("-X", "importtime")
    done = farstep(*verb, python=python) if "--help" in verb else ask(*verb, python=python)
    assert done.returncode == 0
    assert imported(done) & {"torch", "fastapi", "uvicorn", "numpy"} == set()
    assert "farstep_service.cli" in imported(done)
    if verb == ["healthcheck"]:
        assert imported(done) & {"httpx", "rich.console", "asyncio"} == set()


def test_output_for_a_pipe_has_no_colours(ask: Run, session: str) -> None:
    """What is written to a pipe has no escape sequences and no line cut off at 80 columns."""
    for verb in (["status"], ["sessions", "ls"], ["sessions", "show", session]):
        assert "\x1b" not in ask(*verb).stdout
    header = next(line for line in ask("sessions", "ls").stdout.splitlines() if line.startswith("SESSION"))
    assert header.split() == [
        "SESSION", "OPTIMIZER", "VERSION", "MODE", "WORKERS", "PARAMETERS", "MEMORY", "DURABILITY", "KERNEL",
    ]  # fmt: skip


def test_the_version_is_told() -> None:
    """--version names the program and its version."""
    name, version = farstep("--version").stdout.split()
    assert name == "farstep"
    assert version[0].isdigit()


def test_an_unknown_verb_is_refused() -> None:
    """A verb that nobody knows is refused without a traceback."""
    done = farstep("fly")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_client_alone_is_told_what_to_install() -> None:
    """Where typer is not installed, the script says which extra brings it."""
    code = "import sys; sys.modules['typer'] = None; from farstep_service.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'farstep[service]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"), (999_499, "999 kB"),
     (999_500, "1.0 MB"), (25_000_000 * 4, "100 MB"), (10**16, "10000 TB")],
)  # fmt: skip
def test_sizes_are_written_for_people(nbytes: int, text: str) -> None:
    """A number of bytes has up to three digits and a unit."""
    assert size(nbytes) == text


# -- warmup


def test_warmup_says_why_there_are_no_kernels(tmp_path: Path) -> None:
    """Without a compiler warmup names each kernel it could not build and exits with 1."""
    env = {
        "FARSTEP_KERNEL_CACHE": str(tmp_path / "kernels"),
        "CXX": str(tmp_path / "no-compiler"),
        "OMP_NUM_THREADS": "1",
    }
    done = farstep("warmup", "--optimizers", "Adagrad", "--wire", "float16", env=env)
    assert done.returncode == 1
    usual, narrow = sorted(done.stdout.splitlines(), key=len)
    assert usual.startswith("Adagrad float32 on cpu, one thread: failed, ")
    assert narrow.startswith("Adagrad float32 from float16 and to float16 on cpu, one thread: failed, ")
    assert "Traceback" not in done.stderr


def test_warmup_of_everything(tmp_path: Path) -> None:
    """With --all there is a kernel for every element type and for every choice of optional state."""
    env = {
        "FARSTEP_KERNEL_CACHE": str(tmp_path / "kernels"),
        "CXX": str(tmp_path / "no-compiler"),
        "OMP_NUM_THREADS": "1",
    }
    done = farstep("warmup", "--optimizers", "SGD", "--all", env=env)
    assert done.returncode == 1
    dtypes = ("float32", "bfloat16", "float16", "float64")
    rules = ("SGD", "SGD with momentum_buffer")
    built = {line.partition(" on cpu")[0] for line in done.stdout.splitlines()}
    assert built == {f"{rule} {dtype}" for rule in rules for dtype in dtypes}


@pytest.mark.parametrize("option", ["--optimizers=Adam2", "--dtypes=int8", "--wire=float32", "--device=tpu"])
def test_warmup_for_what_there_is_not(option: str) -> None:
    """Optimizers, dtypes and devices that do not exist are refused, naming those that do."""
    done = farstep("warmup", option, loaded=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error invalid_option: ")
    assert "There are" in done.stderr


@pytest.mark.parametrize("verb", [["status"], ["sessions", "ls"], ["sessions", "show", "a-very-long-name"], ["--help"]])
def test_an_ascii_terminal_is_enough(impostor: Callable[..., str], verb: list[str]) -> None:
    """Tables that are cut, names from elsewhere and frames end no verb where only ascii can be printed."""
    page = {"name": "\u00fcber-lang-" * 20, "incarnation": "0" * 32, "version": 1, "initialised": True}
    page |= {"optimizer": "Ad\u00e4m", "groups": [{"lr": "\u221e"}], "consistency": {"mode": "async"}, "workers": {}}
    page |= {"nonfinite": "refuse", "kernel": "auto", "policy": {}, "parameters": 1, "segments": 1, "bytes": {"p": 4}}
    info = {"farstep": "\u2026", "device": "cpu", "optimizers": [], "sessions": 1, "parameter_bytes": 4}
    body = page if "show" in verb else [page] if "ls" in verb else {**info, "authentication": False}
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "40"}
    done = farstep(*verb, env={**env, "FARSTEP_SERVER": impostor(json.dumps(body), kind="application/json")})
    assert "Traceback" not in done.stderr
    assert "UnicodeEncodeError" not in done.stderr
    assert done.stdout.isascii() or "show" in verb  # which click writes in UTF-8
    if "status" not in verb:  # which asks for two documents, and gets one of them twice
        assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr
