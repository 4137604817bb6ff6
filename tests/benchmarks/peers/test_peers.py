"""The peers run, give a figure for each size, and leave nothing behind. How good the figures are is not tested."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.peers import bare_http, raw_sockets, ray_actor, torch_rpc

RAY = pytest.mark.skipif(not ray_actor.installed(), reason="pip install 'farstep[ray]'")


def children() -> set[str]:
    """Return the processes that this one has started and that are still there."""
    return {
        child
        for thread in Path("/proc/self/task").iterdir()
        for child in (thread / "children").read_text().split()
        if os.path.exists(f"/proc/{child}")
    }


@pytest.mark.parametrize(
    "measure",
    [
        lambda: raw_sockets.measure([1, 100_000], 2),
        lambda: bare_http.measure([1, 100_000], 2),
        lambda: bare_http.measure([1, 100_000], 2, client="httpx"),
        lambda: torch_rpc.measure([torch_rpc.Size(10, 3), torch_rpc.Size(1000, 1)], [2, 3]),
        lambda: torch_rpc.measure([torch_rpc.Size(10, 3), torch_rpc.Size(1000, 1)], [2, 3], "uv"),
        pytest.param(lambda: ray_actor.measure([torch_rpc.Size(10, 3), torch_rpc.Size(1000, 1)], [2, 3]), marks=RAY),
    ],
    ids=["raw sockets", "bare HTTP", "httpx", "torch.distributed.rpc", "torch.distributed.rpc over TCP", "Ray actor"],
)
def test_a_peer_measures_and_cleans_up(measure: Callable[[], list[float]]):
    """Each size gets a positive time of less than a minute, and no process stays."""
    before = children()
    seconds = measure()
    assert len(seconds) == 2
    assert all(0 < each < 60 for each in seconds)
    assert children() <= before


def test_a_workload_is_divided_evenly():
    """The tensors of a workload have all its parameters, and lengths that differ by one at most."""
    assert torch_rpc.Size(2500, 6).lengths == [417, 417, 417, 417, 416, 416]
    assert all(sum(size.lengths) == size.parameters for size in torch_rpc.SIZES)
