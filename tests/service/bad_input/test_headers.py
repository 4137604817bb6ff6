"""Bad headers and queries: every key is checked, refused by its name, and changes nothing."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.support.service.bad_input.refusing import PARAMETERS, refused
from tests.support.service.raw import RawWorker, gradient, payload_of

WRONG_INTS: tuple[object, ...] = (None, "1", 1.0, True, -1, b"1", [1], {}, ...)
WRONG_NAMES: tuple[object, ...] = (None, 1, "", "x" * 129, "a\x00b", "a\nb", b"w0", ["w0"], ...)
WRONG_LISTS: tuple[object, ...] = (1, "0", {}, True)


def wrong(key: str, values: tuple[object, ...], code: str = "invalid_request", status: int = 400) -> list[Any]:
    return [pytest.param(key, value, status, code, id=f"{key}={value!r:.20}") for value in values]


@pytest.mark.promise(
    "What a later server adds to an answer is passed over; another protocol version is refused.",
    area="wire",
)
@pytest.mark.promise(
    "Every key of a request header is checked; a wrong, missing or unknown one is refused by name.",
    area="bad input",
)
@pytest.mark.parametrize(
    ("key", "value", "status", "code"),
    [
        *wrong("v", (0, 2, 99, "1", 1.5, 1.0, True, None, ...), "protocol_mismatch", 426),
        *wrong("worker", WRONG_NAMES),
        *wrong("incarnation", WRONG_NAMES),
        *wrong("epoch", (*WRONG_INTS, 0)),
        *wrong("seq", (*WRONG_INTS, 0)),
        *wrong("base", WRONG_INTS),
        *wrong("have", (None, "1", 1.0, True, -1)),
        *wrong("reply", (None, 1, "", "some", "ALL", b"all", ["all"])),
        *wrong("segments", WRONG_LISTS),
        *wrong("segments", ([0], [1, 1], [3, 1], [0, 8], [0, 2, 1, 3], [-1, 2], [0, 1.0], [[0, 1]], [0, 2**62])),
        *wrong("sparse", WRONG_LISTS),
        *wrong("sparse", ([1], [[0, 1]], [[0, 1, 2, 3]], [["0", 1, 1]], [[0, -1, 1]], [[0, True, 1]], [[7, 1, 1]])),
        *wrong("sparse", ([[0, 1, 1], [0, 1, 1]],)),
        *wrong("groups", (1, "0", [], True)),
        *wrong("groups", ({"a": {}}, {"-1": {}}, {"0": 1}, {"0": None}, {"1.0": {}}, {"": {}}, {"1234567": {}})),
        *wrong("groups", ({"00": {}}, {"0": {"lr": 0.1}, "00": {"lr": 0.2}}, {"\u0660": {}}, {"0\n": {}})),
        *wrong("groups", ({"1": {"lr": 1}}, {"999999": {}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"momentum": 1}}, {"0": {"lr": "1"}}, {"0": {"lr": None}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"lr": True}}, {"0": {"lr": float("nan")}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"lr": float("inf")}}, {"0": {"maximize": 1}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"differentiable": True}}, {"0": {"lr": [0.1]}}), "invalid_option", 422),
        *wrong("groups", ({"0": {"lr": 2**63 - 1, "eps": b"x"}},), "invalid_option", 422),
        *wrong("unheard_of", (1, None, {}, [])),
        *wrong("x" * 4000, (1,)),
    ],
)
def test_every_key_of_a_header_is_checked(worker: RawWorker, key: str, value: object, status: int, code: str) -> None:
    """A key of a wrong type or value, one that is missing and one that nobody knows are refused by name."""
    answer = refused(lambda: worker.push(gradient(1, PARAMETERS), **{key: value}), status, code)
    if code != "invalid_option":
        assert answer.document["field"] == key[:80]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *product(["fields"], [None, [], "param", [1], ["param", "param"], {}, [["param"]], ...]),
        *product(["initial"], [1, "yes", []]),
        *product(["version"], [-1, 1.0, "1", True]),
        *product(["segments"], [1, [0], [0, 9]]),
        ("base", 1),
        ("groups", {}),
    ],
)
def test_every_key_of_a_put_is_checked(worker: RawWorker, key: str, value: object) -> None:
    """The header of new contents is held to its own keys."""
    changes = {"fields": ["param"], key: value}
    answer = refused(
        lambda: worker.raw.message(
            "PUT", f"{worker.path}/contents", worker.head(**{"base": ..., **changes}), payload_of(PARAMETERS)
        ),
        400,
        "invalid_request",
    )
    assert answer.document["field"] == key


@pytest.mark.parametrize("fields", [["momentum"], ["param", "exp_avg"], ["x" * 4000], ["../../param"], [""]])
def test_a_field_that_the_optimizer_does_not_have_is_refused(worker: RawWorker, fields: list[str]) -> None:
    """Unknown fields are refused on the way in and on the way out."""
    refused(
        lambda: worker.raw.message(
            "PUT", f"{worker.path}/contents", worker.head(base=..., fields=fields), payload_of(PARAMETERS)
        ),
        422,
        "invalid_option",
        "fields",
    )
    query = ",".join(fields)
    refused(lambda: worker.raw.request("GET", f"{worker.path}/contents?fields={query}"), 422, "invalid_option")


@pytest.mark.parametrize(
    "query", ["fields=param,param", "fields=param&fields=param", "since=1", "fields=step&x=1", "&=&"]
)
def test_a_query_that_nobody_knows_is_refused(worker: RawWorker, query: str) -> None:
    """Unknown parameters, and a field that would be sent twice."""
    refused(lambda: worker.raw.request("GET", f"{worker.path}/contents?{query}"), 400, "invalid_request")


@pytest.mark.parametrize(
    "ranges", ["", "0", "1,0", "0,0", "0,2,1,3", "6,8", "-1,1", "0,1e1", "0,9999999999", "²,³", ","]
)
def test_ranges_that_are_none_are_refused_in_a_query(worker: RawWorker, ranges: str) -> None:
    """The bounds of `segments` in a query are held to what those in a header are held to."""
    url = f"{worker.path}/contents?fields=step&segments={ranges}"
    refused(lambda: worker.raw.request("GET", url), 400, "invalid_request", "segments")


@pytest.mark.parametrize("fields", ["param", "sum", "step", "step,param"])
def test_some_segments_are_what_they_are_among_all(worker: RawWorker, fields: str) -> None:
    """Contents of chosen segments are the same bytes as in the whole, and the header names the segments."""
    whole = worker.raw.request("GET", f"{worker.path}/contents?fields={fields}")
    chosen = worker.raw.request("GET", f"{worker.path}/contents?fields={fields}&segments=1,3,5,6")
    sizes = [p.nbytes for p in PARAMETERS]
    expected, at = b"", 0
    for field in fields.split(","):
        for index, size in enumerate([8] * len(sizes) if field == "step" else sizes):
            expected += whole.payload[at : at + size] if index in (1, 2, 5) else b""
            at += size
    assert chosen.header == {**whole.header, "segments": [1, 3, 5, 6]}
    assert chosen.payload == expected
    assert at == len(whole.payload)
