"""Resuming is exact: what was saved and goes on elsewhere is, bit for bit, the training that was never interrupted.

And a cold restart is not: the same parameters and options without the optimizer's state lead elsewhere, so these tests
would notice if state were lost on the way.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farstep
from farstep.conversation import Conversation
from farstep.errors import SessionLost
from farstep.optim import RemoteOptimizer
from farstep.settings import RemoteOptions
from tests.support.client.resuming import (
    CASES,
    CASES_AND_PLAIN,
    CUT,
    END,
    EVERY,
    STATELESS,
    Parameters,
    Training,
    begin,
    same_bits,
)
from tests.support.client.twins import HALVES
from tests.support.service.servers import RunningServer, running_server
from tests.support.service.servers import farstep as command

ROWS = list(CASES_AND_PLAIN)


@pytest.fixture(scope="module")
def remote(server: RunningServer) -> RemoteOptions:
    return {"server": server.url, "kernel": "reference"}


EMBEDDED: RemoteOptions = {"kernel": "reference"}


def test_every_optimizer_is_tried() -> None:
    """The table has a row for each class that farstep has, so a new one cannot be forgotten."""
    offered = [getattr(farstep.optim, name) for name in farstep.optim.__all__]
    assert {each.__name__ for each in offered if "torch_class" in vars(each)} == CASES.keys()
    assert all(issubclass(each, RemoteOptimizer) for each in offered)


def test_only_plain_gradient_descent_has_nothing_to_lose() -> None:
    """Each row has state at the cut but that of SGD without momentum, which has none at all."""
    for name, case in CASES_AND_PLAIN.items():
        training = Training(name, EMBEDDED, begin(case.parameters))
        training.train(0, CUT)
        assert bool(training.result()["state"]) == case.has_state, name
    assert [name for name, case in CASES_AND_PLAIN.items() if not case.has_state] == [f"{STATELESS} without momentum"]


def test_torch_rounds_numbers_of_16_bit_parameters_when_it_loads_them() -> None:
    """Where a row says so, not even torch resumes exactly; so there a state_dict is tried without such parameters."""
    halves: Parameters = [(shape, dtype) for shape, dtype in EVERY if dtype in HALVES]
    for name in (name for name, case in CASES.items() if case.rounds):
        training = Training(name, None, begin(halves), switches=False)
        training.train(0, CUT + 2)
        saved = copy.deepcopy(training.optimizer.state_dict())
        resumed = Training(name, None, training.parameters, switches=False)
        resumed.optimizer.load_state_dict(saved)
        for each in (training, resumed):
            each.train(CUT + 2, END)
        assert not same_bits(resumed.result(), training.result()), name


# -- from one place to another ---------------------------------------------------------------------------------------


def through_json(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state_dict as it comes out of plain text: no tensor, no object and no memory is shared."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            raw = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
            return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "bytes": raw}
        if isinstance(value, dict):
            return {"keys": list(value), "values": [plain(each) for each in value.values()]}
        if isinstance(value, tuple):
            return {"tuple": plain(list(value))}
        return [plain(each) for each in value] if isinstance(value, list) else value

    def lively(value: Any) -> Any:
        if isinstance(value, list):
            return [lively(each) for each in value]
        if isinstance(value, dict) and "bytes" in value:
            flat = torch.tensor(value["bytes"], dtype=torch.uint8).view(getattr(torch, value["dtype"]))
            return flat.view(value["shape"])
        if isinstance(value, dict) and "tuple" in value:
            return tuple(lively(value["tuple"]))
        return dict(zip(value["keys"], map(lively, value["values"]), strict=True)) if isinstance(value, dict) else value

    loaded: dict[str, Any] = lively(json.loads(json.dumps(plain(state_dict))))
    return loaded


Saving = Callable[[dict[str, Any]], dict[str, Any]]


def check_route(
    name: str, origin: RemoteOptions | None, goal: RemoteOptions | None, saving: Saving = copy.deepcopy
) -> None:
    """Compare three trainings: never interrupted, saved and resumed elsewhere, and restarted cold there."""
    case = CASES_AND_PLAIN[name]
    with_torch = origin is None or goal is None
    switches = case.torch_switches or not with_torch
    which = (
        case.exact() if with_torch else [each for each in case.parameters if not (case.rounds and each[1] in HALVES)]
    )
    uninterrupted = Training(name, origin, begin(which), switches=switches)
    uninterrupted.train(0, CUT)
    saved = saving(uninterrupted.optimizer.state_dict())
    values = [p.detach().clone() for p in uninterrupted.parameters]
    uninterrupted.train(CUT, END)

    resumed = Training(name, goal, values, switches=switches)
    resumed.optimizer.load_state_dict(saved)
    cold = Training(name, goal, values, switches=switches)
    for each in (resumed, cold):
        each.train(CUT, END)
    assert all(bool(torch.isfinite(p).all()) for p in uninterrupted.parameters)
    assert same_bits(resumed.result(), uninterrupted.result())
    assert resumed.optimizer.state_dict()["param_groups"] == uninterrupted.optimizer.state_dict()["param_groups"]
    assert same_bits(cold.result(), uninterrupted.result()) == (not case.has_state)


@pytest.mark.parametrize("name", ROWS)
def test_from_a_session_to_another(name: str, remote: RemoteOptions) -> None:
    """Remote to remote: a state_dict that went through plain text goes on in another session."""
    check_route(name, remote, remote, through_json)


@pytest.mark.parametrize("name", ROWS)
def test_from_this_process_to_a_session(name: str, remote: RemoteOptions) -> None:
    """Embedded to remote: what began without a server goes on with one."""
    check_route(name, EMBEDDED, remote)


@pytest.mark.promise(
    "A `state_dict` moves between torch and farstep in both directions, and training goes on bit for bit.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", ROWS)
def test_from_torch_to_a_session(name: str, remote: RemoteOptions) -> None:
    """Local to remote: the state_dict of torch's own optimizer goes on in a session."""
    check_route(name, None, remote)


@pytest.mark.promise(
    "A `state_dict` moves between torch and farstep in both directions, and training goes on bit for bit.",
    area="bits of torch",
)
@pytest.mark.parametrize("name", ROWS)
def test_from_a_session_to_torch(name: str, remote: RemoteOptions) -> None:
    """Remote to local: the state_dict of a session goes on in torch's own optimizer."""
    check_route(name, remote, None)


# -- through a file, and a server that is killed ---------------------------------------------------------------------


@pytest.mark.promise("A session that is exported and imported goes on bit for bit.", area="sessions and files")
def test_a_server_that_is_killed_and_restored_from_files(tmp_path: Path) -> None:
    """Sessions are exported, their server goes on and is killed, and the next one imports them: the worker rejoins, a
    new one joins a second import, and both end where a training ends that was never interrupted."""
    with running_server(loaded=True) as server:
        place: RemoteOptions = {"server": server.url, "kernel": "reference"}
        trainings: dict[str, Training] = {}
        versions: dict[str, int] = {}
        for number, name in enumerate(ROWS):
            trainings[name] = Training(
                name, {**place, "session": f"s{number}"}, begin(CASES_AND_PLAIN[name].parameters)
            )
            trainings[name].train(0, CUT)
            file = tmp_path / f"{number}.safetensors"
            if number:
                exported = farstep.export_session(f"s{number}", file, server=server.url)
                assert (exported.version, exported.optimizer) == (trainings[name].optimizer.version, name.split(" ")[0])
            else:
                done = command("sessions", "export", f"s{number}", str(file), "--server", server.url)
                assert (done.returncode, done.stderr) == (0, "")

            versions[name] = trainings[name].optimizer.version
            trainings[name].train(CUT, CUT + 1)  # which is lost with the server

        server.kill()
        server.restart()
        for number, name in enumerate(ROWS):
            file = tmp_path / f"{number}.safetensors"
            if number:
                assert farstep.import_session(file, server=server.url) == f"s{number}"
            else:
                done = command("sessions", "import", str(file), "--server", server.url)
                assert (done.returncode, done.stderr) == (0, "")
            assert farstep.import_session(file, name=f"t{number}", server=server.url) == f"t{number}"

            start = begin(CASES_AND_PLAIN[name].parameters)
            uninterrupted = Training(name, EMBEDDED, start)
            uninterrupted.train(0, CUT)
            values = [p.detach().clone() for p in uninterrupted.parameters]
            cold = Training(name, EMBEDDED, values)
            uninterrupted.train(CUT, END)
            cold.train(CUT, END)

            rejoined = trainings[name]
            with pytest.raises(SessionLost, match="rejoin"):
                rejoined.train(CUT + 1, CUT + 2)  # named with the life that ended: refused, and not applied
            assert not rejoined.optimizer.rejoin()
            assert rejoined.optimizer.version == versions[name]
            new = Training(name, {**place, "session": f"t{number}"}, start)
            assert new.optimizer.version == versions[name]
            for each in (rejoined, new):
                assert same_bits([p.detach() for p in each.parameters], values), name
                each.train(CUT, END)
                assert each.optimizer.version == rejoined.optimizer.version > versions[name]
                assert same_bits(each.result(), uninterrupted.result()), name
                each.optimizer.close()
            assert same_bits(cold.result(), uninterrupted.result()) == (not CASES_AND_PLAIN[name].has_state), name


@pytest.mark.promise("A session that is exported and imported goes on bit for bit.", area="sessions and files")
def test_workers_in_step_go_on_from_a_file(server: RunningServer, tmp_path: Path) -> None:
    """A sync session that was removed and imported: both workers rejoin it under their names, and continue together as
    if nothing had happened."""
    place: RemoteOptions = {"server": server.url, "kernel": "reference"}

    def workers(session: str) -> list[Training]:
        mode = farstep.Sync(workers=2, deadline_s=60)
        return [
            Training("Adam", {**place, "session": session, "worker": name, "consistency": mode}, begin(EVERY))
            for name in ("w0", "w1")
        ]

    def together(trainings: list[Training], call: Callable[[Training], object]) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(call, trainings))

    whole, cut = workers("whole"), workers("cut")
    together(whole, lambda each: each.train(0, END))
    together(cut, lambda each: each.train(0, CUT))
    farstep.export_session("cut", tmp_path / "cut.safetensors", server=server.url)
    talk = Conversation(server.url, None)
    talk.control("DELETE", "/v1/sessions/cut")
    farstep.import_session(tmp_path / "cut.safetensors", server=server.url)
    together(cut, lambda each: each.optimizer.rejoin())
    together(cut, lambda each: each.train(CUT, END))
    for each in (*cut, whole[1]):
        assert same_bits(each.result(), whole[0].result())
    for name in ("whole", "cut"):
        talk.control("DELETE", f"/v1/sessions/{name}")
    talk.close()
