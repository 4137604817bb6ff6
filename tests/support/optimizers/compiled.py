"""The compiled kernels that tests use, and a process that builds them while other tests run.

python -m tests.support.optimizers.compiled    # builds what is missing, and ends early when its standard input closes
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import combinations

import torch

from farstep_service.kernels import Kernels
from farstep_service.kernels.build import build_on_all_cores
from farstep_service.optimizers import RULES
from farstep_service.optimizers.rule import KernelSignature

SOON = ("Adagrad", "SGD", "Adam")
"""Optimizers of sessions that tests open in processes: until their kernels are there, each of these begins to build
them, and is gone before it is done."""

EVERY = [
    (name, optional)
    for name, rule in sorted(RULES.items(), key=lambda each: each[0] not in SOON)
    if "fused" in rule.kernels
    for count in range(len(rule.optional_fields) + 1)
    for optional in combinations(rule.optional_fields, count)
]
COMPILED = [(name, KernelSignature("float32", optional)) for name, optional in EVERY]
COMPILED += [("Adadelta", KernelSignature("float64")), ("Adam", KernelSignature("float64"))]
COMPILED += [(name, KernelSignature("bfloat16")) for name, optional in EVERY if not optional]
COMPILED += [(name, KernelSignature("float16")) for name in ("Adagrad", "RMSprop")]
HALF_PRECISION = [
    (name, KernelSignature("float32", optional, "bfloat16", "bfloat16")) for name, optional in EVERY if not optional
]
HALF_PRECISION += [
    ("Adagrad", KernelSignature("float32", (), "float16")),
    ("Adagrad", KernelSignature("float32", (), "float16", "float16")),
]
HALF_PRECISION += [("Adagrad", KernelSignature("float32", (), "", "float32"))]
COMPILED += HALF_PRECISION
"""The compiled kernels that tests use; building all of them takes a minute, once per machine."""


def compiled() -> Kernels:
    """Return these kernels; what has not been built yet is built on all cores."""
    kernels = Kernels("fused", build=build_on_all_cores)
    kernels.begin([(RULES[rule], form) for rule, form in COMPILED], torch.device("cpu"))
    kernels.wait()
    return kernels


def build_beside() -> Callable[[], None]:
    """Build them in a process that gives way to others and ends with this one; return what ends it before."""
    building = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        building.communicate()

    return end


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    os.nice(10)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    compiled()
