"""Compiled kernels as files: their names for this machine, their directory, and the check of their owner.

A package is a shared library that is loaded into this process (on a GPU an archive with one in it), so the directory
must belong to this user (or to root, as in an image), and other users must not be able to write there. A file's name
holds a hash of everything its contents depend on: torch, the source of the rule and of the compilation, the element
type, the machine's instructions, the number of threads. So a file that exists is valid; files are created by renaming.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from farstep.errors import Unavailable
from farstep_service.kernels import library, program
from farstep_service.optimizers import arithmetic
from farstep_service.optimizers.rule import AnyRule, Fields, KernelSignature, Rule

Threads = Literal["one", "many"]
"""Whether a package uses one thread or all of torch's. Waking a second one costs more than a small span."""


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """The identity of one compiled kernel.

    Attributes:
        rule: the rule's name.
        dtype: the element type, under its wire name.
        device: the torch device it runs on.
        threads: the threads it was compiled for; always `one` on a GPU.
        optional: the optional state fields in use.
        gradient, copy: the element types of the gradients and of a copy, as `KernelSignature` has them.
    """

    rule: str
    dtype: str
    device: str
    threads: Threads = "one"
    optional: Fields = ()
    gradient: str = ""
    copy: str = ""

    @classmethod
    def of(cls, rule: AnyRule, form: KernelSignature, device: str) -> CompiledKernel:
        """Return the package of a rule in a form, for one thread."""
        return cls(rule.name, form.dtype, device, "one", form.optional, form.gradient, form.copy)

    @property
    def form(self) -> KernelSignature:
        """Return the signature that the rule is compiled for."""
        return KernelSignature(self.dtype, self.optional, self.gradient, self.copy)


ARCHIVE = ".pt2"
"""The suffix of torch's own archives."""


def default_directory() -> Path:
    """Return `FARSTEP_KERNEL_CACHE`, or `farstep/kernels` in the user's cache directory."""
    if told := os.environ.get("FARSTEP_KERNEL_CACHE"):
        return Path(told)
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "farstep" / "kernels"


def file_name(package: CompiledKernel, rule: AnyRule) -> str:
    """Return the file name of the package for this machine and these sources."""
    facts = [torch.__version__, _sources(type(rule)), *package.form, package.threads, machine(package.device)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    types = [package.dtype, package.gradient and f"from-{package.gradient}", package.copy and f"to-{package.copy}"]
    kind = torch.device(package.device).type
    names = (package.rule, *package.optional, *filter(None, types), kind, package.threads, key)
    return "-".join(names) + (".so" if kind == "cpu" else ARCHIVE)


@cache
def _sources(rule: type[AnyRule]) -> str:
    rules = [each for each in rule.__mro__ if issubclass(each, Rule) and each is not Rule]
    sources = [*map(inspect.getsourcefile, rules), *map(inspect.getsourcefile, (arithmetic, library, program))]
    files = [source or "" for source in sources]
    return hashlib.sha256(b"\0".join(Path(file).read_bytes() for file in files)).hexdigest()


INSTRUCTIONS = (
    "sse",
    "ssse",
    "avx",
    "amx",
    "fma",
    "f16c",
    "bmi",
    "abm",
    "popcnt",
    "movbe",
    "adx",
    "sha",
    "aes",
    "vaes",
)
"""Prefixes of x86 processor flags that a compiler may use; others differ between equal processors."""


@cache
def machine(device: str) -> str:
    """Return what compiled code depends on: the processor's instructions, or the GPU's architecture."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return f"{torch.cuda.get_device_name(chosen)} {torch.cuda.get_device_capability(chosen)} {torch.version.cuda}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    if platform.machine() == "x86_64":
        flags = " ".join(sorted(flag for flag in flags.split() if flag.startswith(INSTRUCTIONS)))
    return f"{platform.machine()} {flags}"


def open_directory(directory: Path) -> None:
    """Create the directory, accessible by this user only, if it is missing.

    Raises:
        Unavailable: it cannot be created, or another user could write into it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise Unavailable(
            f"The directory for compiled kernels, {directory}, cannot be made: {exc.strerror}.",
            remedy="Set FARSTEP_KERNEL_CACHE to a directory of yours.",
        ) from exc
    _check_owner(directory)


def find(directory: Path, package: CompiledKernel, rule: AnyRule) -> Path | None:
    """Return the package's file, None if it has not been built.

    Raises:
        Unavailable: another user could have written the file or its directory.
    """
    path = directory / file_name(package, rule)
    if not path.exists():
        return None
    _check_owner(directory)
    _check_owner(path)
    return path


def _check_owner(path: Path) -> None:
    status = path.lstat()
    ours = status.st_uid in (os.geteuid(), 0)
    if not ours or stat.S_ISLNK(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(
            f"Compiled kernels are not loaded from {path}: others could have written it.",
            remedy="It must be yours or root's, no link, and writable by its owner only (chmod go-w).",
        )
