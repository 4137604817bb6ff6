"""A data directory as a release left it: one session, two snapshots, and a journal behind them.

    python -m tests.support.durability.golden     writes tests/durability/golden/format-1.*, for a new format only

All numbers are multiples of a power of two, so that every machine computes the same bits. The server is killed at last,
and the level is `group`: what was acknowledged is there wherever the directory is recovered.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import farstep
from farstep.protocol.durability import to_document
from tests.support.service.raw import RawClient, RawWorker
from tests.support.service.servers import running_server

GOLDEN: Final = Path(__file__).parents[2] / "durability" / "golden"
DIRECTORY: Final = GOLDEN / "format-1.tar.xz"
WRITTEN: Final = GOLDEN / "format-1.json"
PARAMETERS: Final = [torch.arange(6.0).view(2, 3), torch.ones(4)]
OPTIONS: Final[dict[str, Any]] = {
    "optimizer": "SGD",
    "groups": [{"lr": 0.5, "momentum": 0.5}],
    "durability": to_document(farstep.Journal(sync="group")),
    "policy": {"accumulate": 2},
}
BEFORE, AFTER = 8, 5
"""Pushes before the second snapshot, and behind it: the last one waits for another round."""


def push(worker: RawWorker, number: int, **changes: Any) -> dict[str, Any]:
    """Push the gradient of a number, and return the header of the answer."""
    return worker.push(gradient(number), **{"base": number // 2, **changes}).header


def gradient(number: int) -> list[Tensor]:
    """Return a gradient whose elements are small whole numbers."""
    return [torch.full_like(each, float(number % 5 - 2)) + each for each in PARAMETERS]


def state_of(raw: RawClient) -> dict[str, Any]:
    """Return parameters and momentum of the session, as hex."""
    answer = raw.request("GET", "/v1/sessions/golden/contents?fields=param,momentum_buffer")
    return {"version": answer.header["version"], "bytes": answer.payload.hex()}


def of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry without the user who made it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def write() -> None:
    """Write the directory, and what is in it."""
    with tempfile.TemporaryDirectory() as place:
        with running_server("--data-dir", f"{place}/data") as server:
            with RawClient(server.url) as raw:
                (worker,) = raw.begun("golden", parameters=PARAMETERS, **OPTIONS)
                for number in range(BEFORE):
                    push(worker, number)
            server.restart()
            with RawClient(server.url) as raw:
                worker.raw = raw
                while raw.request("GET", "/v1/sessions/golden").status == 503:
                    pass
                for number in range(BEFORE, BEFORE + AFTER):
                    last = push(worker, number)
                said = {
                    "joined": worker.joined,
                    "sequence": worker.last,
                    "receipt": last["receipt"],
                    "state": state_of(raw),
                    "log": raw.request("GET", "/v1/sessions/golden/log").document,
                }
            server.kill()
        GOLDEN.mkdir(exist_ok=True)
        with tarfile.open(DIRECTORY, "w:xz") as archive:
            archive.add(f"{place}/data", "data", filter=of_nobody)
        WRITTEN.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    write()
