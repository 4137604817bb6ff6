"""Sessions that were trained, and what a server says of their histories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.service.raw import RawClient, RawWorker, gradient

SHAPES = [torch.zeros(4), torch.zeros(2, 3)]


def trained(raw: RawClient, session: str, steps: int, **document: Any) -> tuple[RawWorker, list[list[Tensor]]]:
    """Return a worker that took some steps, and the parameters of each version from 0 on."""
    (worker,) = raw.begun(session, parameters=SHAPES, **document)
    versions = [worker.pull()[1]]
    for step in range(steps):
        assert worker.push(gradient(step, SHAPES), base=step).status == 200
        versions.append(worker.pull()[1])
    return worker, versions


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether tensors have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def came_back(raw: RawClient, session: str) -> None:
    """Return when a session is recovered."""
    while raw.request("GET", f"/v1/sessions/{session}").status == 503:
        pass


def lines_of(raw: RawClient, session: str, query: str = "") -> list[dict[str, Any]]:
    """Return the log of a session."""
    answer = raw.request("GET", f"/v1/sessions/{session}/log{query}")
    assert answer.status == 200, answer.body
    lines: list[dict[str, Any]] = answer.document
    return lines


def post(raw: RawClient, path: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a document."""
    answer = raw.json("POST", f"/v1/sessions/{path}", document)
    assert answer.status in (200, 201), answer.body
    found: dict[str, Any] = answer.document
    return found
