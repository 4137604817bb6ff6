"""The protocol by hand: a client that sends what it is told to, right or wrong.

raw = RawClient(server.url)
worker = raw.join("s", "w0")             # creates the session
worker.begin([torch.zeros(3)])           # first parameters
worker.push([torch.ones(3)])             # an Answer: status, problem, header, payload
raw.message("POST", path, header, ...)   # anything at all
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from torch import Tensor

from farstep.protocol import encode, to_ranges
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from tests.support.service.answers import MSGPACK, TIMEOUT_S, Answer


def specs(*parameters: Tensor, names: Sequence[str] = (), group: int = 0) -> list[dict[str, Any]]:
    """Describe parameters as a session document does."""
    return [
        {
            "name": names[index] if names else f"p{index}",
            "shape": list(each.shape),
            "dtype": str(each.dtype).removeprefix("torch."),
            "group": group,
        }
        for index, each in enumerate(parameters)
    ]


def payload_of(tensors: Iterable[Tensor | None]) -> list[memoryview]:
    """Return the payload of dense and sparse tensors, in their order."""
    views: list[memoryview] = []
    for each in tensors:
        if each is None:
            continue
        parts = (each._indices(), each._values()) if each.is_sparse else (each.detach(),)
        views += [tensor_memory(part.contiguous()) for part in parts]
    return views


def tensors_of(payload: bytes, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that a payload holds."""
    tensors, at = [], 0
    for each in like:
        fresh = torch.empty(each.shape, dtype=each.dtype)
        tensor_memory(fresh)[:] = payload[at : at + fresh.nbytes]
        at += fresh.nbytes
        tensors.append(fresh)
    assert at == len(payload)
    return tensors


@dataclass
class RawWorker:
    """One worker of a session, counting its own sequence.

    Attributes:
        parameters: tensors of the session's shapes.
        last: the sequence of its last committed write.
    """

    raw: RawClient
    session: str
    name: str
    joined: dict[str, Any]
    parameters: list[Tensor]
    last: int = 0

    @property
    def path(self) -> str:
        """Return the path of its session."""
        return f"/v1/sessions/{self.session}"

    def head(self, **changes: Any) -> dict[str, Any]:
        """Return the header of its next push, with changes; a value of `...` takes the key out."""
        head = {
            "v": 1,
            "incarnation": self.joined["incarnation"],
            "worker": self.name,
            "epoch": self.joined["epoch"],
            "seq": self.last + 1,
            "base": 0,
            **changes,
        }
        return {key: value for key, value in head.items() if value is not ...}

    def begin(self, parameters: Sequence[Tensor] | None = None, **changes: Any) -> Answer:
        """Send first parameters."""
        return self.put({"param": list(parameters or self.parameters)}, initial=True, **changes)

    def put(self, contents: Mapping[str, Sequence[Tensor]], **changes: Any) -> Answer:
        """Send contents."""
        head = self.head(fields=list(contents), **{"base": ..., **changes})
        payload = [view for field in contents.values() for view in payload_of(field)]
        return self.noted(self.raw.message("PUT", f"{self.path}/contents", head, payload))

    def push(self, gradients: Sequence[Tensor | None], **changes: Any) -> Answer:
        """Send gradients; a retry is `seq=...` of the first time."""
        return self.noted(self.raw.message("POST", f"{self.path}/push", *self.message(gradients, **changes)))

    def append(self, tensors: Mapping[str, Tensor], **changes: Any) -> Answer:
        """Send a param group with these parameters, by default the second."""
        return self.noted(self.raw.message("POST", f"{self.path}/groups", *self.group(tensors, **changes)))

    def group(self, tensors: Mapping[str, Tensor], **changes: Any) -> tuple[dict[str, Any], list[memoryview]]:
        """Return header and payload of a param group."""
        parameters = [
            [each["name"], each["shape"], each["dtype"]] for each in specs(*tensors.values(), names=[*tensors])
        ]
        announced = {"base": ..., "group": 1, "options": {"lr": 0.3}, "parameters": parameters}
        return self.head(**{**announced, **changes}), payload_of(tensors.values())

    def message(self, gradients: Sequence[Tensor | None], **changes: Any) -> tuple[dict[str, Any], list[memoryview]]:
        """Return header and payload of a push."""
        present = [index for index, each in enumerate(gradients) if each is not None]
        sparse = [
            [index, each.sparse_dim(), each._nnz()]
            for index, each in enumerate(gradients)
            if each is not None and each.is_sparse
        ]
        announced: dict[str, Any] = {"sparse": sparse} if sparse else {}
        if len(present) < len(gradients):
            announced["segments"] = to_ranges(present)
        return self.head(**{**announced, **changes}), payload_of(gradients)

    def noted(self, answer: Answer) -> Answer:
        """Count a sequence as committed if the answer says that it is."""
        if answer.status == 200 and not answer.header["duplicate"]:
            self.last += 1
        return answer

    def pull(self) -> tuple[int, list[Tensor]]:
        """Return version and parameters."""
        answer = self.raw.request("GET", f"{self.path}/contents")
        return int(answer.header["version"]), tensors_of(answer.payload, self.parameters)

    @property
    def version(self) -> int:
        """Return the session's version."""
        return int(self.raw.request("GET", self.path).document["version"])


@dataclass
class RawClient:
    """A client of one server."""

    url: str
    token: str | None = None
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=TIMEOUT_S)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def request(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request as it is."""
        response = self.http.request(method, path, content=content, headers=dict(headers or {}))
        return Answer(response.status_code, response.headers.get("content-type", ""), response.content)

    def json(self, method: str, path: str, document: object) -> Answer:
        """Send a JSON document; floats that JSON has no place for are written as Python does."""
        return self.request(method, path, json.dumps(document).encode(), {"content-type": "application/json"})

    def message(
        self, method: str, path: str, header: Mapping[str, Any], payload: Sequence[memoryview | bytes] = ()
    ) -> Answer:
        """Send a message of the protocol."""
        body = b"".join(encode(header, [memoryview(each) for each in payload]))
        return self.request(method, path, body, {"content-type": MSGPACK})

    def join(
        self, session: str, worker: str = "w0", parameters: Sequence[Tensor] = (torch.zeros(4),), **document: Any
    ) -> RawWorker:
        """Create or join a session."""
        answer = self.json("POST", "/v1/sessions", session_document(session, worker, parameters, **document))
        assert answer.status == 200, answer.body
        return RawWorker(self, session, worker, answer.document, list(parameters))

    def begun(
        self, session: str, *workers: str, parameters: Sequence[Tensor] = (torch.zeros(4),), **document: Any
    ) -> list[RawWorker]:
        """Create a session of some workers with these first parameters."""
        joined = [self.join(session, worker, parameters, **document) for worker in workers or ("w0",)]
        assert joined[0].begin().status == 200
        return joined


def session_document(
    session: str, worker: str, parameters: Sequence[Tensor] = (torch.zeros(4),), **document: Any
) -> dict[str, Any]:
    """Return the document that creates or joins a session; a value of `...` takes the key out."""
    known = {
        "name": session,
        "worker": worker,
        "optimizer": "Adagrad",
        "groups": [{"lr": 0.1}],
        "segments": specs(*parameters),
        "kernel": "reference",
        **document,
    }
    return {key: value for key, value in known.items() if value is not ...}


def gradient(seed: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Return random gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in like]


def zeros(dtype: str, *shape: int) -> Tensor:
    """Return zeros of a dtype by its name on the wire."""
    return torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
