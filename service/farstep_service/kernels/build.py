"""Compile kernels in a process of their own: `python -m farstep_service.kernels.build DIRECTORY LANE NICE NAME...`.

Compiling takes seconds, hundreds of megabytes and a C++ compiler; it must neither slow down a step nor crash the
server. Each package is announced on standard output by one line of JSON, `{"package": ..., "error": ...}`. The process
ends, with every compiler it started, when its standard input closes, that is, when its parent has ended.

    build_in_subprocess      one process, while steps go on
    build_on_all_cores       one process for each core, when there is nothing else to do: `farstep warmup`
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from farstep_service.kernels.compiled_kernels import CompiledKernel, open_directory
from farstep_service.machine import usable_cpus

Report = Callable[[CompiledKernel, str | None], None]
"""Called with each package as soon as it is ready (None), or with the reason why it could not be built."""

Builder = Callable[[Sequence[CompiledKernel], Path, Report], None]
"""Builds packages in a directory and reports each of them, in order."""


SCRATCH = ".scratch-"
"""The prefix of directories that exist while packages are built."""


def build_in_subprocess(packages: Sequence[CompiledKernel], directory: Path, report: Report) -> None:
    """Build packages in another process of low priority, and report each of them.

    Without a thread pool: at its exit the interpreter would wait for it, and so for the compiler.
    """
    open_directory(directory)
    with _scratch(directory) as scratch:
        _build_lane(packages, directory, scratch, report, lane=0, nice=10)


def build_on_all_cores(packages: Sequence[CompiledKernel], directory: Path, report: Report) -> None:
    """Build packages in one process per usable CPU, and report each of them, from several threads."""
    lanes = min(usable_cpus(), len(packages))
    open_directory(directory)
    with _scratch(directory) as scratch, ThreadPoolExecutor(lanes) as threads:
        built = [
            threads.submit(_build_lane, packages[lane::lanes], directory, scratch, report, lane=lane, nice=0)
            for lane in range(lanes)
        ]
    for each in built:
        each.result()


def _build_lane(
    packages: Sequence[CompiledKernel], directory: Path, scratch: Path, report: Report, *, lane: int, nice: int
) -> None:
    roots = {str(Path(sys.modules[name].__path__[0]).parent) for name in ("farstep", "farstep_service")}
    paths = [*sorted(roots), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"), "TRITON_CACHE_DIR": str(directory / "triton")}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__, str(directory), str(lane), str(nice), *map(_text, packages)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Temporary files go where other users cannot write.
        env={**os.environ, **caches, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    waiting = {_text(package): package for package in packages}
    with process:
        for line in process.stdout or ():
            try:
                told = json.loads(line)
                package = waiting.pop(told["package"])
            except (ValueError, KeyError, TypeError):
                continue  # output of the compiler
            report(package, told["error"])
    for package in waiting.values():
        report(package, f"the process that builds it ended with status {process.returncode}")


def main(arguments: Sequence[str]) -> None:
    """Build the packages named on the command line."""
    directory, lane, nice, *names = arguments
    os.nice(int(nice))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in names:
        error: str | None = None
        try:
            _build(_package(name), Path(directory), lane)
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"[:2000]
        print(json.dumps({"package": name, "error": error}), flush=True)


def _build(package: CompiledKernel, directory: Path, lane: str) -> None:
    import torch

    from farstep_service.kernels.compiled_kernels import file_name as name_of
    from farstep_service.kernels.compiled_kernels import find
    from farstep_service.kernels.program import compile_rule
    from farstep_service.optimizers import RULES

    open_directory(directory)
    rule = RULES[package.rule]
    with _alone(directory, lane):
        if find(directory, package, rule) is not None:
            return
        name = name_of(package, rule)
        unfinished = directory / f".{os.getpid()}-{name}"
        device = torch.device(package.device)
        try:
            compile_rule(rule, package.form, device, one_thread=package.threads == "one", to=unfinished)
            unfinished.chmod(0o644)
            unfinished.replace(directory / name)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def _alone(directory: Path, lane: str) -> Iterator[None]:
    """Allow one process at a time in each lane, so that servers that start together compile once."""
    with _locked(directory / f".lock-{lane}"):
        yield


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """Yield a scratch directory for building; first remove those of killed processes.

    A process holds the lock of its directory, which the kernel releases when the process ends.
    """
    with ExitStack() as used:
        with _locked(directory / ".lock"):
            for left in directory.glob(f"{SCRATCH}*"):
                with suppress(BlockingIOError, FileNotFoundError), _locked(left, wait=False):
                    shutil.rmtree(left, ignore_errors=True)
            made = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory, ignore_cleanup_errors=True)
            scratch = Path(used.enter_context(made))
            used.enter_context(_locked(scratch))
        yield scratch


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a directory, or of a file, which is created if missing.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _text(package: CompiledKernel) -> str:
    types = (package.dtype, package.gradient, package.copy)
    return "|".join((package.rule, *types, package.device, package.threads, *package.optional))


def _package(text: str) -> CompiledKernel:
    rule, dtype, gradient, copy, device, threads, *optional = text.split("|")
    return CompiledKernel(rule, dtype, device, "many" if threads == "many" else "one", tuple(optional), gradient, copy)


if __name__ == "__main__":
    main(sys.argv[1:])
