"""`farstep launch` with real processes: the variables of workers, their output, and how they end.

Most scripts need no server: an address at which none listens is enough.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.support.launch.launching import LIMIT_S, NO_SERVER, Gone, heard, launching, said, watcher_of
from tests.support.service.servers import TOKEN, farstep, running_server

PAUSE = "import signal; signal.pause()"

TRAINING = """
import os, signal
import torch, farstep

me = farstep.worker()
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
optimizer = farstep.optim.Adagrad(model.parameters(), lr=0.1, kernel="reference",
                                  consistency=farstep.Sync(workers=me.count, deadline_s=50))
print("from", optimizer.version, flush=True)
while optimizer.version < 12:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * optimizer.version + me.rank))
    optimizer.zero_grad()
    model(x).pow(2).sum().backward()
    if (me.rank, me.restart, optimizer.version) == (1, 0, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
print("until", optimizer.version, sum(p.double().sum().item() for p in model.parameters()), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Name a file for a script."""
    return tmp_path / "train.py"


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "`farstep launch` starts a failed worker again, and training ends as if nothing had happened.",
    area="launch",
)
def test_a_worker_that_is_killed_is_started_again_and_training_ends_as_if_nothing_had_happened(script: Path):
    """On a server of the launch's own a run in which a worker was killed ends with the bits of torch in one place."""
    script.write_text(TRAINING)
    done = farstep("launch", "-n", "2", str(script))
    assert done.returncode == 0, done.stderr
    assert "launch | w1 was ended by SIGKILL; restart 1 of 3" in done.stderr
    assert said(done.stdout, "w1")[:2] == ["from 0", "from 5"]
    last = f"until 12 {sum(p.double().sum().item() for p in undisturbed().parameters())}"
    assert [said(done.stdout, name)[-1] for name in ("w0", "w1")] == [last, last]


def undisturbed() -> torch.nn.Module:
    """Return the model after the same training by torch in one place."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, foreach=False)
    for version in range(12):
        gradients = []
        for rank in range(2):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * version + rank))
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for p, first, second in zip(model.parameters(), *gradients, strict=True):
            assert first is not None
            assert second is not None
            p.grad = (first + second) / 2
        optimizer.step()
    return model


SERVER_PID = """
import os, signal, socket, struct
import torch, farstep
farstep.optim.SGD([torch.zeros(3, requires_grad=True)])
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["FARSTEP_SERVER"].removeprefix("unix://"))
pid, _, _ = struct.unpack("3i", server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
print(pid, flush=True)
signal.pause()
"""
"""Prints the process that listens at the launch's own socket, as the kernel knows it."""


def test_the_end_of_the_server_ends_the_run(script: Path):
    """Without the launch's own server there is nothing to go on with: workers are ended, the exit code is 1."""
    script.write_text(SERVER_PID)
    with launching("-n", "1", str(script)) as process:
        assert process.stdout is not None
        os.kill(int(process.stdout.readline().rpartition("|")[2]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "the server was ended by SIGKILL; its sessions are gone" in stderr


@pytest.mark.parametrize(("token", "stranger"), [(TOKEN, "refused"), (None, "let in")])
def test_a_server_of_its_own_asks_for_the_token(script: Path, token: str | None, stranger: str):
    """With `FARSTEP_TOKEN` set its workers have it, and another token is refused; unset, any client may join."""
    script.write_text(
        "import torch, farstep\n"
        "for options in ({}, {'token': 'another' * 4}):\n"
        "    try:\n"
        "        farstep.optim.SGD([torch.zeros(3, requires_grad=True)], **options)\n"
        "        print('let in', flush=True)\n"
        "    except farstep.errors.Unauthorized:\n"
        "        print('refused', flush=True)\n"
    )
    done = farstep("launch", str(script), env={"FARSTEP_TOKEN": token} if token else {})
    assert done.returncode == 0, done.stderr
    assert said(done.stdout, "w0") == ["let in", stranger]


def test_a_server_that_cannot_start_says_why(script: Path):
    """The errors of the launch's own server appear before the end of the run."""
    script.write_text(PAUSE)
    done = farstep("launch", str(script), env={"FARSTEP_TOKEN": "short"})
    assert done.returncode == 1
    assert "error invalid_option: A token is shorter than 16 characters." in said(done.stderr, "server")
    assert "the server ended with exit code 2" in done.stderr


def test_a_session_on_a_named_server_stays(script: Path):
    """When the workers have finished, the session is still there at its version, and another launch goes on with it."""
    script.write_text(
        "import torch, farstep\n"
        "p = torch.zeros(3, requires_grad=True)\n"
        "p.grad = torch.ones(3)\n"
        "optimizer = farstep.optim.SGD([p], lr=1.0)\n"
        "print('from', optimizer.version, p.tolist(), flush=True)\n"
        "for _ in range(3): optimizer.step()\n"
        "optimizer.close()\n"
    )
    with running_server(loaded=True) as server:
        for began in ("from 0 [0.0, 0.0, 0.0]", "from 3 [-3.0, -3.0, -3.0]"):
            done = farstep("launch", "--server", server.url, "--session", "stays", str(script))
            assert done.returncode == 0, done.stderr
            assert said(done.stdout, "w0") == [began]
        (found,) = json.loads(farstep("sessions", "ls", "--json", "--server", server.url).stdout)
        assert (found["name"], found["version"], found["workers"]) == ("stays", 6, {})


# -- what workers get ------------------------------------------------------------------------------------------------


def test_the_variables_of_workers(script: Path):
    """Arguments after the script are its own, options included; workers inherit the token and other variables."""
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k.startswith('FARSTEP_')}]))"
    )
    done = farstep(
        "launch",
        *NO_SERVER,
        "--session",
        "run",
        "-n",
        "2",
        str(script),
        "-n",
        "7",
        "--lr=1",
        env={"FARSTEP_TOKEN": "secret"},
    )
    for name in ("w0", "w1"):
        arguments, variables = json.loads(said(done.stdout, name)[0])
        variables.pop("FARSTEP_KERNEL_CACHE", None)  # the run of tests may set it
        assert arguments == ["-n", "7", "--lr=1"]
        assert variables == {
            "FARSTEP_SERVER": "http://127.0.0.1:9",
            "FARSTEP_SESSION": "run",
            "FARSTEP_RUN": "run",
            "FARSTEP_TOKEN": "secret",
            "FARSTEP_WORKER": name,
            "FARSTEP_RESTART": "0",
        }


def test_modules_and_programs():
    """`-m` runs a module and `--no-python` a program, as with torchrun; one that does not exist is reported."""
    assert said(farstep("launch", *NO_SERVER, "-m", "calendar", "2026", "1").stdout, "w0")[0].strip() == "January 2026"
    assert said(farstep("launch", *NO_SERVER, "--no-python", "echo", "hello").stdout, "w0") == ["hello"]
    missing = farstep("launch", *NO_SERVER, "--max-restarts", "0", "--no-python", "./not-there")
    assert missing.returncode == 127
    assert said(missing.stderr, "w0") == ["Cannot run ./not-there: No such file or directory."]


# -- what is seen ----------------------------------------------------------------------------------------------------


def test_lines_of_workers_are_whole_and_named(script: Path):
    """Lines written in pieces by several workers at once come out whole, each under its worker's name and stream."""
    script.write_text(
        "import os, sys\n"
        "for number in range(200):\n"
        "    for stream in (sys.stdout, sys.stderr):\n"
        "        for piece in ('a' * 30, 'b' * 30, f'{number}\\n'):\n"
        "            stream.write(piece); stream.flush()\n"
        "sys.stdout.write('no end')\n"
    )
    done = farstep("launch", *NO_SERVER, "-n", "3", str(script))
    whole = ["a" * 30 + "b" * 30 + str(number) for number in range(200)]
    for name in ("w0", "w1", "w2"):
        assert said(done.stdout, name) == [*whole, "no end"]
        assert said(done.stderr, name) == whole
    assert all(line.startswith("launch | ") or " | a" in line for line in done.stderr.splitlines())


def test_a_launch_ends_with_the_reader_of_its_output(script: Path):
    """When the process that reads the output has ended, so do the workers and the launch."""
    script.write_text("import os\nprint(os.getpid(), flush=True)\nwhile True: print('more', flush=True)")
    with launching(*NO_SERVER, str(script)) as process:
        assert process.stdout is not None
        gone = Gone(int(process.stdout.readline().split()[-1]))
        process.stdout.close()
        assert process.wait(LIMIT_S) == 141
    assert gone()


# -- how they end ----------------------------------------------------------------------------------------------------


def test_the_limit_of_restarts(script: Path):
    """A worker that fails again and again ends the run with its exit code, and the others with it."""
    script.write_text(
        "import os, signal, sys\n"
        "print('life', os.environ['FARSTEP_RESTART'], flush=True)\n"
        "sys.exit(7) if os.environ['RANK'] == '1' else signal.pause()\n"
    )
    done = farstep("launch", *NO_SERVER, "-n", "2", "--max-restarts", "2", "--json", str(script))
    assert done.returncode == 7
    assert said(done.stdout, "w1") == ["life 0", "life 1", "life 2"]
    assert "launch | w1 ended with exit code 7, after 2 restarts; all others are ended" in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["code"], summary["restarts"], summary["codes"]) == (7, {"w0": 0, "w1": 2}, {"w0": 143, "w1": 7})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_handed_on(script: Path, number: signal.Signals):
    """Each worker gets the signal and may end as it likes; none is restarted, and the exit code names the signal."""
    script.write_text(
        "import signal, sys\n"
        "def leave(number, _):\n"
        "    print('got', number, flush=True); sys.exit(1)\n"
        f"signal.signal({int(number)}, leave)\n"
        "print('here', flush=True); signal.pause()\n"
    )
    with launching(*NO_SERVER, "-n", "2", str(script)) as process:
        heard(process, "w0     | here", "w1     | here")
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=LIMIT_S)
    assert sorted(stdout.splitlines()) == [f"w0     | got {int(number)}", f"w1     | got {int(number)}"]
    assert process.returncode == 128 + number


@pytest.mark.parametrize("again", [True, False])
def test_a_worker_that_does_not_listen_is_killed(script: Path, again: bool):
    """A worker that ignores the signal is killed by a second one, or when the time is up."""
    script.write_text(
        "import signal\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "print('here', flush=True)\n"
        "while True: signal.pause()\n"
    )
    with launching(*NO_SERVER, "--shutdown-timeout", "1000" if again else "0.1", str(script)) as process:
        heard(process, "w0     | here")
        process.send_signal(signal.SIGINT)
        if again:
            assert process.stderr is not None
            while "SIGINT" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            assert "launch | got SIGINT, which kills all workers" in process.communicate(timeout=LIMIT_S)[1]
        assert process.wait(LIMIT_S) == 130


@pytest.mark.promise("No process of a launch outlives it, also if it is killed.", area="launch")
@pytest.mark.parametrize("how", ["worker ends", "launch is killed"])
def test_no_process_is_left(script: Path, how: str):
    """Processes that a worker started end with it, and workers end with a launcher that SIGKILL killed."""
    script.write_text(
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {PAUSE!r}])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        f"{PAUSE}\n"
    )
    with launching(*NO_SERVER, "--max-restarts", "0", str(script)) as process:
        assert process.stdout is not None
        worker, child = map(int, process.stdout.readline().split()[-2:])
        worker_gone, child_gone = Gone(worker), Gone(child)
        if how == "worker ends":
            os.kill(worker, signal.SIGKILL)
            assert child_gone()
            assert process.wait(LIMIT_S) == 137
        else:
            process.kill()
            assert child_gone()
        assert worker_gone()


@pytest.mark.promise("No process of a launch outlives it, also if it is killed.", area="launch")
def test_a_killed_launch_leaves_no_directory(script: Path) -> None:
    """With a server of its own, SIGKILL of the launcher ends the server and removes the directory of its socket."""
    script.write_text(
        "import os, signal\nprint(os.environ['FARSTEP_SERVER'], os.getpid(), flush=True)\nsignal.pause()\n"
    )
    with launching(str(script), env={"TMPDIR": "/tmp"}) as process:
        assert process.stdout is not None
        server, worker = process.stdout.readline().split()[-2:]
        directory = Path(server.removeprefix("unix://")).parent
        assert directory.is_dir()
        worker_gone = Gone(int(worker))
        watcher_gone = Gone(watcher_of(process.pid))
        process.kill()
        assert worker_gone()
        assert watcher_gone()
    assert not directory.exists()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "ftp://box", __file__], "Invalid server: 'ftp://box'."),
        (["--session", "no spaces", __file__], "Invalid session: 'no spaces'."),
        (["--nnodes", "2", __file__], "Workers on 2 machines need a server and a session"),
        (["--nnodes", "2", "--server", "http://box:1", __file__], "Add --server and --session."),
        (["--node-rank", "1", __file__], "Invalid node_rank: 1"),
        (["-m", "--no-python", "x"], "A module is run by Python."),
        (["./not-there.py"], "There is no file './not-there.py'."),
        (["-n", "0", __file__], "-n"),
        (["--replicas", "3", __file__], "--replicas"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str):
    """Options that contradict themselves, and unknown ones, are refused before anything is started."""
    began = time.monotonic()
    done = farstep("launch", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "launch |" not in done.stderr
    assert time.monotonic() - began < LIMIT_S
