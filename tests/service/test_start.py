"""How a server starts, what it refuses to start with, and how it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest

from farstep.errors import InvalidOption
from farstep_service.cli.serve import banner, check_private, tokens_of
from farstep_service.machine import usable_cpus
from farstep_service.server import Listening
from farstep_service.server.process import tune_
from farstep_service.server.socket_file import bind, url_of
from farstep_service.settings import Settings
from tests.support.service.servers import GONE_WITHIN_S, READY_WITHIN_S, TOKEN, RunningServer, farstep, running_server

OTHER_TOKEN = "fedcba9876543210fedcba9876543210"
OWN = os.geteuid()


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """Check that a start was refused with one clear line, a remedy where there is one, and status 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) in (1, 2), done.stderr
    assert lines[0].startswith("error ")
    for each in said:
        assert each in done.stderr


def get(server: RunningServer, path: str, token: str | None = None) -> int:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.get(server.url + path, headers=headers, trust_env=False).status_code


# -- addresses and tokens


@pytest.mark.promise("On another address than loopback a server refuses to start without a token.", area="security")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "some-name", ""])
def test_another_address_than_loopback_needs_a_token(host: str) -> None:
    """Without a token and without --insecure-no-auth, only loopback is listened on."""
    assert_refused(farstep("serve", "--host", host), "without a token", "FARSTEP_TOKEN", "--insecure-no-auth")


def test_loopback_needs_no_token(server: RunningServer) -> None:
    """On loopback, which is the default, anyone on the machine may speak."""
    assert server.said["address"] == "127.0.0.1"
    assert server.said["tokens"] == 0
    assert get(server, "/v1/info") == 200


def test_a_token_opens_every_address() -> None:
    """With a token a server listens on all addresses and asks everyone for it, except about its health."""
    with running_server("--host", "0.0.0.0", token=TOKEN) as server:
        assert server.said["address"] == "0.0.0.0"
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert get(server, "/healthz") == 200
        assert get(server, "/v1/info") == 401
        assert get(server, "/v1/info", OTHER_TOKEN) == 401
        assert get(server, "/v1/info", TOKEN) == 200


def test_insecure_means_what_it_says() -> None:
    """--insecure-no-auth, here from its variable, listens on all addresses and asks nobody for a token."""
    with running_server(env={"FARSTEP_SERVE_HOST": "0.0.0.0", "FARSTEP_SERVE_INSECURE_NO_AUTH": "1"}) as server:
        assert server.said["address"] == "0.0.0.0"
        assert get(server, "/v1/info") == 200


def test_tokens_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    """Those of the file and the one of the environment are all accepted."""
    file = tmp_path / "tokens"
    file.write_text(f"# workers\n\n{OTHER_TOKEN}  \n{TOKEN}\n")
    file.chmod(0o600)
    with running_server("--token-file", str(file), token=f"{TOKEN}\n") as server:
        assert server.said["tokens"] == 2
        assert get(server, "/v1/info") == 401
        assert get(server, "/v1/info", TOKEN) == 200
        assert get(server, "/v1/info", OTHER_TOKEN) == 200
        assert TOKEN not in server.log


@pytest.mark.parametrize(
    "content", [b"", b"\n# nothing\n", b"\xff\xfe", b"a-few-words\n", b"two tokens, on one line\n", None]
)
def test_a_bad_token_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A token file that is missing, empty or not text, and a token that is short or cannot be sent, end the start."""
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    assert_refused(farstep("serve", "--token-file", str(file)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o642, 0o644, 0o620, 0o602, 0o660, 0o666, 0o610])
def test_a_token_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    """As with the keys of ssh: others who may read it are as good as their tokens; who may write lets himself in."""
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    file.chmod(mode)
    with pytest.raises(InvalidOption, match=f"mode {mode:04o}") as caught:
        tokens_of("", file)
    assert caught.value.remedy == f"Run: chmod 600 {file}"
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "mode", "owner", "refused", "warned"),
    [
        ("/run/secrets/tokens", 0o444, 0, False, False),
        ("/var/run/secrets/tokens", 0o444, OWN, False, False),
        ("/run/secrets/tokens", 0o666, 0, True, False),
        ("/etc/farstep/tokens", 0o640, 0, OWN == 0, False),
        ("/etc/farstep/tokens", 0o644, 0, OWN == 0, OWN != 0),
        ("/etc/farstep/tokens", 0o642, 0, True, False),
        ("/etc/farstep/tokens", 0o600, OWN + 1, True, False),
        ("/etc/farstep/tokens", 0o600, OWN, False, False),
        ("/home/run/secrets/tokens", 0o444, OWN, True, False),
    ],
)
def test_secrets_of_containers_are_as_their_runtime_makes_them(
    capsys: pytest.CaptureFixture[str], path: str, mode: int, owner: int, refused: bool, warned: bool
) -> None:
    """In `/run/secrets` all may read; what is root's need not be ours; what all may read there is warned about."""
    found = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))
    with pytest.raises(InvalidOption) if refused else nullcontext():
        check_private(Path(path), found)
    assert ("every user of this machine can read" in capsys.readouterr().err) == warned


def test_a_directory_is_no_token_file(tmp_path: Path) -> None:
    """The error names the file."""
    assert_refused(farstep("serve", "--token-file", str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize(
    "token", [f"{TOKEN},{OTHER_TOKEN}", f"{TOKEN} {OTHER_TOKEN}", "schlüssel-schlüssel", "a-few-words"]
)
def test_the_environment_holds_one_token(token: str) -> None:
    """FARSTEP_TOKEN is one token of 16 characters or more that a header can carry; the error does not show it."""
    done = farstep("serve", env={"FARSTEP_TOKEN": token})
    assert_refused(done, "openssl rand -hex 32")
    assert token not in done.stderr


@pytest.mark.parametrize(("host", "address"), [("localhost", None), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_the_url_is_one_that_can_be_reached(host: str, address: str | None) -> None:
    """A client on this machine reaches the URL, also where the server listens on all addresses."""
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with bind(host, 0) as sock:
        url = httpx.URL(url_of(sock))
        assert address in (None, url.netloc.decode().rpartition(":")[0])
        with socket.create_connection((url.host, url.port or 0), timeout=GONE_WITHIN_S):
            pass


# -- ports, devices and limits


@pytest.fixture
def taken() -> Iterator[int]:
    """Return a port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


@pytest.mark.promise("A second server does not take the port or the socket of the first.", area="start and shutdown")
def test_a_port_that_is_taken_is_refused(taken: int) -> None:
    """The error names the port and suggests another."""
    assert_refused(farstep("serve", "--port", str(taken)), f"port {taken}", "--port")


def test_a_refusal_is_json_when_asked(taken: int) -> None:
    """With --json a refusal is one problem document on the standard output."""
    done = farstep("serve", "--port", str(taken), "--json")
    assert done.returncode == 2
    assert done.stderr == ""
    problem = json.loads(done.stdout)
    assert problem["code"] == "invalid_option"
    assert problem["field"] == "port"


def test_an_address_of_another_machine_is_refused() -> None:
    """An address that this machine does not have (192.0.2.0/24 is nobody's) cannot be listened on."""
    assert_refused(farstep("serve", "--host", "192.0.2.7", "--insecure-no-auth"), "192.0.2.7")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:-1", "CPU", ""])
def test_a_device_that_there_cannot_be_is_refused(device: str) -> None:
    """The error names the devices that there are."""
    assert_refused(farstep("serve", "--port", "0", "--device", device), "device", "cuda")


def test_a_device_that_this_machine_has_not_is_refused() -> None:
    """The hundredth GPU, or any GPU where there is none, is refused with the count of those that are there."""
    assert_refused(farstep("serve", "--port", "0", "--device", "cuda:99"), "cuda:99", "--device cpu")


@pytest.mark.parametrize(
    "option",
    [
        "--max-gib=nan",
        "--max-gib=inf",
        "--max-gib=0",
        "--max-session-gib=-1",
        "--port=70000",
        "--threads=0",
        "--port=x",
    ],
)
def test_a_number_out_of_range_is_refused(option: str) -> None:
    """A limit that is no number, or out of range, ends the start without a traceback."""
    done = farstep("serve", option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_what_kubernetes_sets_is_not_mistaken_for_an_option() -> None:
    """FARSTEP_PORT, which Kubernetes sets beside a service called farstep, does nothing; FARSTEP_SERVE_PORT is ours."""
    env = {"FARSTEP_PORT": "tcp://10.0.0.1:7171", "FARSTEP_SERVICE_PORT": "7171", "FARSTEP_SERVE_PORT": "0"}
    with running_server(port=None, env={**env, "FARSTEP_SERVE_DEVICE": ""}) as server:
        assert server.port not in (0, 7171)
        assert server.said["device"] == "cpu"


# -- what a server says of itself


def listening(address: str) -> Listening:
    return Listening(
        url="http://127.0.0.1:7171",
        address=address,
        port=7171,
        device="cuda:1",
        steps=2,
        threads=4,
        kernels="fused kernels",
    )


@pytest.mark.parametrize(
    ("address", "tokens", "auth"),
    [
        ("127.0.0.1", (), "off: loopback only"),
        ("127.0.0.1", (TOKEN,), "on: 1 token"),
        ("0.0.0.0", (TOKEN, OTHER_TOKEN), "on: 2 tokens"),
        ("0.0.0.0", (), "OFF: anyone who reaches this machine"),
    ],
)
def test_the_banner_has_six_lines_at_most(address: str, tokens: tuple[str, ...], auth: str) -> None:
    """It tells URL, device, docs, who may speak, and what becomes of the data, and shows no token."""
    lines = banner(listening(address), Settings(host=address, tokens=tokens, insecure_no_auth=True))
    text = "\n".join(lines)
    assert len(lines) <= 6
    assert "http://127.0.0.1:7171" in lines[0]
    assert ("0.0.0.0" in lines[0]) == (address == "0.0.0.0")
    for each in ("cuda:1", "fused kernels", "http://127.0.0.1:7171/docs", auth, "memory only"):
        assert each in text
    assert TOKEN not in text


def test_a_person_sees_the_banner() -> None:
    """Without --json the banner is all that stands on the standard output."""
    command = [sys.executable, "-m", "farstep_service", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.terminate()
        rest, errors = process.communicate(timeout=GONE_WITHIN_S)
    assert first.startswith("farstep ")
    assert len(rest.splitlines()) <= 5
    assert process.returncode == 0
    assert errors == ""


# -- threads


def test_steps_share_the_cpus() -> None:
    """Each of the steps that may run at once gets its share of the CPUs, and its threads sleep when idle."""
    for steps in (1, 2, 1000):
        environment: dict[str, str] = {"OMP_NUM_THREADS": ""}
        tune_(environment, steps)
        threads = str(max(1, usable_cpus() // steps))
        assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, "THP_MEM_ALLOC_ENABLE": "1"}


def test_threads_that_the_user_chose_stay() -> None:
    """Variables that are set already are left alone."""
    chosen = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3", "THP_MEM_ALLOC_ENABLE": "0"}
    environment = dict(chosen)
    tune_(environment, 2)
    assert environment == chosen


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("50000 100000\n", 1), ("100000 100000\n", 1), ("max 100000\n", None), ("odd\n", None), (None, None)],
)
def test_a_container_has_the_cpus_of_its_quota(tmp_path: Path, quota: str | None, cpus: int | None) -> None:
    """A control group's quota counts, rounded up; without one the process has the CPUs it may run on."""
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    assert usable_cpus(file) == (cpus or len(os.sched_getaffinity(0)))


def test_the_server_runs_with_the_threads_chosen(server: RunningServer) -> None:
    """In the server torch has the threads of the arithmetic above."""
    assert server.said["steps"] == Settings().threads
    assert server.said["threads"] == max(1, usable_cpus() // Settings().threads)


# -- leaving


@pytest.mark.promise(
    "SIGTERM and Ctrl-C end a server in order; a closed terminal does not end it.",
    area="start and shutdown",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_in_good_order(number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it with status 0 and without complaint, although a client keeps a connection open."""
    with running_server() as server, httpx.Client(trust_env=False) as client:
        assert client.get(server.url + "/healthz").status_code == 200
        server.process.send_signal(number)
        assert server.process.wait(GONE_WITHIN_S) == 0
        assert server.log == ""


def test_a_signal_ends_a_server_that_is_still_loading() -> None:
    """A server that is stopped while it loads ends with status 0 as well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    command = [sys.executable, "-m", "farstep_service", "serve", "--port", str(address[1])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + READY_WITHIN_S
        reached = False
        while not reached and time.monotonic() < until:
            with socket.socket() as sock:
                reached = sock.connect_ex(address) == 0
        process.terminate()
        _, errors = process.communicate(timeout=GONE_WITHIN_S)
    assert reached
    assert (process.returncode, errors) == (0, "")


@pytest.mark.promise(
    "A server that was killed comes back at its port and its socket at once.",
    area="start and shutdown",
)
def test_a_killed_server_comes_back_on_its_port() -> None:
    """After SIGKILL the port is free at once, and the same command serves there again."""
    with running_server() as server:
        url, pid = server.url, server.pid
        server.kill()
        with pytest.raises(httpx.ConnectError):
            get(server, "/healthz")
        server.restart()
        assert (server.url, server.said["pid"]) == (url, server.pid)
        assert server.pid != pid
        assert get(server, "/healthz") == 200


# -- the collector


def test_what_is_loaded_is_left_alone_by_the_collector() -> None:
    """What a server consists of is no longer looked at, and the collector runs again, also after loading failed."""
    program = (
        "import gc\n"
        "from farstep_service.server.process import GARBAGE, loaded_for_good\n"
        "try:\n"
        "    with loaded_for_good(): raise OSError\n"
        "except OSError: print(gc.isenabled(), gc.get_freeze_count())\n"
        "with loaded_for_good():\n"
        "    print(gc.isenabled())\n"
        "    loaded = [[] for _ in range(1000)]\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000, gc.get_threshold() == GARBAGE)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["True 0", "False", "True True True"]


# -- signals

INTERRUPTED_WHILE_LOADING = """
import signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from farstep_service.cli import main
main()
"""


@pytest.mark.promise(
    "SIGTERM and Ctrl-C end a server in order; a closed terminal does not end it.",
    area="start and shutdown",
)
def test_a_closed_terminal_ends_no_server() -> None:
    """After SIGHUP the server answers as before, and has said so; SIGTERM still ends it."""
    with running_server() as server:
        server.process.send_signal(signal.SIGHUP)
        assert get(server, "/healthz") == 200
        assert server.process.poll() is None
        assert server.stop() == 0
        assert "SIGHUP: the server goes on" in server.log


def test_an_ignored_hangup_stays_ignored() -> None:
    """Under nohup the signal is nobody's, and nothing is said of it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running_server() as server:
            server.process.send_signal(signal.SIGHUP)
            assert get(server, "/healthz") == 200
            assert server.stop() == 0
            assert "SIGHUP" not in server.log
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_a_server_without_a_traceback() -> None:
    """The first Ctrl-C waits for a request in flight, the second does not; both are no defect to be written down."""
    head = (
        b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    )
    with running_server() as server, socket.create_connection(("127.0.0.1", server.port), GONE_WITHIN_S) as waiting:
        waiting.sendall(head)
        assert get(server, "/healthz") == 200
        server.process.send_signal(signal.SIGINT)
        until = time.monotonic() + GONE_WITHIN_S
        while time.monotonic() < until:  # it accepts nothing more once it has heard the first
            with socket.socket() as asking:
                if asking.connect_ex(("127.0.0.1", server.port)):
                    break
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(GONE_WITHIN_S) == 0
        assert "Traceback" not in server.log


def test_an_interrupt_while_modules_are_loaded_says_nothing() -> None:
    """Ctrl-C at the very start of any verb ends it as it ends other programs."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_LOADING, "--version"], capture_output=True, timeout=READY_WITHIN_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
