"""Compile kernels in a process of their own: `python -m farstep_service.optimizers.build DIRECTORY RULE:DTYPE:...`.

Compiling takes seconds, hundreds of megabytes and a C++ compiler; it must neither slow a step down nor end the server
when it fails. Each package is announced on standard output by one line of JSON, `{"package": ..., "error": ...}`. The
process ends, with every compiler it started, when its standard input closes: whoever asked has gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from farstep_service.optimizers.packages import ARCHIVE, Package

Report = Callable[[Package, str | None], None]
"""Called with each package as soon as it is ready (None), or with why it could not be built."""

Builder = Callable[[Sequence[Package], Path, Report], None]
"""Builds packages in a directory and reports each of them, in order."""


def build_in_subprocess(packages: Sequence[Package], directory: Path, report: Report) -> None:
    """Build packages in another process and report each of them."""
    roots = {str(Path(sys.modules[name].__path__[0]).parent) for name in ("farstep", "farstep_service")}
    paths = [*sorted(roots), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"), "TRITON_CACHE_DIR": str(directory / "triton")}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__, str(directory), *map(_text, packages)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **caches, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    waiting = {_text(package): package for package in packages}
    with process:
        for line in process.stdout or ():
            try:
                told = json.loads(line)
                package = waiting.pop(told["package"])
            except (ValueError, KeyError, TypeError):
                continue  # the compiler talks, too
            report(package, told["error"])
    for package in waiting.values():
        report(package, f"the process that builds it ended with status {process.returncode}")


def main(arguments: Sequence[str]) -> None:
    """Build what the command line names."""
    directory, *names = arguments
    os.nice(10)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in names:
        error: str | None = None
        try:
            _build(_package(name), Path(directory))
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"[:2000]
        print(json.dumps({"package": name, "error": error}), flush=True)


def _build(package: Package, directory: Path) -> None:
    import torch

    from farstep_service.optimizers import RULES
    from farstep_service.optimizers.packages import file_name as name_of
    from farstep_service.optimizers.packages import find, open_directory
    from farstep_service.optimizers.program import compile_rule

    open_directory(directory)
    rule = RULES[package.rule]
    with _alone(directory):
        if find(directory, package, rule) is not None:
            return
        name = name_of(package, rule)
        unfinished = directory / f".{os.getpid()}-{name}"
        archive = unfinished.with_suffix(ARCHIVE)
        device = torch.device(package.device)
        try:
            compile_rule(rule, package.form, device, one_thread=package.threads == "one", to=archive)
            if archive != unfinished:
                _take_library(archive, unfinished)
            unfinished.chmod(0o644)
            unfinished.replace(directory / name)
        finally:
            for each in (archive, unfinished):
                each.unlink(missing_ok=True)


def _take_library(archive: Path, to: Path) -> None:
    """Take the shared library out of torch's archive: loading needs nothing else of it, and no place to unpack."""
    with zipfile.ZipFile(archive) as packed:
        (library,) = (name for name in packed.namelist() if name.endswith(".so"))
        with packed.open(library) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Let one process build at a time, so that several servers that start together compile once."""
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _text(package: Package) -> str:
    types = (package.dtype, package.gradient, package.copy)
    return "|".join((package.rule, *types, package.device, package.threads, *package.optional))


def _package(text: str) -> Package:
    rule, dtype, gradient, copy, device, threads, *optional = text.split("|")
    return Package(rule, dtype, device, "many" if threads == "many" else "one", tuple(optional), gradient, copy)


if __name__ == "__main__":
    main(sys.argv[1:])
