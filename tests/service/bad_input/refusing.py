"""A session of parameters of every dtype, good pushes for it, and how a bad one is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from farstep.wire import encode
from tests.service.answers import Answer
from tests.service.raw import RawWorker, gradient

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
INTERNAL = ("Traceback", "internal error")


def refused(ask: Callable[[], Answer], status: int, code: str, field: str | None = None) -> Answer:
    """Check how a request is refused, and that it does not take long."""
    began = time.perf_counter()
    answer = ask()
    assert time.perf_counter() - began < AT_ONCE_S
    assert (answer.status, answer.code) == (status, code), answer.body
    if field is not None:
        assert answer.document.get("field") == field, answer.body
    return answer


def good(worker: RawWorker, **changes: Any) -> bytes:
    """Return the body of a good push."""
    return b"".join(encode(*worker.message(gradient(1, PARAMETERS), **changes)))
