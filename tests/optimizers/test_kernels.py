"""Which kernel runs, and what happens without a compiler."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farstep.errors import InvalidOption, Unavailable
from farstep_service.kernels import Kernels, possible, usual
from farstep_service.kernels.build import SCRATCH, Report, build_in_subprocess, build_on_all_cores
from farstep_service.kernels.compiled_kernels import CompiledKernel, Threads, default_directory, file_name, find
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import KernelSignature

CPU = torch.device("cpu")
THREADS: tuple[Threads, ...] = ("one", "many")
ADAGRAD = RULES["Adagrad"]
FLOAT32 = frozenset({KernelSignature("float32")})


class Workshop:
    """Builds nothing; says of each package what it was told to say."""

    def __init__(self, error: str | None) -> None:
        self.error = error
        self.asked: list[CompiledKernel] = []

    def __call__(self, packages: Sequence[CompiledKernel], directory: Path, report: Report) -> None:
        self.asked += packages
        for package in packages:
            report(package, self.error)


def test_without_a_compiler_the_reference_kernel_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A kernel that cannot be built is said once in the log, kept in the status, and replaced by the reference."""
    caplog.set_level(logging.INFO)
    kernels = Kernels("auto", directory=tmp_path / "kernels", build=Workshop("InvalidCxxCompiler: no g++"))
    kernels.prepare(ADAGRAD, [KernelSignature("float32"), KernelSignature("float64")], CPU)
    assert kernels.wait(10)
    assert kernels.choose(ADAGRAD, FLOAT32, CPU, None).name == "reference"
    assert {status.state for status in kernels.status()} == {"failed"}
    assert kernels.status()[0].reason == "InvalidCxxCompiler: no g++"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_package_is_asked_for_once(tmp_path: Path):
    """A kernel is built once, however many sessions ask for it."""
    workshop = Workshop("no")
    kernels = Kernels("auto", directory=tmp_path / "kernels", build=workshop)
    for _ in range(3):
        kernels.prepare(ADAGRAD, [KernelSignature("float32")], CPU)
    kernels.wait(10)
    assert workshop.asked == [CompiledKernel("Adagrad", "float32", "cpu")]


def test_the_mode_fused_fails_without_a_kernel(tmp_path: Path):
    """Who asks for fused kernels only is told why there is none, and what to do."""
    kernels = Kernels("fused", directory=tmp_path / "kernels", build=Workshop("no compiler"))
    with pytest.raises(Unavailable, match="no compiler"):
        kernels.prepare(ADAGRAD, [KernelSignature("float32")], CPU)


def test_the_mode_reference_compiles_nothing(tmp_path: Path):
    """In the mode `reference` nothing is built, and a replay of a fused step is refused."""
    workshop = Workshop(None)
    kernels = Kernels("reference", directory=tmp_path / "kernels", build=workshop)
    kernels.prepare(ADAGRAD, [KernelSignature("float32")], CPU)
    assert kernels.choose(ADAGRAD, FLOAT32, CPU, None).name == "reference"
    with pytest.raises(Unavailable, match="reference kernels only"):
        kernels.choose(ADAGRAD, FLOAT32, CPU, "fused")
    assert workshop.asked == []


def test_an_unknown_mode_is_refused():
    """A kernel mode nobody knows is an error at construction."""
    with pytest.raises(InvalidOption, match="no kernel mode 'fast'"):
        Kernels("fast")  # type: ignore[arg-type]


@pytest.mark.promise("Only the server's own user may use its unix socket and its kernels.", area="security")
def test_a_package_that_others_could_have_written_is_not_loaded(tmp_path: Path):
    """A file or directory that others may write, or a link, is refused: a package is code."""
    package = CompiledKernel("Adagrad", "float32", "cpu")
    directory = tmp_path / "kernels"
    directory.mkdir(mode=0o700)
    assert find(directory, package, ADAGRAD) is None
    path = directory / file_name(package, ADAGRAD)
    path.write_bytes(b"")
    path.chmod(0o644)
    assert find(directory, package, ADAGRAD) == path
    path.chmod(0o666)
    with pytest.raises(Unavailable, match="others could have written"):
        find(directory, package, ADAGRAD)
    path.chmod(0o644)
    directory.chmod(0o777)
    with pytest.raises(Unavailable, match="others could have written"):
        find(directory, package, ADAGRAD)
    directory.chmod(0o700)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="others could have written"):
        find(directory, package, ADAGRAD)


def test_a_broken_package_is_not_the_end(tmp_path: Path):
    """A damaged file costs the fused kernel, not the session."""
    directory = tmp_path / "kernels"
    directory.mkdir(mode=0o700)
    (directory / file_name(CompiledKernel("Adagrad", "float32", "cpu"), ADAGRAD)).write_bytes(b"no zip")
    kernels = Kernels("auto", directory=directory, build=Workshop(None))
    kernels.prepare(ADAGRAD, [KernelSignature("float32")], CPU)
    assert kernels.status()[0].state == "failed"
    assert kernels.choose(ADAGRAD, FLOAT32, CPU, None).name == "reference"


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path):
    """Where no directory can be made, the reason is in the status."""
    (tmp_path / "file").write_text("")
    kernels = Kernels("auto", directory=tmp_path / "file" / "kernels", build=Workshop(None))
    kernels.prepare(ADAGRAD, [KernelSignature("float32")], CPU)
    assert kernels.wait(10)
    assert "cannot be made" in kernels.status()[0].reason


def test_the_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Packages are kept where FARSTEP_KERNEL_CACHE says, else in the user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FARSTEP_KERNEL_CACHE", raising=False)
    assert default_directory() == tmp_path / "farstep" / "kernels"
    monkeypatch.setenv("FARSTEP_KERNEL_CACHE", str(tmp_path / "mine"))
    assert default_directory() == tmp_path / "mine"


def test_names_differ_where_contents_do():
    """Another rule, dtype, thread count, choice of state, or dtype of gradients or a copy, is another file."""
    names = {
        file_name(
            replace(CompiledKernel.of(rule, form._replace(gradient=gradient, copy=copy), "cpu"), threads=threads), rule
        )
        for rule, form in usual(RULES.values(), ["float32", "float64"])
        for threads in THREADS
        for gradient in ("", "bfloat16", "float16")
        for copy in ("", "bfloat16", "float16", "float32")
    }
    assert len(names) == 4 * 3 * 4 * len(usual(RULES.values(), ["float32"]))


def test_what_is_possible_begins_with_what_is_usual():
    """Every choice of optional state can be built ahead, each once, those that sessions ask for most before others."""
    adam, rmsprop = RULES["Adam"], RULES["RMSprop"]
    found = possible([adam, rmsprop, RULES["Muon"]], ["float32", "float64"])
    first = usual([adam, rmsprop], ["float32", "float64"])
    assert found[: len(first)] == first
    assert len(found) == len(set(found)) == 2 * 2 + 2 * 4
    assert (adam, KernelSignature("float64", ("max_exp_avg_sq",))) in found


def test_waiting_ends_when_the_builder_has_ended(tmp_path: Path):
    """A builder may still tidy up when its last kernel is there, and nobody who waited goes away before that."""
    reported, ended = threading.Event(), threading.Event()

    def build(packages: Sequence[CompiledKernel], directory: Path, report: Report) -> None:
        for package in packages:
            report(package, "no compiler")
        reported.set()
        ended.wait(60)

    kernels = Kernels("auto", directory=tmp_path / "kernels", build=build)
    kernels.begin([(ADAGRAD, KernelSignature("float32"))], CPU)
    assert reported.wait(60)
    assert {status.state for status in kernels.status()} == {"failed"}
    assert not kernels.wait(0)
    ended.set()
    assert kernels.wait(60)


def test_all_cores_build_every_package(tmp_path: Path):
    """Packages that are shared out among processes are each reported once, whatever becomes of them."""
    told: list[tuple[CompiledKernel, bool]] = []
    lost = [CompiledKernel(f"NoSuchRule{number}", "float32", "cpu") for number in range(3)]
    build_on_all_cores(lost, tmp_path / "kernels", lambda package, error: told.append((package, bool(error))))
    assert sorted(told, key=str) == [(package, True) for package in lost]


def test_what_builders_need_meanwhile_is_removed(tmp_path: Path):
    """Nothing is left of a build but kernels, nor of one whose process was killed; one that goes on is left alone."""
    directory = tmp_path / "kernels"
    (directory / f"{SCRATCH}killed" / "headers").mkdir(parents=True)
    (directory / f"{SCRATCH}going-on").mkdir()
    directory.chmod(0o700)
    holder = os.open(directory / f"{SCRATCH}going-on", os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        build_in_subprocess([CompiledKernel("NoSuchRule", "float32", "cpu")], directory, lambda package, error: None)
    finally:
        os.close(holder)
    assert [path.name for path in directory.glob(f"{SCRATCH}*")] == [f"{SCRATCH}going-on"]


def test_a_builder_that_dies_is_noticed(tmp_path: Path):
    """A package whose builder ends without a word is reported as failed."""
    told: dict[CompiledKernel, str | None] = {}
    lost = CompiledKernel("NoSuchRule", "float32", "cpu")
    build_in_subprocess([lost], tmp_path / "kernels", lambda package, error: told.update({package: error}))
    assert "NoSuchRule" in (told[lost] or "")


def test_a_builder_ends_with_the_one_who_asked(tmp_path: Path):
    """When the standard input of a builder closes, it ends at once, its compilers with it."""
    command = [sys.executable, "-W", "ignore", "-m", "farstep_service.kernels.build", str(tmp_path / "kernels")]
    process = subprocess.Popen(
        [*command, "0", "10", "Adagrad|float32|||cpu|one"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode < 0
    assert [line for line in out.splitlines() if "package" in json.loads(line)] == []


def test_a_process_ends_while_a_kernel_is_being_built(tmp_path: Path) -> None:
    """A script that is through does not wait for a compiler: here for one whose turn never comes."""
    cache = tmp_path / "kernels"
    cache.mkdir(mode=0o700)
    script = (
        "import torch, farstep\n"
        "p = torch.ones(3, requires_grad=True)\n"
        "optimizer = farstep.optim.Adagrad([p])\n"
        "p.grad = torch.ones(3)\n"
        "optimizer.step()\n"
    )
    with (cache / ".lock-0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = {**os.environ, "FARSTEP_KERNEL_CACHE": str(cache)}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=200)
