"""Sessions in an object store, which is a process here (`moto_server`): lost with their disk, and back from there."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidRequest, StateRolledBack
from tests.robustness.archiving import OFTEN, STEPS, Training, archived, files_below, until, view
from tests.support.durability.object_store import ObjectStore, running_store
from tests.support.service.servers import farstep as run_farstep
from tests.support.service.servers import running_server

LEVELS: dict[str, Any] = {
    "journal": farstep.Journal(sync="os"),
    "snapshot": farstep.Snapshot(every_steps=100, every_s=None),
}


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    """Run an object store."""
    with running_store() as running:
        yield running


@pytest.mark.promise("A session comes back from an object store when the server's disk is lost.", area="durability")
@pytest.mark.parametrize("level", LEVELS)
def test_a_session_comes_back_from_an_object_store(level: str, store: ObjectStore, tmp_path: Path) -> None:
    """Killed, and its directory gone: the session is restored at a version it had, workers are told, and go on.

    Momentum comes back, too: the rest of the training has the bits of one that was not disturbed.
    """
    data = tmp_path / "data"
    arguments = ("--data-dir", str(data), "--archive", store.url, *OFTEN)
    with running_server(*arguments, env=store.environment, loaded=True) as server:
        calm = Training(server.url, "calm", "none").run(STEPS + 20)
        training = Training(server.url, durability=LEVELS[level]).run()
        archived(server, STEPS // 2)
        server.kill()
        shutil.rmtree(data)
        done = run_farstep(
            "sessions", "restore", store.url, "--data-dir", str(data), env=store.environment, loaded=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        server.restart()
        with pytest.raises(StateRolledBack):
            training.step(STEPS + 1)
        version = view(server)["version"]
        assert STEPS // 2 <= version <= STEPS
        training.optimizer.rejoin()
        assert torch.equal(training.parameters, calm.versions[version])
        for number in range(version + 1, STEPS + 21):
            training.step(number)
        assert torch.equal(training.parameters, calm.versions[STEPS + 20])
        archived(server, version)


def test_an_end_in_order_leaves_the_last_version_in_the_archive(store: ObjectStore, tmp_path: Path) -> None:
    """SIGTERM: the snapshot of the end is copied before the server exits with 0, and it names no lost step."""
    arguments = ("--data-dir", str(tmp_path / "a"), "--archive", store.url)
    with running_server(*arguments, env=store.environment, loaded=True) as server:
        training = Training(server.url).run(5)
        training.close()
        assert server.stop() == 0
    done = run_farstep(
        "sessions", "restore", store.url, "--data-dir", str(tmp_path / "b"), env=store.environment, loaded=True
    )
    assert "version 5, and 0 events" in done.stdout
    with running_server("--data-dir", str(tmp_path / "b"), loaded=True) as server:
        assert view(server)["version"] == 5


def test_closed_segments_follow_before_the_next_snapshot(store: ObjectStore, tmp_path: Path) -> None:
    """The archive has more than its newest snapshot: events of segments that were closed since happen again."""
    data = tmp_path / "data"
    with running_server("--data-dir", str(data), "--archive", store.url, env=store.environment, loaded=True) as server:
        training = Training(server.url).run(200)  # far fewer than what makes a snapshot due
        until(lambda: True if sum(each.endswith(".segment") for each in store.names()) >= 4 else None)
        assert view(server)["archived_version"] == 0
        server.kill()
    shutil.rmtree(data)
    done = run_farstep("sessions", "restore", store.url, "--data-dir", str(data), env=store.environment, loaded=True)
    assert done.returncode == 0, done.stderr
    with running_server("--data-dir", str(data), loaded=True) as server:
        version = view(server)["version"]
        assert 100 <= version <= 200
        copy = Training(server.url)
        assert torch.equal(copy.parameters, training.versions[version])


@pytest.mark.promise("An archive that fails stops no step, and catches up by itself.", area="durability")
def test_a_store_that_is_gone_fails_no_step_and_is_caught_up_with(store: ObjectStore, tmp_path: Path) -> None:
    """A store that refuses connections is one warning in the log; a store that is back gets all that is on the disk.

    What it lost meanwhile is found missing and copied again.
    """
    arguments = ("--data-dir", str(tmp_path / "data"), "--archive", store.url, *OFTEN)
    with running_server(*arguments, env=store.environment, loaded=True) as server:
        training = Training(server.url).run(200)
        archived(server, 100)
        store.kill()
        training.run(STEPS)
        until(lambda: True if "not in the archive" in server.log else None)
        before = view(server)["archived_version"]
        assert before < STEPS
        store.start()  # and is empty
        training.run(STEPS + 200)
        archived(server, STEPS)
        server.kill()
        assert server.log.count("it is not in the archive as it is on the disk") == 1
        assert "it is in the archive again" in server.log
    done = run_farstep(
        "sessions", "restore", store.url, "--data-dir", str(tmp_path / "b"), env=store.environment, loaded=True
    )
    assert done.returncode == 0, done.stderr
    with running_server("--data-dir", str(tmp_path / "b"), loaded=True) as server:
        version = view(server)["version"]
        assert torch.equal(Training(server.url).parameters, training.versions[version])


def test_a_store_that_does_not_answer_keeps_no_step_and_no_end(tmp_path: Path) -> None:
    """A store that takes a connection and says nothing: steps go on, and SIGTERM ends the server with 0."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "of-a-test",
            "AWS_SECRET_ACCESS_KEY": "of-a-test",
        }
        arguments = ("--data-dir", str(tmp_path), "--archive", "s3://bucket/x", *OFTEN)
        with running_server(*arguments, env=environment, loaded=True) as server:
            training = Training(server.url).run()
            assert training.optimizer.last_step is not None
            slowest = max(training.optimizer.last_step.seconds.values())
            assert slowest < 1.0
            training.close()
            assert server.stop() == 0
            assert "1 not in the archive as they are now: s" in server.log


def test_removing_a_session_leaves_its_archive(tmp_path: Path) -> None:
    """`farstep sessions rm` removes the files of the data directory only: a mistake can be taken back."""
    url = f"file://{tmp_path}/elsewhere"
    with running_server("--data-dir", str(tmp_path / "data"), "--archive", url, loaded=True) as server:
        Training(server.url).run(3).close()
        archived(server, 0)
        before = files_below(tmp_path / "elsewhere")
        assert run_farstep("sessions", "rm", "s", "--yes", "--server", server.url, loaded=True).returncode == 0
        assert list((tmp_path / "data" / "sessions").iterdir()) == []
        assert files_below(tmp_path / "elsewhere") == before


@pytest.mark.promise("No client can name a URL that a server reads or writes.", area="durability")
def test_no_request_of_a_client_can_name_a_url(tmp_path: Path) -> None:
    """No field, query or header of any route is for an address, and one that is sent all the same is refused.

    The archive is the operator's alone: what names it is the server's own settings.
    """
    words = ("url", "uri", "archive", "bucket", "endpoint", "address", "s3", "href")
    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server:
        talk = Conversation(server.url, None)
        described = talk.control("GET", "/openapi.json")
        names = set(asked_for(described))
        assert {"name", "optimizer", "durability"} <= names
        assert [each for each in names if any(word in each.lower() for word in words)] == []
        document = {
            "name": "s",
            "worker": "w0",
            "optimizer": "SGD",
            "groups": [{"lr": 0.5}],
            "segments": [{"name": "weight", "shape": [3], "dtype": "float32"}],
        }
        for more in (
            {"archive": f"file://{tmp_path}/stolen"},
            {"durability": {"level": "journal", "archive": f"file://{tmp_path}/stolen"}},
            {"durability": {"level": "snapshot", "every_s": 1.0, "url": f"file://{tmp_path}/stolen"}},
        ):
            with pytest.raises((InvalidRequest, farstep.errors.InvalidOption)):
                talk.control("POST", "/v1/sessions", {**document, **more})
        talk.control("POST", "/v1/sessions", document)
        talk.close()
    assert not (tmp_path / "stolen").exists()


def asked_for(described: dict[str, Any]) -> Iterator[str]:
    """Yield the names of all parameters and of all fields of bodies, at any depth, that an OpenAPI document has."""
    for path in described["paths"].values():
        for operation in path.values():
            if not isinstance(operation, dict):
                continue
            yield from (each["name"] for each in operation.get("parameters", ()))
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from fields_of(content.get("schema", {}), described, set())


def fields_of(schema: Any, described: dict[str, Any], seen: set[str]) -> Iterator[str]:
    """Yield the names of the fields of a schema, and of those it refers to."""
    if isinstance(schema, list):
        for each in schema:
            yield from fields_of(each, described, seen)
    if not isinstance(schema, dict):
        return
    reference = schema.get("$ref", "")
    if reference and reference not in seen:
        seen.add(reference)
        yield from fields_of(described["components"]["schemas"][reference.rpartition("/")[2]], described, seen)
    yield from schema.get("properties", {})
    for each in schema.values():
        yield from fields_of(each, described, seen)
