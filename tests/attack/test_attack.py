"""A small part of `make attack`, so that what it attacks stays defended and the campaign itself keeps working."""

import pytest

from tests.attack.__main__ import MOST_GROWTH_BYTES, main
from tests.attack.company import attack
from tests.attack.connections import WAYS
from tests.support.service.servers import TOKEN, running_server


@pytest.mark.promise(
    "With workers killed and connections cut at random, no acknowledged step is lost or counted twice.",
    area="exactly once",
)
@pytest.mark.parametrize(
    "part", [("bodies", "--bodies", "1500"), ("ledger", "--steps", "400")], ids=lambda part: part[0]
)
def test_what_is_sent_is_refused_by_name_and_what_is_acknowledged_is_counted_once(
    part: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged bodies give no 5xx, and kills and cuts neither lose nor double a step."""
    assert main([*part, "--seed", "11"]) == 0, capsys.readouterr().err


@pytest.mark.promise(
    "Connections held in every state without a token leave a good client its steps and take little memory.",
    area="limits",
)
def test_connections_held_without_a_token_cost_little() -> None:
    """All ways to hold a connection at once leave a good client its steps and take less than 50 MiB."""
    with running_server(token=TOKEN) as server:
        result = attack(server, seconds=6, each=2, quiet_s=0.5)
    assert result.held.keys() == WAYS.keys()
    assert all(held.opened for held in result.held.values())
    assert result.attacked
    assert result.taken_bytes < MOST_GROWTH_BYTES
