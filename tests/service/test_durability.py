"""The levels of durability as a server takes, shows and refuses them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, OptionsDiffer
from farstep.protocol.durability import Durability, from_text, to_document, to_text
from farstep_service.cli.serve import banner
from farstep_service.server import Listening
from farstep_service.settings import Settings
from tests.support.service.raw import RawClient
from tests.support.service.servers import RunningServer, running_server
from tests.support.service.servers import farstep as run_farstep

GROUP = farstep.Journal(sync="group")


def join(talk: Conversation, name: str, durability: Durability | None = None) -> dict[str, Any]:
    """Join a session of one parameter, and return the answer."""
    document: dict[str, Any] = {
        "name": name,
        "worker": "w0",
        "optimizer": "SGD",
        "groups": [{"lr": 0.5}],
        "segments": [{"name": "weight", "shape": [3], "dtype": "float32"}],
    }
    if durability is not None:
        document["durability"] = to_document(durability)
    return talk.control("POST", "/v1/sessions", document)


@pytest.fixture
def memory(server: RunningServer) -> Iterator[Conversation]:
    """Speak with a server that has no data directory."""
    conversation = Conversation(server.url, None)
    yield conversation
    conversation.close()


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server with a data directory."""
    with running_server("--data-dir", str(tmp_path_factory.mktemp("data")), loaded=True) as running:
        yield running


@pytest.fixture
def talk(keeping: RunningServer) -> Iterator[Conversation]:
    """Speak with that server."""
    conversation = Conversation(keeping.url, None)
    yield conversation
    conversation.close()


# -- with a directory, and without


@pytest.mark.promise(
    "A server without a data directory refuses what it cannot keep, with the remedy.", area="sessions and files"
)
@pytest.mark.parametrize("level", [farstep.Snapshot(), farstep.Journal(), GROUP])
def test_without_a_directory_only_memory_is_possible(memory: Conversation, level: Durability) -> None:
    """A session that asks for a disk is refused with the remedy, and none is created."""
    with pytest.raises(InvalidOption, match="no data directory") as refused:
        join(memory, "kept", level)
    assert (refused.value.field, refused.value.side) == ("durability", "server")
    assert "--data-dir" in refused.value.remedy
    assert "kept" not in [each["name"] for each in memory.control("GET", "/v1/sessions")]  # type: ignore[index]


def test_without_a_directory_sessions_are_in_memory(memory: Conversation) -> None:
    """A session that names no level has none there, and so has one that asks for none."""
    levels: dict[str, Durability | None] = {"unnamed": None, "named": "none"}
    for name, level in levels.items():
        assert join(memory, name, level)["durability"] == "none"
        assert memory.control("GET", f"/v1/sessions/{name}")["durability"] == "none"
        memory.control("DELETE", f"/v1/sessions/{name}")


def test_with_a_directory_a_session_is_journaled(talk: Conversation) -> None:
    """A session that names no level has a journal on a server with a data directory, and its listing says so."""
    assert join(talk, "default")["durability"] == "journal:os"
    assert talk.control("GET", "/v1/sessions/default")["durability"] == "journal:os"


@pytest.mark.parametrize("text", ["none", "snapshot:every_steps=100,every_s=60", "journal:group", "journal:always"])
def test_a_session_has_the_level_that_its_creator_names(talk: Conversation, text: str) -> None:
    """The level of the creation is in the answer, in the session's document and in the list of sessions."""
    name = text.replace(":", "-").replace("=", "-").replace(",", "-")
    assert join(talk, name, from_text(text))["durability"] == text
    assert talk.control("GET", f"/v1/sessions/{name}")["durability"] == text
    listed: Any = talk.control("GET", "/v1/sessions")
    assert {each["name"]: each["durability"] for each in listed}[name] == text


@pytest.mark.promise("Workers join a session with its level of durability, or name none.", area="sessions and files")
def test_another_level_than_the_sessions_is_refused(talk: Conversation) -> None:
    """A worker that names no level takes the session's; one that names another is told both."""
    join(talk, "grouped", GROUP)
    assert join(talk, "grouped")["durability"] == "journal:group"
    assert join(talk, "grouped", GROUP)["durability"] == "journal:group"
    others: list[Durability] = [farstep.Journal(), farstep.Snapshot(every_steps=5), "none"]
    for other in others:
        with pytest.raises(OptionsDiffer, match=f"durability is journal:group, not {to_text(other)}"):
            join(talk, "grouped", other)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"level": "disk"}, "durability"),
        ({"level": "journal", "sync": "fsync"}, "sync"),
        ({"level": "journal", "sink": "os"}, "sink"),
        ({"level": "snapshot", "every_steps": 0}, "every_steps"),
        ({"level": "snapshot", "every_s": 1e9}, "every_s"),
        ({}, "durability"),
    ],
)
def test_a_document_out_of_range_is_refused_by_the_server(
    talk: Conversation, document: dict[str, Any], field: str
) -> None:
    """An unknown level or option, or a value out of range, is refused by name, found by the server."""
    whole = {
        "name": "refused",
        "worker": "w0",
        "optimizer": "SGD",
        "groups": [{"lr": 0.5}],
        "segments": [{"name": "weight", "shape": [3], "dtype": "float32"}],
        "durability": document,
    }
    with pytest.raises(InvalidOption) as refused:
        talk.control("POST", "/v1/sessions", whole)
    assert (refused.value.field, refused.value.side) == (field, "server")


def test_every_answer_of_a_write_has_the_level(keeping: RunningServer) -> None:
    """First contents, a push, its repetition, contents and a new group are answered with the level; so are skips."""
    with RawClient(keeping.url) as raw:
        worker = raw.join("answered", durability=to_document(GROUP))
        answers = [
            worker.begin(),
            worker.push([torch.ones(4)]),
            worker.push([torch.ones(4)], seq=2),
            worker.push([None], segments=[], skip=True),
            worker.put({"param": [torch.ones(4)]}),
            worker.append({"late": torch.ones(2)}),
        ]
    assert [answer.status for answer in answers] == [200] * 6
    assert [answer.header["durability"] for answer in answers] == ["journal:group"] * 6


# -- the command line


@pytest.mark.parametrize("level", ["snapshot", "snapshot:every_steps=3", "journal", "journal:group"])
def test_a_default_needs_a_directory(level: str) -> None:
    """`--durability` without `--data-dir` ends the start, and the remedy names the option that is missing."""
    done = run_farstep("serve", "--durability", level)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--data-dir" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--durability", "disk"), "there are none, snapshot, journal"),
        (("--durability", "journal:sometimes"), "os, group, always"),
        (("--max-journal-gib", "0"), "max_journal_gib"),
    ],
)
def test_options_out_of_range_end_the_start(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """An unknown level and a journal without room are refused in a line."""
    done = run_farstep("serve", "--data-dir", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert said in done.stderr


def test_variables_choose_as_options_do(tmp_path: Path) -> None:
    """FARSTEP_SERVE_DATA_DIR and FARSTEP_SERVE_DURABILITY have the effect of the options, and the server says so."""
    environment = {
        "FARSTEP_SERVE_DATA_DIR": str(tmp_path),
        "FARSTEP_SERVE_DURABILITY": "snapshot:every_steps=9",
        "FARSTEP_SERVE_MAX_JOURNAL_GIB": "2",
    }
    with running_server(env=environment, loaded=True) as running:
        assert running.said["data_dir"] == str(tmp_path)
        assert running.said["durability"] == "snapshot:every_steps=9,every_s=60"
        conversation = Conversation(running.url, None)
        assert join(conversation, "default")["durability"] == "snapshot:every_steps=9,every_s=60"
        assert join(conversation, "own", "none")["durability"] == "none"
        conversation.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(), "memory only: sessions end with the server"),
        (Settings(data_dir="/data"), "/data, journal:os for sessions that name no level"),
        (Settings(data_dir="/data", durability=GROUP), "/data, journal:group for sessions that name no level"),
        (Settings(data_dir="/data", durability="none"), "/data, for sessions that ask for it; others end with the"),
    ],
    ids=["memory", "default", "group", "none"],
)
def test_the_banner_says_what_is_kept(settings: Settings, said: str) -> None:
    """The last line of the banner has the directory and the level of sessions that name none."""
    listening = Listening(
        url="http://127.0.0.1:7171", address="127.0.0.1", port=7171, device="cpu", steps=2, threads=1, kernels="fused"
    )
    assert banner(listening, settings)[-1].startswith(f"  data    {said}")


def test_settings_refuse_a_level_without_a_directory() -> None:
    """A record of settings cannot promise what it has no place for."""
    with pytest.raises(InvalidOption, match="no data directory"):
        Settings(durability=farstep.Journal())
    assert Settings().default_durability == "none"
    assert Settings(data_dir="/data").default_durability == farstep.Journal()


def test_the_verbs_show_the_level(keeping: RunningServer, talk: Conversation) -> None:
    """`sessions ls` and `sessions show` have the level as text."""
    join(talk, "shown", GROUP)
    shown = run_farstep("sessions", "show", "shown", "--server", keeping.url, loaded=True).stdout
    assert [line.split() for line in shown.splitlines() if "durability" in line] == [["durability", "journal:group"]]
    listed = run_farstep("sessions", "ls", "--server", keeping.url, loaded=True).stdout.splitlines()
    assert "journal:group" in next(line for line in listed if line.startswith("shown")).split()
    found = json.loads(run_farstep("sessions", "ls", "--json", "--server", keeping.url, loaded=True).stdout)
    assert "journal:group" in [each["durability"] for each in found]
