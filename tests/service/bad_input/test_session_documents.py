"""Documents that create or join a session which cannot be, or is another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.service.bad_input.refusing import BAD_NAMES, create, refused_as
from tests.support.service.raw import RawClient, session_document

pytestmark = pytest.mark.usefixtures("unchanged")


def segment(**changes: Any) -> dict[str, Any]:
    return {"name": "p", "shape": [2], "dtype": "float32", "group": 0, **changes}


@pytest.mark.parametrize("key", ["name", "worker"])
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:12])
def test_a_name_that_is_no_name_is_refused(raw: RawClient, key: str, name: object) -> None:
    """Sessions and workers have names of letters, digits, dot, dash and underscore, 63 at most."""
    answer = refused_as(lambda: create(raw, **{key: name}), "invalid_request")
    assert answer.document["field"] == key


@pytest.mark.parametrize("key", ["name", "worker", "optimizer", "groups", "segments"])
def test_a_document_without_a_field_is_refused(raw: RawClient, key: str) -> None:
    """A missing field is named."""
    document = session_document("bad", "w0")
    del document[key]
    answer = refused_as(lambda: raw.json("POST", "/v1/sessions", document), "invalid_request")
    assert answer.document["field"] == key


@pytest.mark.promise(
    "What is refused leaves nothing behind: no session, no waiting push, no memory in flight.",
    area="bad input",
)
@pytest.mark.parametrize(
    ("document", "code"),
    [
        ({"unheard_of": 1}, "invalid_request"),
        ({"optimizer": 1}, "invalid_request"),
        ({"optimizer": ["Adagrad"]}, "invalid_request"),
        ({"optimizer": "Adam" * 10_000}, "invalid_option"),
        ({"optimizer": "adagrad"}, "invalid_option"),
        ({"optimizer": "__class__"}, "invalid_option"),
        ({"groups": []}, "invalid_request"),
        ({"groups": {}}, "invalid_request"),
        ({"groups": [1]}, "invalid_request"),
        ({"groups": [None]}, "invalid_request"),
        ({"groups": [{}] * 10_001}, "limit_exceeded"),
        ({"groups": [{"momentum": 1}]}, "invalid_option"),
        ({"groups": [{"x" * 100_000: 1}]}, "invalid_option"),
        ({"groups": [{"lr": -1}]}, "invalid_option"),
        ({"groups": [{"lr": True}]}, "invalid_option"),
        ({"groups": [{"lr": "0.1"}]}, "invalid_option"),
        ({"groups": [{"lr": "9" * 100_000}]}, "invalid_option"),
        ({"groups": [{"lr": None}]}, "invalid_option"),
        ({"groups": [{"lr": [0.1]}]}, "invalid_option"),
        ({"groups": [{"lr": {}}]}, "invalid_option"),
        ({"groups": [{"lr": float("nan")}]}, "invalid_option"),
        ({"groups": [{"lr": float("inf")}]}, "invalid_option"),
        ({"groups": [{"lr": 10**400}]}, "invalid_option"),
        ({"groups": [{"differentiable": True}]}, "invalid_option"),
        ({"segments": {}}, "invalid_request"),
        ({"segments": [1]}, "invalid_request"),
        ({"segments": [{}]}, "invalid_request"),
        ({"consistency": "sync"}, "invalid_request"),
        ({"consistency": {}}, "invalid_option"),
        ({"consistency": {"mode": "sync"}}, "invalid_option"),
        ({"consistency": {"mode": "eventual"}}, "invalid_option"),
        ({"consistency": {"mode": ["sync"]}}, "invalid_option"),
        ({"consistency": {"mode": "async", "workers": 1}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 0}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 1.5}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": "2"}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 2, "deadline_s": 0}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 2, "deadline_s": float("nan")}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 2, "deadline_s": float("inf")}}, "invalid_option"),
        ({"consistency": {"mode": "x" * 100_000}}, "invalid_option"),
        ({"consistency": {"mode": "async", "y" * 100_000: 1}}, "invalid_option"),
        ({"nonfinite": "maybe"}, "invalid_request"),
        ({"nonfinite": True}, "invalid_request"),
        ({"policy": "clip"}, "invalid_request"),
        ({"policy": None}, "invalid_request"),
        ({"policy": {"clip": 1.0}}, "invalid_option"),
        ({"policy": {"clip_norm": 0}}, "invalid_option"),
        ({"policy": {"clip_norm": -1.0}}, "invalid_option"),
        ({"policy": {"clip_norm": "1"}}, "invalid_option"),
        ({"policy": {"clip_norm": [1]}}, "invalid_option"),
        ({"policy": {"clip_norm": True}}, "invalid_option"),
        ({"policy": {"clip_norm": float("nan")}}, "invalid_option"),
        ({"policy": {"clip_norm": 10**400}}, "invalid_option"),
        ({"policy": {"clip_norm": 1, "clip_norm_type": "nan"}}, "invalid_option"),
        ({"policy": {"clip_value": {}}}, "invalid_option"),
        ({"policy": {"accumulate": 0}}, "invalid_option"),
        ({"policy": {"accumulate": 2.0}}, "invalid_option"),
        ({"policy": {"accumulate": 10**9}}, "invalid_option"),
        ({"policy": {"ema": 1}}, "invalid_option"),
        ({"policy": {"ema": "inf"}}, "invalid_option"),
        ({"policy": {"ema" * 50_000: 1}}, "invalid_option"),
        ({"kernel": "magic"}, "invalid_request"),
        ({"kernel": None}, "invalid_request"),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, dict) else value,
)
def test_a_session_that_cannot_be_is_refused(raw: RawClient, document: dict[str, Any], code: str) -> None:
    """Fields nobody knows, of a wrong type or out of range; no session is left behind."""
    refused_as(lambda: create(raw, **document), code)


def test_a_deadline_beyond_all_time_is_refused(raw: RawClient) -> None:
    """A deadline is a number that a clock can reach; an int that no float can hold is none."""
    consistency = {"mode": "sync", "workers": 2, "deadline_s": 10**400}
    answer = raw.json("POST", "/v1/sessions", session_document("bad", "w0", consistency=consistency))
    raw.request("DELETE", "/v1/sessions/bad")
    assert answer.status == 422


@pytest.mark.parametrize(
    ("segments", "codes"),
    [
        ([segment(name="")], ("tensor_mismatch",)),
        ([segment(name="x" * 257)], ("tensor_mismatch",)),
        ([segment(name="x" * 1_000_000)], ("invalid_request",)),
        ([segment(name="a\x00b")], ("tensor_mismatch",)),
        ([segment(name="a\nb")], ("tensor_mismatch",)),
        ([segment(name="\ud800")], ("tensor_mismatch", "invalid_request")),
        ([segment(name=None)], ("invalid_request",)),
        ([segment(), segment()], ("tensor_mismatch",)),
        ([segment(dtype="int64")], ("tensor_mismatch",)),
        ([segment(dtype="float8_e4m3fn")], ("tensor_mismatch",)),
        ([segment(dtype="Float32")], ("tensor_mismatch",)),
        ([segment(dtype="__import__")], ("tensor_mismatch",)),
        ([segment(dtype="x" * 1_000_000)], ("invalid_request",)),
        ([segment(name="x" * 100_000)], ("tensor_mismatch",)),
        ([segment(dtype="x" * 100_000)], ("tensor_mismatch",)),
        ([segment(dtype=4)], ("invalid_request",)),
        ([segment(shape=[-1])], ("tensor_mismatch",)),
        ([segment(shape=[1.0])], ("invalid_request",)),
        ([segment(shape=[True])], ("invalid_request",)),
        ([segment(shape=["2"])], ("invalid_request",)),
        ([segment(shape=2)], ("invalid_request",)),
        ([segment(shape=None)], ("invalid_request",)),
        ([segment(shape=[1] * 17)], ("limit_exceeded",)),
        ([segment(shape=[1] * 100_000)], ("limit_exceeded",)),
        ([segment(shape=[2**61])], ("tensor_mismatch", "limit_exceeded")),
        ([segment(shape=[2**59])], ("limit_exceeded",)),
        ([segment(shape=[2**40, 2**40])], ("limit_exceeded",)),
        ([segment(shape=[2**20] * 16)], ("limit_exceeded",)),
        ([segment(shape=[10**30])], ("tensor_mismatch", "invalid_request")),
        ([segment(name=f"p{i}", shape=[2**34]) for i in range(4)], ("limit_exceeded",)),
        ([segment(group=-1)], ("tensor_mismatch",)),
        ([segment(group=1)], ("invalid_option",)),
        ([segment(group=True)], ("invalid_request",)),
        ([segment(group=2**62)], ("limit_exceeded", "tensor_mismatch")),
        ([segment(color="red")], ("invalid_request",)),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, list) else "",
)
def test_a_parameter_that_cannot_be_is_refused(
    raw: RawClient, segments: list[dict[str, Any]], codes: tuple[str, ...]
) -> None:
    """Names, dtypes, shapes, groups and sizes are checked in Python's integers, before memory is thought of."""
    refused_as(lambda: create(raw, segments=segments), *codes)


@pytest.mark.promise(
    "Documents, sessions and parameters have stated limits, and a refusal names the one that was passed.",
    area="limits",
)
def test_more_parameters_than_a_session_may_have_are_refused(raw: RawClient) -> None:
    """100,000 is the most; the refusal names the limit."""
    segments = [{"name": str(index), "shape": [], "dtype": "float32"} for index in range(100_001)]
    answer = create(raw, segments=segments)
    assert (answer.status, answer.code, answer.document["limit"]) == (413, "limit_exceeded", 100_000)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"optimizer": "ASGD", "groups": [{}, {}]}, "optimizer"),
        ({"groups": [{"lr": 0.1}]}, "groups"),
        ({"groups": [{"lr": 0.1}, {"lr": 0.3}]}, "lr of its group 1"),
        ({"groups": [{"lr": 0.1}, {"lr": 0.2, "eps": 1e-3}]}, "eps of its group 1"),
        ({"parameters": [torch.zeros(5)]}, "[4]"),
        ({"parameters": [torch.zeros(4, dtype=torch.float64)]}, "float64"),
        ({"parameters": [torch.zeros(4), torch.zeros(1)]}, "1 parameters, not 2"),
        ({"consistency": {"mode": "sync", "workers": 2}}, "consistency"),
        ({"nonfinite": "allow"}, "nonfinite"),
        ({"policy": {"ema": 0.5}}, "ema is None, not 0.5"),
        ({"kernel": "auto"}, "kernel"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_joining_with_other_options_names_the_difference(raw: RawClient, document: dict[str, Any], named: str) -> None:
    """A session is joined by those who mean the same; the refusal says what differs, and from what."""
    given = session_document("standing", "w9", **{"groups": [{"lr": 0.1}, {"lr": 0.2}], **document})
    answer = refused_as(lambda: raw.json("POST", "/v1/sessions", given), "options_differ")
    assert answer.status == 409
    assert named in answer.document["detail"]
