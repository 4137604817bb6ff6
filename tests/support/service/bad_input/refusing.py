"""What is sent to be refused, and how it is: pushes for parameters of every dtype, and JSON documents."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from farstep.protocol import encode
from tests.support.service.answers import Answer
from tests.support.service.raw import RawClient, RawWorker, gradient, session_document

PARAMETERS = (
    torch.linspace(-1, 1, 12).view(3, 4),
    torch.ones(5, dtype=torch.float64),
    torch.ones(3, dtype=torch.bfloat16),
    torch.ones(2, dtype=torch.complex64),
    torch.ones(4, dtype=torch.float16),
    torch.ones(1, dtype=torch.complex128),
    torch.ones(6),
)
AT_ONCE_S = 1.0
JSON = {"content-type": "application/json"}
BAD_NAMES: tuple[object, ...] = (
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "a\\b",
    "-dash",
    "_under",
    " space",
    "a b",
    "a\x00",
    "a\n",
    "a%2fb",
    "é",
    "\ud800",
    "x" * 64,
    "x" * 100_000,
    1,
    None,
    ["s"],
    {},
    True,
)
INTERNAL = ("Traceback", "internal error")


def refused_as(ask: Callable[[], Answer], *codes: str) -> Answer:
    """Check that a request is refused with one of these codes, at once."""
    began = time.perf_counter()
    answer = ask()
    assert time.perf_counter() - began < AT_ONCE_S
    assert answer.code in codes, answer.body
    assert 400 <= answer.status < 500
    return answer


def refused(ask: Callable[[], Answer], status: int, code: str, field: str | None = None) -> Answer:
    """Check that a request is refused at once with a code, its status, and the name of what is wrong."""
    answer = refused_as(ask, code)
    assert answer.status == status, answer.body
    if field is not None:
        assert answer.document.get("field") == field, answer.body
    return answer


def good(worker: RawWorker, **changes: Any) -> bytes:
    """Return the body of a good push."""
    return b"".join(encode(*worker.message(gradient(1, PARAMETERS), **changes)))


def create(raw: RawClient, **document: Any) -> Answer:
    return raw.json("POST", "/v1/sessions", {**session_document("bad", "w0"), **document})
