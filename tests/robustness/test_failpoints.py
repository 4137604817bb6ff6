"""A server that ends at each named place of its code: whoever is told of something finds it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from farstep_service.failpoints import NAMES
from tests.robustness.failpoints import SMALL, Campaign
from tests.support.service.servers import running_server, sessions_at


@pytest.mark.promise(
    "A server that dies between any two steps of writing down comes back with all that was acknowledged.",
    area="durability",
)
@pytest.mark.timeout(300)
def test_a_server_may_end_at_every_named_place(tmp_path: Path) -> None:
    """It comes to each of at least 24 places and ends there; the trainings end as if not, and no file is left."""
    data = tmp_path / "data"
    with running_server("--data-dir", str(data), *SMALL, loaded=True) as server:
        campaign = Campaign(server, seed=3, most=2)
        deaths = [campaign.end_at(name) for name in NAMES]
        assert [each for each in deaths if each.wrong] == [], server.log[-4000:]
        there, folders = sessions_at(server.url), [each.name for each in (data / "sessions").iterdir()]
    assert [each.point for each in deaths if not each.reached] == []
    assert len(deaths) >= 24
    assert len(folders) == len(there), "a folder of no session was left behind"
