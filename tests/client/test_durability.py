"""`durability=` of an optimizer: what it asks of its session's server, and where it is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import farstep
from farstep.conversation import Conversation
from farstep.errors import InvalidOption, OptionsDiffer
from farstep.protocol.durability import Durability
from farstep.settings import resolve
from tests.support.service.servers import RunningServer, running_server


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server with a data directory."""
    with running_server("--data-dir", str(tmp_path_factory.mktemp("data")), loaded=True) as running:
        yield running


def weights() -> list[torch.nn.Parameter]:
    """Return one small parameter."""
    return [torch.nn.Parameter(torch.arange(3.0))]


def level_at(server: RunningServer, session: str) -> Any:
    """Return the level that a server shows for a session."""
    conversation = Conversation(server.url, None)
    try:
        return conversation.control("GET", f"/v1/sessions/{session}")["durability"]
    finally:
        conversation.close()


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (None, "journal:os"),
        ("none", "none"),
        (farstep.Snapshot(every_steps=10), "snapshot:every_steps=10,every_s=60"),
        (farstep.Journal(sync="group"), "journal:group"),
    ],
)
def test_an_optimizer_chooses_the_level_of_its_session(
    keeping: RunningServer, level: Durability | None, shown: str
) -> None:
    """The session that an optimizer creates has the level of its argument, or the server's default without one."""
    optimizer = farstep.optim.SGD(weights(), lr=0.1, server=keeping.url, durability=level)
    assert level_at(keeping, optimizer.session) == shown
    copied = copy.deepcopy(optimizer)
    assert level_at(keeping, copied.session) == shown
    copied.close()
    optimizer.close()


def test_a_worker_that_names_another_level_is_told(keeping: RunningServer) -> None:
    """Workers of a session name its level or none; another one raises OptionsDiffer, which names both."""
    url, name, group = keeping.url, "leveled", farstep.Journal(sync="group")
    first = farstep.optim.SGD(weights(), lr=0.1, server=url, session=name, worker="w0", durability=group)
    second = farstep.optim.SGD(weights(), lr=0.1, server=url, session=name, worker="w1")
    with pytest.raises(OptionsDiffer, match="durability is journal:group, not journal:os"):
        farstep.optim.SGD(weights(), lr=0.1, server=url, session=name, worker="w2", durability=farstep.Journal())
    first.close()
    second.close()


@pytest.mark.parametrize("level", [farstep.Snapshot(), farstep.Journal()], ids=repr)
def test_an_embedded_session_keeps_nothing(level: Durability) -> None:
    """Without a server there is no disk: the option is refused, and the remedy says what to start."""
    with pytest.raises(InvalidOption, match="embedded session") as refused:
        farstep.optim.SGD(weights(), lr=0.1, durability=level)
    assert refused.value.field == "durability"
    assert "--data-dir" in refused.value.remedy
    assert farstep.optim.SGD(weights(), lr=0.1, durability="none").version == 0


def test_a_server_without_a_directory_says_so(server: RunningServer) -> None:
    """An optimizer that asks for a journal of a server without a disk gets the server's refusal and its remedy."""
    with pytest.raises(InvalidOption, match="no data directory") as refused:
        farstep.optim.SGD(weights(), lr=0.1, server=server.url, durability=farstep.Journal())
    assert refused.value.side == "server"
    assert "--data-dir" in refused.value.remedy


@pytest.mark.parametrize("given", ["journal", 3, farstep.Snapshot])
def test_what_is_no_level_is_refused(given: Any) -> None:
    """A value that is no level is refused before anything is sent."""
    with pytest.raises(InvalidOption) as refused:
        resolve({"server": "http://box", "durability": given}, {})
    assert (refused.value.field, refused.value.side) == ("durability", "client")


@pytest.mark.parametrize(
    ("level", "shown"),
    [(None, "journal:os"), ("none", "none"), (farstep.Snapshot(every_s=5), "snapshot:every_s=5")],
)
def test_a_step_reports_the_level(keeping: RunningServer, level: Durability | None, shown: str) -> None:
    """`last_step.durability` is the session's level, however the tensors moved and whatever became of the step."""
    parameters = weights()
    optimizer = farstep.optim.SGD(parameters, lr=0.1, server=keeping.url, durability=level, nonfinite="skip")
    for value, applied in ((1.0, True), (float("nan"), False)):
        parameters[0].grad = torch.full((3,), value)
        optimizer.step()
        assert optimizer.last_step is not None
        assert (optimizer.last_step.durability, optimizer.last_step.applied) == (shown, applied)
    optimizer.close()


def test_a_step_of_an_embedded_session_keeps_nothing() -> None:
    """Without a server every step reports the level none."""
    parameters = weights()
    optimizer = farstep.optim.SGD(parameters, lr=0.1, nonfinite="skip")
    for value in (1.0, float("nan")):
        parameters[0].grad = torch.full((3,), value)
        optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.durability == "none"
