"""A process that is forked from a loaded one is used as any other: streams, environment, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.loaded import LOADED, Forked
from tests.support.service.servers import farstep, running_server

PROGRAM = """
import json, os, signal, sys
print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), os.getpid(), "torch" in sys.modules]), flush=True)
print("heard", sys.stdin.readline(), file=sys.stderr, end="")
if "stay" in sys.argv: signal.pause()
sys.exit(3)
"""


class Started:
    """A process that runs `PROGRAM`, and the files that it writes to."""

    def __init__(self, place: Path, *arguments: str, answer: str = "") -> None:
        (place / "program.py").write_text(PROGRAM)
        self._output, self._errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        with tempfile.TemporaryFile("w+") as given:
            given.write(answer)
            given.seek(0)
            self.process: Forked = LOADED.start(
                "program",
                arguments,
                {"PLACE": "here"},
                path=str(place),
                stdin=given.fileno(),
                stdout=self._output.fileno(),
                stderr=self._errors.fileno(),
            )

    def texts(self) -> tuple[str, str]:
        """Return what it wrote to its standard output and its standard error, and close both."""
        found = []
        for file in (self._output, self._errors):
            file.seek(0)
            found.append(file.read())
            file.close()
        return found[0], found[1]


def test_it_has_arguments_environment_streams_and_an_exit_code(tmp_path: Path) -> None:
    """It is a process of its own, with modules that it need not import."""
    started = Started(tmp_path, "a", "b c", answer="word\n")
    assert started.process.wait(60) == started.process.poll() == started.process.returncode == 3
    output, errors = started.texts()
    assert json.loads(output) == [["a", "b c"], {"PLACE": "here"}, os.getcwd(), started.process.pid, True]
    assert errors == "heard word\n"


def test_it_is_killed_and_stopped_like_any_other(tmp_path: Path) -> None:
    """A signal ends that process only, and its exit code is the signal's, as of `subprocess`."""
    stay, other = (Started(tmp_path, "stay") for _ in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        stay.process.wait(0.05)
    assert stay.process.poll() is None
    stay.process.kill()
    assert stay.process.wait(60) == -signal.SIGKILL
    assert other.process.poll() is None
    other.process.terminate()
    assert other.process.wait(60) == -signal.SIGTERM
    other.process.terminate()  # which does nothing to one that is gone
    stay.texts()
    other.texts()


def test_servers_and_verbs_do_what_those_from_the_command_line_do() -> None:
    """A server says the same of itself and ends in order; a verb prints the same."""
    with running_server() as first, running_server(loaded=True) as second:
        same = [{**each.said, "url": "", "port": 0, "docs": "", "pid": 0} for each in (first, second)]
        assert same[0] == same[1]
        assert second.said["pid"] == second.pid != first.pid
        there = [farstep("sessions", "ls", "--server", second.url, loaded=loaded) for loaded in (False, True)]
        assert there[0].stdout == there[1].stdout
        assert (second.stop(), second.log) == (0, "")
        second.restart()
        second.kill()
        assert second.process.returncode == -signal.SIGKILL
