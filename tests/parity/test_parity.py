"""Some steps of every case of the table, embedded and through a real server process, against torch.optim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.parity.cases import Case, cases
from tests.parity.running import Places, run
from tests.service.servers import running_server

STEPS = 7
"""As many as it takes until every way to train has done all it does."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, so that busy neighbours cost little."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    """Return both places an optimizer can be in."""
    with running_server() as server:
        yield {"embedded": {"kernel": "reference"}, "server": {"kernel": "reference", "server": server.url}}


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.name}-{case.label}")
def test_parameters_state_and_refusals_are_torchs(case: Case, places: Places):
    """Parameters, state and groups are torch's, within what the dtype allows, and so is what is refused."""
    results = [run(case, dtype, STEPS, places) for dtype in case.dtypes]
    assert [
        f"{each.dtype} {at}: {found.wrong}" for each in results for at, found in each.at.items() if found.wrong
    ] == []
    assert all(found.tensors > 0 or found.refusal for each in results for found in each.at.values())
