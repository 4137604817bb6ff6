"""What the tests of the update rules share: one thread, and kernels kept between runs."""

import os
from collections.abc import Iterator

import pytest
import torch

from farstep_service.kernels import Kernels
from tests.support.optimizers.compiled import build_beside, compiled


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to build the kernels, in one of the processes that run tests, if any test is going to use them."""
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and not session.config.option.collectonly
    if first and any("fused" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.add_cleanup(build_beside())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, so that busy neighbours cost little and one kernel per rule is enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fused() -> Kernels:
    """Return compiled kernels, from the user's cache if they have been built before."""
    kernels = compiled()
    failed = [status for status in kernels.status() if status.state == "failed"]
    if failed and "Compiler" in failed[0].reason:
        pytest.skip(f"there is no C++ compiler here: {failed[0].reason}")
    assert failed == []
    return kernels
