"""Training over a socket at a path: the same bits, applied once, whatever happens to the connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import farstep
from farstep.errors import SessionLost, Unavailable
from farstep.protocol.unix import path_of_url
from farstep.settings import RemoteOptions
from tests.parity.cases import STEPPED
from tests.support.client.twins import Twins, check_parameters, drawn, start_of
from tests.support.faults import faulty
from tests.support.service.servers import RunningServer, running_server

SHAPES = [(3, 4), (5,)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server that listens at a path alone."""
    path = tmp_path_factory.mktemp("u") / "s"
    with running_server("--unix", str(path), "--no-tcp", port=None, loaded=True) as running:
        yield running


@pytest.mark.parametrize("name", list(STEPPED))
def test_every_optimizer_equals_torch_over_a_socket(name: str, local: RunningServer) -> None:
    """Ten steps and the state are torch's, bit for bit."""
    place: RemoteOptions = {"kernel": "reference", "server": local.url}
    twins = Twins(name, {}, place, start=start_of(name))
    twins.train(10)
    twins.check()


def test_large_tensors_go_both_ways(local: RunningServer) -> None:
    """More bytes than the system keeps for a socket arrive whole, received where they are used."""
    twins = Twins(
        "Adagrad", {}, {"kernel": "reference", "server": local.url}, start=drawn(0, [(1500, 1000), (700_001,)])
    )
    twins.train(3)
    twins.check()


def test_the_environment_may_name_a_socket(local: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """FARSTEP_SERVER is a unix URL like any other."""
    monkeypatch.setenv("FARSTEP_SERVER", local.url)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = farstep.optim.SGD([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [0.5, 0.5, 0.5]
    assert optimizer.last_step is not None
    assert optimizer.last_step.bytes_sent == 12
    optimizer.close()


def test_a_session_is_exported_and_imported_over_a_socket(local: RunningServer, tmp_path: Path) -> None:
    """Files move over it as they do over TCP."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = farstep.optim.Adagrad([p], server=local.url, session="file")
    farstep.export_session("file", tmp_path / "f", server=local.url)
    assert farstep.import_session(tmp_path / "f", name="copy", server=local.url) == "copy"
    optimizer.close()


@pytest.mark.parametrize("way", ["request", "response"])
def test_a_step_over_a_socket_is_applied_once_wherever_it_is_cut(local: RunningServer, way: str) -> None:
    """A request or an answer that is cut after any number of bytes is tried again, and counts once."""
    with faulty(path_of_url(local.url) or "") as network:
        twins = Twins(
            "Adagrad",
            {"lr": 0.1},
            {"kernel": "reference", "server": network.url, "timeout_s": 5.0},
            start=drawn(0, SHAPES),
        )
        twins.step(drawn(1, SHAPES))
        steps = 1
        cut = network.cut_request if way == "request" else network.cut_response
        for after in (0, 1, 100, 200, 300, 400, 450):
            cut(after=after)
            steps += 1
            twins.step(drawn(steps, SHAPES))
            check_parameters(twins.here, twins.there)
            assert twins.ours.version == steps
        twins.check()
        twins.ours.close()


def test_a_server_that_is_gone_is_told_as_over_tcp(tmp_path: Path) -> None:
    """Without a server a step is refused in time and changes nothing; one that restarted has lost the session."""
    with running_server("--unix", str(tmp_path / "s"), loaded=True) as server:
        twins = Twins(
            "Adagrad", {}, {"kernel": "reference", "server": server.unix, "timeout_s": 1.0}, start=drawn(0, SHAPES)
        )
        twins.step(drawn(1, SHAPES))
        server.kill()
        before = [p.detach().clone() for p in twins.here]
        twins.give(drawn(2, SHAPES))
        with pytest.raises(Unavailable, match="nothing accepts connections"):
            twins.ours.step()
        server.restart()
        with pytest.raises(SessionLost):
            twins.ours.step()
        check_parameters(twins.here, before)
