"""Options on each way into a session: by none is one left in a state in which every later push fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from farstep.conversation import FILE
from farstep.protocol.session_file import DESCRIPTION
from tests.support.service.answers import Answer
from tests.support.service.raw import RawClient, RawWorker, session_document

IMPOSSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"betas": [2, 3]}),
    ("Adam", {"betas": [-5, -5]}),
    ("AdamW", {"betas": [1, 1]}),
    ("RAdam", {"betas": [2, 3]}),
    ("NAdam", {"momentum_decay": -1e300}),
    ("SparseAdam", {"betas": [2, 3]}),
    ("Adagrad", {"lr_decay": -1.0}),
    ("Adamax", {"betas": [2, 3]}),
    ("SGD", {"lr": -1e300}),
    ("SGD", {"weight_decay": 1e308}),
    ("Adafactor", {"d": 0.0}),
    ("Muon", {"ns_steps": 1000}),
    ("Muon", {"ns_coefficients": [1e300, 1e300, 1e300]}),
    ("LBFGS", {"line_search_fn": "x"}),
    ("LBFGS", {"history_size": 0}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "max_eval": 0}),
]
each_that_is_impossible = pytest.mark.parametrize(
    ("optimizer", "options"), IMPOSSIBLE, ids=lambda value: repr(value)[:40]
)

WEIGHT = torch.ones(4, 4)


def push_of(optimizer: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return gradients that an optimizer takes, and what it asks for beside them."""
    return [WEIGHT.to_sparse(1) if optimizer == "SparseAdam" else WEIGHT], (
        {"loss": 1.0} if optimizer == "LBFGS" else {}
    )


@each_that_is_impossible
def test_no_options_are_taken_in_with_which_every_push_would_fail(
    raw: RawClient, request: pytest.FixtureRequest, optimizer: str, options: dict[str, Any]
) -> None:
    """Options out of torch's ranges, or with which the next step is none, are refused; pushes go on as before."""
    name = f"options-{request.node.callspec.indices['options']}"
    (worker,) = raw.begun(name, parameters=[WEIGHT], optimizer=optimizer)
    gradients, closure = push_of(optimizer)
    assert worker.push(gradients, **closure).status == 200
    before = raw.request("GET", f"/v1/sessions/{name}").document["groups"]
    answer = raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": options}})
    assert (answer.status, answer.code) == (422, "invalid_option"), answer.body
    assert raw.request("GET", f"/v1/sessions/{name}").document["groups"] == before
    for _ in range(3):
        assert worker.push(gradients, **closure).status == 200


def test_options_that_a_push_has_put_out_of_range_do_not_hold_others_up(raw: RawClient) -> None:
    """A schedule may end at -1e-19, as with torch; another option can still be changed, and this one put right."""
    (worker,) = raw.begun("edited")
    assert worker.push([torch.ones(4)], groups={"0": {"lr": -1e-19}}).status == 200
    (group,) = raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": {"eps": 1e-6}}}).document
    assert (group["lr"], group["eps"]) == (-1e-19, 1e-6)
    assert raw.json("PATCH", f"{worker.path}/groups", {"groups": {"0": {"lr": 0.5}}}).status == 200


@each_that_is_impossible
def test_no_session_is_created_with_them(raw: RawClient, optimizer: str, options: dict[str, Any]) -> None:
    """What `PATCH` refuses is refused when a session is created, and there is none then."""
    document = session_document("never", "w0", [WEIGHT], optimizer=optimizer, groups=[options])
    answer = raw.json("POST", "/v1/sessions", document)
    assert (answer.status, answer.code) == (422, "invalid_option"), answer.body
    assert raw.request("GET", "/v1/sessions/never").status == 404


@pytest.mark.parametrize(("optimizer", "options"), [each for each in IMPOSSIBLE if each[0] != "LBFGS"])
def test_no_group_with_them_is_added(raw: RawClient, optimizer: str, options: dict[str, Any]) -> None:
    """A param group that is added is checked as one that a session is created with."""
    (worker,) = raw.begun("growing", parameters=[WEIGHT], optimizer=optimizer)
    gradients, _ = push_of(optimizer)
    answer = worker.append({"more": torch.ones(2, 2)}, options=options)
    assert (answer.status, answer.code) == (422, "invalid_option"), answer.body
    assert worker.push(gradients).status == 200
    raw.request("DELETE", worker.path)


@pytest.mark.parametrize("where", ["groups", "options"])
@each_that_is_impossible
def test_no_file_with_them_is_imported(
    raw: RawClient, tmp_path: Path, where: str, optimizer: str, options: dict[str, Any]
) -> None:
    """A session file is read like a document from anywhere: options that it says are in force have to be possible."""
    (worker,) = raw.begun("exported", parameters=[WEIGHT], optimizer=optimizer)
    gradients, closure = push_of(optimizer)
    assert worker.push(gradients, **closure).status == 200
    file = raw.request("GET", f"{worker.path}/file").body
    raw.request("DELETE", worker.path)
    assert imported(raw, tmp_path, file, lambda description: None).status == 201
    if (where, optimizer) == ("options", "Adamax"):  # which steps with them, as torch does if they are put into a group
        pytest.skip("Options in force may be out of the constructor's ranges.")
    answer = imported(raw, tmp_path, file, lambda description: description[where][0].update(options))
    assert (answer.status, answer.code) == (422, "invalid_option"), answer.body
    assert raw.request("GET", "/v1/sessions/imported").status == 404


def imported(
    raw: RawClient, directory: Path, file: bytes, edit: Callable[[dict[str, Any]], None], *, keep: bool = False
) -> Answer:
    """Import a session file whose description is edited, and remove what became of it."""
    original, edited = directory / "original", directory / "edited"
    original.write_bytes(file)
    with safe_open(original, "pt") as opened:
        metadata = opened.metadata()
    description = json.loads(metadata[DESCRIPTION])
    edit(description)
    save_file(load(file), edited, {**metadata, DESCRIPTION: json.dumps(description)})
    answer = raw.request("PUT", "/v1/sessions/imported/file", edited.read_bytes(), {"content-type": FILE})
    if answer.status == 201 and not keep:
        raw.request("DELETE", "/v1/sessions/imported")
    return answer


def test_options_in_force_that_a_push_has_put_out_of_range_go_through_a_file(raw: RawClient, tmp_path: Path) -> None:
    """An export at the end of a cosine, whose rate is -1e-19, is imported, and pushes go on."""
    (worker,) = raw.begun("exported", parameters=[WEIGHT])
    assert worker.push([WEIGHT], groups={"0": {"lr": -1e-19}}).status == 200
    file = raw.request("GET", f"{worker.path}/file").body
    assert imported(raw, tmp_path, file, lambda description: None, keep=True).status == 201
    assert raw.request("GET", "/v1/sessions/imported").document["groups"][0]["lr"] == -1e-19
    again = raw.join("imported", parameters=[WEIGHT], options="session")
    assert again.push([WEIGHT], base=1).status == 200
    for name in ("exported", "imported"):
        raw.request("DELETE", f"/v1/sessions/{name}")


def stepping(worker: RawWorker, groups: dict[str, Any]) -> Answer:
    return worker.push([WEIGHT], groups=groups)


def skipping(worker: RawWorker, groups: dict[str, Any]) -> Answer:
    return worker.push([None], skip=True, groups=groups)


def overflowing(worker: RawWorker, groups: dict[str, Any]) -> Answer:
    return worker.push([WEIGHT * torch.inf], groups=groups)


@pytest.mark.parametrize("push", [stepping, skipping, overflowing])
@pytest.mark.parametrize("rounds", [1, 2])
def test_no_push_puts_them_into_force(
    raw: RawClient, push: Callable[[RawWorker, dict[str, Any]], Answer], rounds: int
) -> None:
    """One that steps is refused with its step; one that is skipped, or waits to be accumulated, leaves none behind."""
    (worker,) = raw.begun(
        "pushed", parameters=[WEIGHT], optimizer="Adam", nonfinite="skip", policy={"accumulate": rounds}
    )
    answer = push(worker, {"0": {"betas": [2, 3]}})
    assert (answer.status, answer.code) == (422, "invalid_option"), answer.body
    assert raw.request("GET", worker.path).document["groups"][0]["betas"] == [0.9, 0.999]
    receipts = [worker.push([WEIGHT]) for _ in range(2)]
    assert [answer.status for answer in receipts] == [200, 200]
    assert receipts[-1].header["version"] == 2 // rounds
    raw.request("DELETE", worker.path)
