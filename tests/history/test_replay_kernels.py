"""A journal that was written with a kernel which the next server does not have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.service.histories import came_back
from tests.support.service.raw import RawClient, gradient
from tests.support.service.servers import running_server

SHAPES = [torch.zeros(40)]
STEPS = 5


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.promise(
    "A session whose kernel is missing is refused with the remedy; `--replay reference` brings it back, announced.",
    area="durability",
)
@pytest.mark.parametrize("kernel", ["fused", "auto"])
def test_a_missing_kernel_is_named_and_the_reference_one_can_take_its_place(kernel: str, tmp_path: Path) -> None:
    """Without a compiler the session is refused alone; the reference kernel brings it back as another life."""
    data = str(tmp_path / "data")
    without = {"FARSTEP_KERNEL_CACHE": str(tmp_path / "kernels"), "CXX": str(tmp_path / "no-compiler")}
    with running_server("--data-dir", data, loaded=True) as server, RawClient(server.url) as raw:
        options = {"kernel": kernel, "optimizer": "SGD", "groups": [{"lr": 0.1, "momentum": 0.9}]}
        (old,) = raw.begun("s", parameters=SHAPES, **options)
        (plain,) = raw.begun("plain", parameters=SHAPES)
        assert plain.push(gradient(0, SHAPES)).status == 200
        version, fused = 0, 0
        while fused < STEPS:
            answer = old.push(gradient(version, SHAPES), base=version)
            version, fused = version + 1, fused + (answer.receipt["kernel"] == "fused")
        wanted = old.pull()[1]
        server.kill()
    with running_server("--data-dir", data, env=without, loaded=True) as server, RawClient(server.url) as raw:
        came_back(raw, "plain")
        while (answer := raw.request("GET", "/v1/sessions/s")).document["code"] == "recovering":
            pass
        assert answer.document["code"] == "unavailable"
        assert "fused kernel for SGD" in answer.document["detail"]
        assert "--replay reference" in answer.document["remedy"]
        server.kill()
    with running_server("--data-dir", data, "--replay", "reference", env=without, loaded=True) as server:
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            old.raw = raw
            assert old.pull()[0] == version
            assert torch.allclose(old.pull()[1][0], wanted[0], rtol=1e-5)
            assert old.push(gradient(9, SHAPES), base=version).document["code"] == "rolled_back"
            plain.raw = raw
            came_back(raw, "plain")
            assert plain.push(gradient(1, SHAPES), base=1).status == 200  # whose bits are the same: no other life
        server.kill()
    with running_server("--data-dir", data, loaded=True) as server, RawClient(server.url) as raw:
        came_back(raw, "s")  # what the reference kernel gave was written down: nothing is taken again
        old.raw = raw
        assert old.pull()[0] == version
        fresh = raw.join("s", "w0", SHAPES, **options)
        assert fresh.push(gradient(version, SHAPES), base=version).status == 200
