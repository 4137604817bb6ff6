"""A server that is killed under load and started again on its directory: nothing lost or twice, and the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import farstep
from farstep.settings import RemoteOptions
from tests.robustness.kills import ROTATING, attack
from tests.robustness.twins import CASES, Steps, disturbed, train
from tests.support.service.servers import RunningServer, running_server

LEVELS: dict[str, RemoteOptions] = {
    "os": {"durability": farstep.Journal(sync="os")},
    "group": {"durability": farstep.Journal(sync="group")},
}


WAYS: dict[str, tuple[str, RemoteOptions]] = {
    "shared memory": ("unix", {}),
    "overlap": ("url", {"overlap": True}),
    "16 bits": ("url", {"wire": "bf16"}),
}
"""How gradients and parameters travel: which address of a server, and options."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Yield a server on a directory of its own, which the tests kill one after the other."""
    place = tmp_path_factory.mktemp("d")
    with running_server("--data-dir", str(place / "data"), "--unix", str(place / "s"), loaded=True) as running:
        yield running


@pytest.mark.promise(
    "A server killed with -9 under load loses no acknowledged step of a journaled session and applies none twice.",
    area="durability",
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "level", "kills"), [("async", "os", 13), ("sync", "group", 12)])
def test_nothing_is_lost_and_nothing_is_doubled(mode: str, level: str, kills: int, tmp_path: Path) -> None:
    """Four worker processes step through 25 kills of their server; each step that one was told of counts once."""
    with running_server("--data-dir", str(tmp_path / "data"), *ROTATING, loaded=True) as server:
        result = attack(server, seed=17, kills=kills, mode=mode, remote=LEVELS[level])
        assert not result.broken, (result, server.log[-4000:])
    assert result.server_kills == kills
    assert result.steps > 4 * kills


@pytest.mark.promise(
    "After a kill -9, parameters, optimizer state, averages, schedules and rounds have the bits of an undisturbed run.",
    area="durability",
)
@pytest.mark.parametrize("name", CASES)
def test_a_training_ends_with_the_same_bits(name: str, server: RunningServer) -> None:
    """A server that is killed twice within a training leaves its versions, parameters and state as they would be."""
    case, level = CASES[name], LEVELS["os" if case_number(name) % 2 else "group"]
    session = name.replace(" ", "-")
    calm = train(server.url, f"{session}.calm", case, level, Steps())
    ended = disturbed(server, session, case, level, times=2, seed=case_number(name))
    assert [one.differences(other) for one, other in zip(calm, ended, strict=True)] == [[]] * case.workers


def case_number(name: str) -> int:
    """Return the place of a training among all of them."""
    return list(CASES).index(name)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_way_the_gradients_travel(way: str, server: RunningServer) -> None:
    """Through shared memory, during the backward pass and in 16 bits, a training with two kills has the same bits."""
    address, options = WAYS[way]
    case, session = CASES["large Adam"], way.replace(" ", "-")
    remote: RemoteOptions = {**LEVELS["os"], **options}
    url = getattr(server, address)
    calm = train(url, f"{session}.calm", case, remote, Steps())
    ended = disturbed(server, session, case, remote, times=2, seed=len(way), url=url)
    assert [one.differences(other) for one, other in zip(calm, ended, strict=True)] == [[], []]
