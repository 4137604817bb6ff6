"""Session files, written, read and taken apart in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from farstep.protocol.session_file import DESCRIPTION
from farstep.protocol.tensor_file import LENGTH_BYTES, METADATA, head_length, read_head
from farstep_service.durability import file_of, places_of
from farstep_service.kernels import Kernels
from farstep_service.routes.documents import snapshot_of
from farstep_service.session import Session
from farstep_service.tensors import Snapshot


def written(session: Session) -> bytes:
    snapshot, _ = session.snapshot()
    return b"".join(file_of(snapshot))


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the head as JSON, and the data."""
    end = LENGTH_BYTES + int.from_bytes(file[:LENGTH_BYTES], "little")
    return json.loads(file[LENGTH_BYTES:end]), file[end:]


def joined(head: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def read(file: bytes, name: str | None = None) -> Snapshot:
    """Read a file as a server does."""
    length = head_length(file[:LENGTH_BYTES], len(file))
    data = file[LENGTH_BYTES + length :]
    head = read_head(file[LENGTH_BYTES : LENGTH_BYTES + length], len(data))
    snapshot = snapshot_of(head, name)
    for place in places_of(head, snapshot.contents):
        place[:] = data[: len(place)]
        data = data[len(place) :]
    assert not data
    return snapshot


def restored(file: bytes) -> Session:
    snapshot = read(file)
    session = Session(snapshot.plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
    session.restore(snapshot)
    return session


def described(head: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(head[METADATA][DESCRIPTION])
    return found
