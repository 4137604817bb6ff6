"""Bounds, defaults and patience that the documents state are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from farstep.overlap import LEAST_BYTES, PAUSE_STEPS
from farstep.protocol.consistency import Async, Sync
from farstep.protocol.tensor_file import MAX_HEAD_BYTES, MAX_TENSORS
from farstep.settings import resolve
from farstep.tensors.gradient_sender import LARGE_BYTES
from farstep_service.cli.warmup import Dtype
from farstep_service.coordinator.roster import FORGOTTEN_AFTER_S, LAPSED_KEPT
from farstep_service.kernels import possible, usual
from farstep_service.launch import LaunchPlan
from farstep_service.optimizers import RULES
from farstep_service.settings import Settings
from farstep_service.store.decider import WORTH_A_KERNEL

ROOT = Path(__file__).parents[2]
HOURS = {3600.0: "an hour"}
ELEMENT_TYPES = [dtype.value for dtype in Dtype]


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ("README.md", f"`Unavailable` after `timeout_s` ({resolve({}, {}).timeout_s:.0f} s)"),
        ("README.md", f"`farstep.Sync(workers=N, deadline_s={Sync(workers=2).deadline_s:.0f})`"),
        ("deploy/README.md", f"for one thread and for many: {2 * len(usual(RULES.values(), ['float32']))} |"),
        ("deploy/README.md", f"| {2 * len(usual(RULES.values(), ['float32']))} kernels: every elementwise optimizer"),
        ("deploy/README.md", f"| {2 * len(possible(RULES.values(), ELEMENT_TYPES))} kernels, five to six times"),
        ("docs/launch.md", f"`--max-restarts` | {LaunchPlan(command=('x',)).max_restarts} (torchrun: 0)"),
        ("docs/optimizers.md", f"From {LARGE_BYTES >> 20} MiB of gradients on"),
        ("docs/optimizers.md", f"a session of {WORTH_A_KERNEL:,} parameters or more in one piece"),
        ("docs/overlap.md", f"gradients of less than {LEAST_BYTES >> 10} KiB together go in `step()`"),
        ("docs/overlap.md", f"does without for {PAUSE_STEPS} steps"),
        ("docs/overlap.md", f"A server waits {Settings().idle_body_s:.0f} s for the next byte."),
        ("docs/sessions.md", f"A head has at most {MAX_HEAD_BYTES:,} bytes"),
        ("docs/sessions.md", f"describes at most {MAX_TENSORS:,} tensors"),
        ("docs/workers.md", f"(`lease_s` of the mode, {Async().lease_s:.0f} s by default)"),
        ("docs/workers.md", f"{HOURS[FORGOTTEN_AFTER_S]} has passed, or {LAPSED_KEPT:,} others went away after it"),
        ("client/farstep/protocol/PROTOCOL.md", f"(`lease_s` of the mode, {Async().lease_s:.0f} s)"),
        (
            "client/farstep/protocol/PROTOCOL.md",
            f"{HOURS[FORGOTTEN_AFTER_S]} has passed, or {LAPSED_KEPT:,} others have",
        ),
        ("client/farstep/protocol/PROTOCOL.md", f"after {Settings().idle_body_s:.0f} s without a byte"),
    ],
)
def test_a_number_in_the_documents_is_that_of_the_code(document: str, sentence: str) -> None:
    """The sentence stands in the document with the number that the code has."""
    assert sentence in " ".join((ROOT / document).read_text().split())


def test_each_decision_has_a_number_of_its_own() -> None:
    """A decision is referred to by its number, which stands in its file's name and in its title."""
    decisions = sorted((ROOT / "service" / "decisions").glob("*.md"))
    numbers = [int(each.name.partition("-")[0]) for each in decisions]
    assert numbers == sorted(set(numbers))
    for number, each in zip(numbers, decisions, strict=True):
        assert each.read_text().startswith(f"# {number}. ")
