"""The choice of a step's kernel: the fused one as soon as it is ready, the reference one until then.

    prepare(rule, forms, device)       a session opens, or its options ask for more state
        │  in the cache directory? ── yes ──► loaded (milliseconds)          ready
        │  no
        ▼
    a process builds it, in the background (10 to 25 s) ──► loaded            ready
        │  no compiler, no place
        ▼
    failed: said once in the log, kept in `status()`; the reference kernel goes on

One step runs one kernel for all its memory, whose name is recorded with the step, so that replay gives the same bits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, final

import torch

from farstep.errors import InvalidOption, Unavailable
from farstep_service.kernels.build import Builder, build_in_subprocess
from farstep_service.kernels.compiled_kernels import CompiledKernel, default_directory, find, open_directory
from farstep_service.kernels.fused import FusedKernel
from farstep_service.kernels.kernel import Kernel, KernelSource
from farstep_service.kernels.native import load
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.optimizers.rule import AnyMethod, AnyRule, ElementwiseRule, KernelName, KernelSignature

Mode = Literal["auto", "reference", "fused"]
MODES: tuple[Mode, ...] = ("auto", "reference", "fused")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KernelStatus:
    """The status of one compiled kernel, and the reason if it failed."""

    package: CompiledKernel
    state: Literal["building", "ready", "failed"]
    reason: str = ""


@final
class Kernels(KernelSource):
    """The kernels of this process.

    Args:
        mode: `auto` as drawn above; `reference` compiles nothing; `fused` waits for the compiled kernel and fails
            without it.
        directory: the directory of packages; in the user's cache directory by default.
        build: builds packages; by default in another process.
    """

    def __init__(
        self, mode: Mode = "auto", *, directory: Path | None = None, build: Builder = build_in_subprocess
    ) -> None:
        if mode not in MODES:
            raise InvalidOption(f"There is no kernel mode {mode!r:.80}.", field="kernels", remedy=f"Use {MODES}.")
        self.mode: Mode = mode
        self._directory = directory or default_directory()
        self._build = build
        self._changed = threading.Condition()
        self._builders = 0
        self._status: dict[CompiledKernel, KernelStatus] = {}
        self._rules: dict[str, AnyRule] = {}
        self._fused: dict[tuple[str, torch.device], FusedKernel] = {}
        self._references: dict[str, ReferenceKernel] = {}
        self._warned = False

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Load the packages that exist and begin to build the rest; wait only in the mode `fused`.

        Raises:
            Unavailable: the mode is `fused` and the kernel is not available.
        """
        if self.mode != "reference" and "fused" in rule.kernels:
            needed = self.begin([(rule, form) for form in forms], device)
            if self.mode == "fused":
                self._require(needed)

    def begin(self, wanted: Iterable[tuple[AnyRule, KernelSignature]], device: torch.device) -> list[CompiledKernel]:
        """Load the packages that exist, begin to build the rest in one process, and return those that a step needs.

        Args:
            wanted: rules and their forms. device: of the memory.
        """
        needed: list[CompiledKernel] = []
        for rule, form in wanted:
            self._rules[rule.name] = rule
            needed.append(CompiledKernel.of(rule, form, str(device)))
        spare = [replace(package, threads="many") for package in needed]
        every = needed + (spare if device.type == "cpu" and torch.get_num_threads() > 1 else [])
        with self._changed:
            missing = [package for package in every if package not in self._status and not self._load(package)]
            self._builders += bool(missing)
        if missing:
            threading.Thread(target=self._build_all, args=(missing,), name="farstep-kernel-build", daemon=True).start()
        return needed

    def improve(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Load these packages or begin to build them, if this process compiles kernels."""
        forms = list(forms)
        if self.mode != "reference" and "fused" in rule.kernels and not self.ready(rule, forms, device):
            self.begin([(rule, form) for form in forms], device)

    def ready(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> bool:
        """Return whether the fused kernel can run a step over memory of these forms now."""
        fused = self._fused.get((rule.name, device))
        return fused is not None and fused.ready(forms)

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        """Return the kernel for a step; see `KernelSource`."""
        alone = wanted is None and (self.mode == "reference" or "fused" not in rule.kernels)
        if not forms or wanted == "reference" or alone:
            return self.reference(rule)
        if not self.ready(rule, forms, device):
            if wanted is None and self.mode == "auto":
                self.prepare(rule, forms, device)
                return self.reference(rule)
            if "fused" not in rule.kernels:
                raise Unavailable(f"There is no fused kernel for {rule.name}.")
            if self.mode == "reference":
                raise Unavailable(
                    "The fused kernel was asked for, but this process runs reference kernels only.",
                    remedy="Start it with the kernel mode auto or fused.",
                )
            self._require(self.begin([(rule, form) for form in forms], device))
        return self._fused[rule.name, device]

    def reference(self, rule: AnyRule) -> Kernel:
        """Return the kernel that is always available."""
        found = self._references.get(rule.name)
        return found or self._references.setdefault(rule.name, ReferenceKernel(rule))

    def status(self) -> list[KernelStatus]:
        """Return the status of each requested kernel."""
        with self._changed:
            return list(self._status.values())

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all builds have ended and cleaned up; return False on a timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._builders == 0, timeout_s)

    def _require(self, packages: Sequence[CompiledKernel]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(self._status[package].state != "building" for package in packages))
            failed = [status for package in packages if (status := self._status[package]).state == "failed"]
        if failed:
            raise Unavailable(
                f"The fused kernel for {failed[0].package.rule} cannot be had: {failed[0].reason}",
                remedy="Install a C++ compiler, build kernels ahead with `farstep warmup`, or use the mode auto.",
            )

    def _load(self, package: CompiledKernel) -> bool:
        """Load a package; if it does not exist, mark it as being built and return False."""
        rule, device = self._rules[package.rule], torch.device(package.device)
        try:
            path = find(self._directory, package, rule)
            if path is None:
                self._status[package] = KernelStatus(package, "building")
                return False
            program = load(path, device)
        except Exception as exc:
            self._fail(package, str(exc))
        else:
            fused = self._fused.setdefault((package.rule, device), FusedKernel(rule, device))
            fused.add(package.form, program, many_threads=package.threads == "many")
            self._status[package] = KernelStatus(package, "ready")
        return True

    def _build_all(self, packages: Sequence[CompiledKernel]) -> None:
        def report(package: CompiledKernel, error: str | None) -> None:
            with self._changed:
                if error is not None:
                    self._fail(package, error)
                elif not self._load(package):
                    self._fail(package, "it was built and is not there")
                self._changed.notify_all()

        try:
            open_directory(self._directory)
            self._build(packages, self._directory, report)
        except Exception as exc:
            log.debug("building kernels ended early", exc_info=True)
            for package in packages:
                if self._status[package].state == "building":
                    report(package, str(exc))
        finally:
            with self._changed:
                self._builders -= 1
                self._changed.notify_all()

    def _fail(self, package: CompiledKernel, reason: str) -> None:
        self._status[package] = KernelStatus(package, "failed", reason)
        if package.gradient or package.copy:
            log.debug("%s: no kernel that widens or copies on the way (%s)", package.rule, reason.partition("\n")[0])
            return
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        log.log(level, "%s runs on reference kernels: no fused one (%s)", package.rule, reason.partition("\n")[0])


def usual(rules: Iterable[AnyMethod], dtypes: Sequence[str]) -> list[tuple[AnyRule, KernelSignature]]:
    """Return the kernels worth building ahead: each rule that can be fused, with the state that most options use."""
    return [
        (rule, KernelSignature(dtype, optional))
        for rule in _fusible(rules)
        for dtype in dtypes
        for optional in rule.usual
    ]


def possible(rules: Iterable[AnyMethod], dtypes: Sequence[str]) -> list[tuple[AnyRule, KernelSignature]]:
    """Return each rule that can be fused with every choice of optional state: the usual ones first."""
    found = dict.fromkeys(usual(rules, dtypes))
    for rule in _fusible(rules):
        for count in range(len(rule.optional_fields) + 1):
            for optional in combinations(rule.optional_fields, count):
                found |= dict.fromkeys((rule, KernelSignature(dtype, optional)) for dtype in dtypes)
    return list(found)


def _fusible(rules: Iterable[AnyMethod]) -> list[ElementwiseRule[Any]]:
    return [rule for rule in rules if isinstance(rule, ElementwiseRule) and "fused" in rule.kernels]
