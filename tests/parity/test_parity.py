"""Some steps of every case of the table, embedded and through a real server process, against torch.optim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.parity.cases import NAMES, Case, cases, trained, usual_options
from tests.parity.running import Places, run
from tests.support.service.servers import running_server

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
    with running_server(loaded=True) as server:
        yield {"embedded": {"kernel": "reference"}, "server": {"kernel": "reference", "server": server.url}}


def check(case: Case, dtype: torch.dtype, places: Places) -> None:
    """Fail unless both places are like torch."""
    for place, found in run(case, dtype, STEPS, places).at.items():
        assert found.wrong == (), f"{case.name}({case.label}) {dtype} {place}"
        assert found.tensors > 0 or found.refusal


@pytest.mark.promise(
    "Reference kernels give the bits of `torch.optim` in float32 and float64, embedded and on a server.",
    area="bits of torch",
)
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.name}-{case.label}")
def test_parameters_state_and_refusals_are_torchs(case: Case, places: Places):
    """Parameters, state and groups are torch's in every case, and so is what is refused."""
    check(case, case.dtypes[0], places)


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_torchs_within_their_tolerance(name: str, places: Places):
    """Defaults and options together are torch's in the other dtypes, bit by bit in float64."""
    for case in trained(name):
        for dtype in case.dtypes[1:] if case.options in usual_options(name) else ():
            check(case, dtype, places)
