"""A bad server must not hurt a client: whatever it answers, to whatever it is asked, is an error of ours, in bounds."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

import farstep
from farstep.errors import (
    BY_CODE,
    FarstepError,
    Fenced,
    InvalidAnswer,
    InvalidFile,
    ProtocolMismatch,
    ResponseTooLarge,
    Unavailable,
    UnsupportedMedia,
)
from farstep.optim import Adagrad
from farstep_service.cli.remote import open_conversation, sessions_of
from tests.support.client.failing import SHAPES, SHORT_S
from tests.support.client.hostile import (
    PICKLED,
    Liar,
    Write,
    bomb,
    deep,
    endless,
    head,
    hostile,
    http,
    silent,
    trickling,
)
from tests.support.client.twins import Twins, check_parameters, drawn, parameters
from tests.support.service.servers import TOKEN, RunningServer

JSON, MSGPACK, FILE = "application/json", "application/msgpack", "application/octet-stream"
PROBLEM = "application/problem+json"
MOST_BYTES = 32 << 20
"""Memory that an answer may cost, whatever it is; a client's own buffers included."""
WITHIN_S = 20.0
"""A second here is a minute where eight others use the machine."""
CHUNKED = "Transfer-Encoding: chunked"


@dataclass
class Trial:
    """One kind of request: which it is, of which type its answer, and what makes the client send it."""

    method: str
    path: str
    kind: str
    ask: Callable[[Twins, Liar, Path], object]


def step_with_an_edit(twins: Twins, liar: Liar, tmp_path: Path) -> None:
    with torch.no_grad():
        twins.here[0].add_(1)
        twins.there[0].add_(1)
    twins.ours.step()


def step_after_a_bad_answer(twins: Twins, liar: Liar, tmp_path: Path) -> None:
    lie, liar._lie = liar._lie, ("POST", "/push", http(b"", kind="text/html"), None)
    with pytest.raises(InvalidAnswer):
        twins.ours.step()
    liar._lie = lie
    twins.ours.step()


def listing(twins: Twins, liar: Liar, tmp_path: Path) -> None:
    with open_conversation(liar.url, TOKEN) as conversation:
        sessions_of(conversation)


TRIALS = {
    "join": Trial(
        "POST", "/sessions", JSON, lambda t, liar, _: Adagrad(parameters(drawn(0)), server=liar.url, token=TOKEN)
    ),
    "push": Trial("POST", "/push", MSGPACK, lambda t, *_: t.ours.step()),
    "pull": Trial("GET", "/contents", MSGPACK, lambda t, *_: t.ours.pull()),
    "state": Trial("GET", "/contents", MSGPACK, lambda t, *_: t.ours.state_dict()),
    "put": Trial("PUT", "/contents", MSGPACK, step_with_an_edit),
    "groups": Trial(
        "POST", "/groups", MSGPACK, lambda t, *_: t.ours.add_param_group({"params": parameters(drawn(9, [(2,)]))})
    ),
    "heartbeat": Trial("PUT", "/lease", JSON, lambda t, *_: t.ours.heartbeat()),
    "page": Trial("GET", "/w0", JSON, step_after_a_bad_answer),
    "export": Trial(
        "GET",
        "/file",
        FILE,
        lambda t, liar, path: farstep.export_session(t.ours.session, path / "s", server=liar.url, token=TOKEN),
    ),
    "listing": Trial("GET", "/sessions", JSON, listing),
}


@pytest.fixture(scope="module")
def liar(server: RunningServer) -> Iterator[Liar]:
    with hostile(server.port) as front:
        yield front


@pytest.fixture(scope="module")
def elsewhere(server: RunningServer) -> Iterator[Liar]:
    """Return where bad servers redirect to."""
    with hostile(server.port) as other:
        yield other


def twins_of(liar: Liar, **options: Any) -> Twins:
    place: Any = {"kernel": "reference", "server": liar.url, "worker": "w0", "token": TOKEN, **options}
    twins = Twins("Adagrad", {"lr": 0.1}, place, start=drawn(0, SHAPES))
    twins.step(drawn(1, SHAPES))
    twins.give(drawn(2, SHAPES))
    return twins


def refused(trial: Trial, twins: Twins, liar: Liar, tmp_path: Path) -> FarstepError:
    """Return the error of a request that is lied to, having checked what it cost and that nothing has changed."""
    version, told = twins.ours.version, liar.told
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(FarstepError) as raised:
            trial.ask(twins, liar, tmp_path)
        took_s, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        liar.honest()
    assert liar.told > told, "nothing was asked"
    assert peak < MOST_BYTES
    assert took_s < WITHIN_S
    assert BY_CODE[raised.value.code] is type(raised.value)
    assert TOKEN not in f"{raised.value!s} {raised.value!r} {raised.value.to_problem()}"
    check_parameters(twins.here, twins.there)  # torch has not stepped either
    assert twins.ours.version == version
    assert not list(tmp_path.iterdir())
    return raised.value


@cache
def lies_to(kind: str) -> dict[str, tuple[bytes | Write, type[FarstepError]]]:
    """Return bad answers of a type, and what each has to be."""
    odd = {"code": "fenced", "self": 1, "detail": ["x"] * 500, "limit": {"a": 1}, "side": 3, "remedy": "\x1b[2J"}
    claimed = head(kind, "Content-Length: 90000000")
    lies: dict[str, tuple[bytes | Write, type[FarstepError]]] = {
        "a gzip bomb": (bomb(kind), UnsupportedMedia),
        "an unknown coding": (http(b"{}", kind=kind, extra="Content-Encoding: br\r\n"), UnsupportedMedia),
        "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", InvalidAnswer),
        "a page": (http(b"<html>hello</html>", kind="text/html"), InvalidAnswer),
        "no type": (http(b"{}"), InvalidAnswer),
        "nothing": (http(b"", kind=kind), InvalidAnswer),
        "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", InvalidAnswer),
        "a pickle": (http(PICKLED, kind=kind), ProtocolMismatch if kind == MSGPACK else InvalidAnswer),
        "another upgrade": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", InvalidAnswer),
        "a head without end": (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), ResponseTooLarge),
        "a header without end": (endless(b"HTTP/1.1 200 OK\r\nX: ", b"y"), ResponseTooLarge),
        "interim answers": (endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), InvalidAnswer),
        "two lengths": (head(kind, "Content-Length: 5", "Content-Length: 6") + b"hello!", InvalidAnswer),
        "a negative length": (head(kind, "Content-Length: -5") + b"hello", InvalidAnswer),
        "chunk extensions": (
            endless(head(kind, CHUNKED), b"1;" + b"x" * 60_000 + b"\r\n \r\n"),
            InvalidAnswer if kind == MSGPACK else ResponseTooLarge,
        ),
        "a bad chunk": (head(kind, CHUNKED) + b"zz\r\n", InvalidAnswer),
        "an odd problem": (http(json.dumps(odd).encode(), status="409 Conflict", kind=PROBLEM), Fenced),
        "a problem that is none": (http(b'{"code": ["busy"]}', status="400 Bad", kind=PROBLEM), InvalidAnswer),
        "a deep problem": (http(deep(20_000), status="400 Bad", kind=PROBLEM), InvalidAnswer),
        "a problem without end": (
            endless(b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"[" * 1024 + b"\r\n"),
            InvalidAnswer,
        ),
        "an unknown code": (http(b'{"code": "of_tomorrow"}', status="418 Teapot", kind=PROBLEM), FarstepError),
    }
    if kind == JSON:
        lies |= {
            "90 MB": (claimed + b"[0", ResponseTooLarge),
            "JSON without end": (endless(head(kind, CHUNKED), b"400\r\n" + b"0," * 512 + b"\r\n"), ResponseTooLarge),
            "trailers": (endless(head(kind, CHUNKED) + b"2\r\n{}\r\n0\r\n", b"a: b\r\n"), ResponseTooLarge),
            "deep JSON": (http(deep(), kind=kind), InvalidAnswer),
            "many containers": (http(b"[" + b"[]," * 300_000 + b"0]", kind=kind), ResponseTooLarge),
            "a name twice": (http(b'{"epoch": 1, "epoch": 2}', kind=kind), InvalidAnswer),
            "NaN": (http(b'{"epoch": NaN}', kind=kind), InvalidAnswer),
            "half of it": (http(b'{"epoch": ', kind=kind), InvalidAnswer),
            "not UTF-8": (http(b'{"epoch": "\xff"}', kind=kind), InvalidAnswer),
            "a digit too many": (http(b"9" * 100_000, kind=kind), InvalidAnswer),
        }
    if kind == MSGPACK:
        lies |= {
            "version 2": (http(msgpack.packb({"v": 2}), kind=kind), ProtocolMismatch),
            "version true": (http(msgpack.packb({"v": True}), kind=kind), ProtocolMismatch),
            "no version": (http(msgpack.packb({"incarnation": "x"}), kind=kind), ProtocolMismatch),
            "version only": (http(msgpack.packb({"v": 1}), kind=kind), InvalidAnswer),
            "a list": (http(msgpack.packb([1, 2]), kind=kind), InvalidAnswer),
            "a text of 4 GB": (endless(claimed + b"\x81\xa1v\xdb\xff\xff\xff\xff", b"x"), ResponseTooLarge),
            "deep msgpack": (http(b"\x81\xa1v" + b"\x91" * 100_000 + b"\x90", kind=kind), ResponseTooLarge),
            "a timestamp": (http(b"\x81\xa1v\xd6\xff\0\0\0\0", kind=kind), InvalidAnswer),
            "half a header": (http(b"\x82\xa1v\x01\xa1", kind=kind), InvalidAnswer),
        }
    return lies


CASES = [pytest.param(name, lie, id=f"{name}: {lie}") for name, each in TRIALS.items() for lie in lies_to(each.kind)]


@pytest.fixture(scope="module")
def of_kind(liar: Liar) -> Callable[[str], Twins]:
    """Return the training that a kind of request is tried with."""
    made: dict[str, Twins] = {}

    def twins(name: str) -> Twins:
        if name not in made:
            made[name] = twins_of(liar)
        if name == "state":  # which is asked for only if it may have changed since it was last read
            made[name].ours.step()
            made[name].theirs.step()
        return made[name]

    return twins


@pytest.mark.promise(
    "Whatever a bad server answers is an error of farstep, and leaves the model as it was.",
    area="client errors",
)
@pytest.mark.parametrize(("name", "lie"), CASES)
def test_a_bad_answer_is_an_error_of_ours(
    name: str, lie: str, liar: Liar, of_kind: Callable[[str], Twins], tmp_path: Path
) -> None:
    """Of the right class, at once, in bounded memory; parameters and version stay, and the next call works."""
    trial, twins = TRIALS[name], of_kind(name)
    answer, expected = lies_to(trial.kind)[lie]
    liar.answer(trial.method, trial.path, answer)
    error = refused(trial, twins, liar, tmp_path)
    fitting = {expected, InvalidFile} if expected is InvalidAnswer and name == "export" else {expected}
    assert type(error) in fitting, error
    if expected is not Fenced:
        assert error.side == "client" or expected is FarstepError
    if trial.kind == MSGPACK or name == "page":
        twins.ours.step()  # the one that was refused, again
        twins.theirs.step()
        twins.check()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("name", TRIALS)
def test_a_redirect_is_not_followed(
    name: str, status: int, liar: Liar, elsewhere: Liar, of_kind: Callable[[str], Twins], tmp_path: Path
) -> None:
    """Nobody else gets a request, or the token with it."""
    trial, twins = TRIALS[name], of_kind(name)
    extra = f"Location: {elsewhere.url}/v1/sessions\r\n"
    liar.answer(trial.method, trial.path, http(b"", status=f"{status} Elsewhere", extra=extra))
    error = refused(trial, twins, liar, tmp_path)
    assert type(error) is InvalidAnswer
    assert "redirects" in error.detail
    assert not elsewhere.asked


SLOW: dict[str, bytes | Write] = {
    "silence": silent,
    "a head in single bytes": trickling(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    "interim answers now and then": trickling(b"", b"HTTP/1.1 102 Processing\r\n"),
    "a line of chunks in single bytes": trickling(head(MSGPACK, CHUNKED) + b"1;", b"x"),
    "a length that is a lie": head(MSGPACK, "Content-Length: 1000000") + b"\x81\xa1v",
}


@pytest.mark.promise(
    "Whatever a bad server answers is an error of farstep, and leaves the model as it was.",
    area="client errors",
)
@pytest.mark.parametrize("lie", SLOW)
def test_an_answer_that_does_not_come_is_given_up(lie: str, liar: Liar, tmp_path: Path) -> None:
    """Silence, and what comes a byte now and then, ends with the patience; what was applied is applied once."""
    twins = twins_of(liar, timeout_s=SHORT_S)
    liar.answer("POST", "/push", SLOW[lie])
    error = refused(TRIALS["push"], twins, liar, tmp_path)
    assert type(error) is Unavailable
    twins.ours.step()
    twins.theirs.step()
    twins.check()


WRONG: list[Any] = ["3", -1, float("nan"), 2**63, 1e300, None, True, [1], {"a": 1}]
"""What stands in the place of a whole number."""
NO_TEXTS: list[Any] = [-1, 2.5, True, [1], {"a": 1}]
"""What stands in the place of a text."""
TEXTS = [("push", key) for key in ("durability", "receipt.disagreement", "receipt.detail", "receipt.kernel")]
NUMBERS = [("push", key) for key in ("version", "receipt.version", "receipt.base", "receipt.divisor")] + [
    ("pull", "version"),
    ("pull", "count"),
    ("join", "epoch"),
    ("heartbeat", "epoch"),
    ("heartbeat", "version"),
    ("page", "sequence"),
]


@pytest.mark.parametrize(("name", "key"), [*NUMBERS, *TEXTS, ("push", "segments"), ("pull", "segments")])
def test_a_member_of_a_wrong_type_is_refused(
    name: str, key: str, liar: Liar, of_kind: Callable[[str], Twins], tmp_path: Path
) -> None:
    """Versions that are words, negative, NaN or huge, texts that are none, and other segments reach nothing here."""
    trial, twins = TRIALS[name], of_kind(name)
    segments: list[Any] = ["all", [0, 1], [0, 9], [1, 0], [0.0, 2.0], [0, 1, 2], [-1, 1], {"a": 1}]
    for value in segments if key == "segments" else NO_TEXTS if (name, key) in TEXTS else WRONG:
        if name == "join" and isinstance(value, float):
            continue  # which JSON has no way to write, or writes as another number

        def change(said: dict[str, Any], value: Any = value) -> None:
            *outer, last = key.split(".")
            for each in outer:
                said = said[each]
            said[last] = value

        if value == 2**63 and trial.kind == MSGPACK:
            continue  # beyond what the wire has
        liar.change(trial.method, trial.path, change)
        error = refused(trial, twins, liar, tmp_path)
        assert type(error) in (InvalidAnswer, Fenced), (value, error)
        assert error.side == "client"
    if name in ("push", "page"):
        twins.ours.step()  # which had been applied, once
        twins.theirs.step()
        twins.check()
