"""The wheel, installed elsewhere, works without the sources."""

import zipfile
from pathlib import Path

from tests.project.conftest import Installed

STEP = """
import torch
import farstep.optim

ours = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
theirs = torch.nn.Parameter(ours.detach().clone())
optimizers = [farstep.optim.Adagrad([ours], lr=0.1), torch.optim.Adagrad([theirs], lr=0.1)]
for step in range(3):
    for parameter, optimizer in zip([ours, theirs], optimizers):
        optimizer.zero_grad()
        (parameter - 2).square().sum().backward()
        optimizer.step()
torch.testing.assert_close(ours, theirs)
print("same")
"""


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path, root: Path):
    """The wheel holds every source file of both packages, the protocol, the typing markers and the licence."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    sources = {
        str(path.relative_to(root / room))
        for room, package in (("client", "farstep"), ("service", "farstep_service"))
        for path in (root / room / package).glob("**/*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert held == sources
    assert {"farstep/py.typed", "farstep_service/py.typed", "farstep/protocol/PROTOCOL.md"} <= held


def test_both_packages_import_from_the_wheel(installed: Installed):
    """Both packages come from the installed wheel, not from the sources."""
    code = "import farstep, farstep_service; print(farstep.__file__); print(farstep_service.__file__)"
    found = installed.run("python", "-c", code).stdout.split()
    assert [Path(each).parents[1] for each in found] == [installed.packages] * 2


def test_the_command_runs_from_the_wheel(installed: Installed):
    """`farstep --help` runs."""
    assert "Usage" in installed.run("farstep", "--help").stdout


def test_an_embedded_optimizer_steps_from_the_wheel(installed: Installed):
    """Three steps of an embedded optimizer equal torch's own."""
    assert installed.run("python", "-c", STEP).stdout.split() == ["same"]
