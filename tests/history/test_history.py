"""The history of a session: its versions, back to one of them, from one of them, and through some again."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

import farstep
from farstep.errors import StateRolledBack
from farstep.protocol.durability import to_document
from tests.support.service.histories import SHAPES, came_back, equal, lines_of, post, trained
from tests.support.service.raw import RawClient, gradient
from tests.support.service.servers import RunningServer, running_server
from tests.support.service.servers import farstep as run_farstep

# -- log


@pytest.mark.promise(
    "`farstep sessions log` says of each version that is kept when and by whom it was made.", area="sessions and files"
)
def test_the_log_has_each_version(raw: RawClient) -> None:
    """The log names kind, workers, staleness, norm and kernel of each version, with the time of day and a chain."""
    began = time.time()
    w0, w1 = raw.begun("log", "w0", "w1", parameters=SHAPES, policy={"clip_norm": 1e6})
    assert w0.push(gradient(1, SHAPES)).status == 200
    assert w1.push(gradient(2, SHAPES)).status == 200  # on version 0: one step too old
    assert w0.put({"param": SHAPES}).status == 200
    assert w0.append({"more": torch.ones(2)}).status == 200
    lines = lines_of(raw, "log")
    assert [line["version"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["write"] for line in lines] == ["contents", "step", "step", "contents", "group"]
    assert [line["workers"] for line in lines] == [["w0"], ["w0"], ["w1"], ["w0"], ["w0"]]
    assert [line["staleness"] for line in lines] == [0, 0, 1, 0, 0]
    assert [line["kernel"] for line in lines] == ["", "reference", "reference", "", ""]
    wanted = [torch.cat([each.flatten() for each in gradient(seed, SHAPES)]).norm().item() for seed in (1, 2)]
    assert [line["norm"] for line in lines[1:3]] == pytest.approx(wanted)
    assert lines[0]["norm"] is None
    assert began <= lines[0]["at"] <= lines[-1]["at"] <= time.time()
    assert len({line["hash"] for line in lines}) == 5
    assert lines_of(raw, "log")[2]["hash"] == lines[2]["hash"]


def test_a_step_of_several_workers_is_one_line(raw: RawClient) -> None:
    """A barrier's step names all of its workers in the order of their sum, and the staleness of none."""
    mode = {"consistency": {"mode": "sync", "workers": 2}}
    w0, w1 = raw.begun("barrier", "w0", "w1", parameters=SHAPES, **mode)
    import threading

    with RawClient(raw.url) as other:
        w1.raw = other
        thread = threading.Thread(target=lambda: w1.push(gradient(1, SHAPES)))
        thread.start()
        assert w0.push(gradient(2, SHAPES)).status == 200
        thread.join(60)
    assert [(line["version"], line["workers"]) for line in lines_of(raw, "barrier")] == [(0, ["w0"]), (1, ["w0", "w1"])]


def test_the_log_has_pages(raw: RawClient) -> None:
    """A page ends with a link to the next one, and all of them together are the log."""
    trained(raw, "pages", 7)
    path, seen = "/v1/sessions/pages/log", []
    query = "?limit=3"
    while query:
        answer = raw.http.get(path + query)
        seen += [line["version"] for line in answer.json()]
        query = answer.links["next"]["url"] if "next" in answer.links else ""
    assert seen == list(range(8))
    assert raw.request("GET", path + "?limit=0").status == 400
    assert raw.request("GET", path + "?limit=1001").status == 400


def test_the_log_survives_the_server(server: RunningServer, raw: RawClient) -> None:
    """After kill -9 and another start the log is what it was, and it goes on."""
    worker, _ = trained(raw, "killed", 3)
    before = lines_of(raw, "killed")
    server.kill()
    server.restart()
    with RawClient(server.url) as again:
        came_back(again, "killed")
        worker.raw = again
        assert worker.push(gradient(9, SHAPES), base=3).status == 200
        after = lines_of(again, "killed")
    assert after[:-1] == before
    assert after[-1]["version"] == 4


@pytest.mark.parametrize("level", ["none", farstep.Snapshot(every_steps=2)])
def test_without_a_journal_there_is_no_log(raw: RawClient, level: Any) -> None:
    """A session at a level without a journal is refused, with what would have one."""
    name = f"bare-{level if level == 'none' else 'snapshot'}"
    trained(raw, name, 1, durability=to_document(level))
    answer = raw.request("GET", f"/v1/sessions/{name}/log")
    assert answer.status == 422
    assert "durability=farstep.Journal()" in answer.document["remedy"]


# -- rollback


@pytest.mark.promise(
    "`farstep sessions rollback` goes back to any version that is kept, with its bits; its workers are told.",
    area="sessions and files",
)
@pytest.mark.parametrize("to", [0, 3, 5])
def test_a_session_goes_back_with_the_bits_of_that_version(raw: RawClient, to: int) -> None:
    """Parameters are those of the version; from there on the same gradients give the same steps as they did."""
    name = f"back-{to}"
    worker, versions = trained(raw, name, 5, groups=[{"lr": 0.1, "lr_decay": 0.1}])
    life = post(raw, f"{name}/rollback", {"version": to})
    assert life["version"] == to
    assert life["incarnation"] != worker.joined["incarnation"]
    assert worker.pull()[0] == to
    assert equal(worker.pull()[1], versions[to])
    refused = worker.push(gradient(9, SHAPES), base=5)
    assert (refused.status, refused.document["code"], refused.document["version"]) == (409, "rolled_back", to)
    fresh = raw.join(name, "w0", SHAPES, groups=[{"lr": 0.1, "lr_decay": 0.1}])
    for step in range(to, 5):
        assert fresh.push(gradient(step, SHAPES), base=step).status == 200
        assert equal(fresh.pull()[1], versions[step + 1])


def test_options_go_back_too(raw: RawClient) -> None:
    """The learning rate that was in force at the version is in force again."""
    worker, _ = trained(raw, "options", 2)
    changed = raw.json("PATCH", "/v1/sessions/options/groups", {"groups": {"0": {"lr": 0.5}}})
    assert changed.status == 200
    assert worker.push(gradient(7, SHAPES), base=2).status == 200
    post(raw, "options/rollback", {"version": 1})
    assert raw.request("GET", "/v1/sessions/options").document["groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("kill", [False, True])
def test_a_session_that_went_back_stays_there(server: RunningServer, kill: bool) -> None:
    """After a stop or kill -9 the session is at the version it went back to, with what was pushed since."""
    name = f"stays-{kill}"
    with RawClient(server.url) as raw:
        old, versions = trained(raw, name, 4)
        life = post(raw, f"{name}/rollback", {"version": 2})
        fresh = raw.join(name, "w0", SHAPES)
        assert fresh.push(gradient(2, SHAPES), base=2).status == 200
    if kill:
        server.kill()
    server.restart()
    with RawClient(server.url) as raw:
        came_back(raw, name)
        old.raw = fresh.raw = raw
        assert fresh.pull()[0] == 3
        assert equal(fresh.pull()[1], versions[3])
        assert fresh.push(gradient(3, SHAPES), base=3).status == 200
        assert equal(fresh.pull()[1], versions[4])
        assert raw.request("GET", f"/v1/sessions/{name}").document["incarnation"] == life["incarnation"]
        assert old.push(gradient(9, SHAPES), base=4).document["code"] == "rolled_back"
        assert [line["version"] for line in lines_of(raw, name)] == [3, 4]  # what was undone is gone


def test_a_version_that_is_not_kept_is_refused(raw: RawClient) -> None:
    """The error says which versions are, and the session goes on as it was."""
    worker, _ = trained(raw, "kept", 2)
    answer = raw.json("POST", "/v1/sessions/kept/rollback", {"version": 7})
    assert answer.status == 422
    assert "versions 0 to 2 can be had" in answer.document["detail"]
    assert worker.push(gradient(5, SHAPES), base=2).status == 200


def test_at_the_snapshot_level_there_are_the_snapshots(raw: RawClient) -> None:
    """A session without a journal goes back to a version that has a snapshot, and to no other one."""
    level = to_document(farstep.Snapshot(every_steps=1000, every_s=3600.0))
    worker, _ = trained(raw, "snapshots", 3, durability=level)
    answer = raw.json("POST", "/v1/sessions/snapshots/rollback", {"version": 2})
    assert answer.status == 422
    assert "no version can be had" in answer.document["detail"]
    assert worker.version == 3


def test_a_push_that_waits_is_told(raw: RawClient) -> None:
    """A worker at a barrier is told that the state was rolled back, instead of waiting for its deadline."""
    from concurrent.futures import ThreadPoolExecutor

    mode = {"consistency": {"mode": "sync", "workers": 2}}
    w0, _ = raw.begun("waits", "w0", "w1", parameters=SHAPES, **mode)
    with RawClient(raw.url) as other, ThreadPoolExecutor(1) as pool:
        w0.raw = other
        pushed = pool.submit(lambda: w0.push(gradient(1, SHAPES)))
        while not raw.request("GET", "/v1/sessions/waits/workers/w0").document["waiting"]:
            pass
        post(raw, "waits/rollback", {"version": 0})
        assert pushed.result(60).document["code"] == "rolled_back"


def test_an_optimizer_is_told_and_can_go_on(server: RunningServer) -> None:
    """`StateRolledBack` is raised by the next step; after `rejoin()` training goes on at the version."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = farstep.optim.SGD([weight], lr=0.5, server=server.url, session="client")
    for _ in range(3):
        weight.grad = torch.ones(3)
        optimizer.step()
    with RawClient(server.url) as raw:
        post(raw, "client/rollback", {"version": 1})
    weight.grad = torch.ones(3)
    with pytest.raises(StateRolledBack) as told:
        optimizer.step()
    assert told.value.extra["version"] == 1
    optimizer.rejoin()
    assert torch.equal(weight.detach(), torch.full((3,), -0.5))
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((3,), -1.0))


KILLS = [
    "journal.rotate:1",
    "journal.begin.created:1",
    "journal.begin.mapped:1",
    "journal.begin.named:1",
    "snapshot.written:1",
    "snapshot.synced:2",
    "snapshot.state:1",
    "snapshot.manifest:1",
    "snapshot.written:3",
    "snapshot.renamed:3",
    "snapshot.named:3",
    "snapshot.forget:1",
    "snapshot.forget:3",
    "snapshot.forgotten:1",
    "journal.forget.before:1",
    "journal.forget.after:1",
]


@pytest.mark.promise(
    "A rollback that is killed leaves the old session or the new one, whole.", area="sessions and files"
)
@pytest.mark.parametrize("place", KILLS)
def test_a_rollback_that_is_killed_leaves_the_old_session_or_the_new_one(place: str, tmp_path: Path) -> None:
    """The process ends at each place of a rollback: the next one has all of version 4, or version 2 as another life."""
    with running_server("--data-dir", str(tmp_path / "data"), loaded=True) as server:
        with RawClient(server.url) as raw:
            old, versions = trained(raw, "s", 4)
        server.restart({"FARSTEP_FAILPOINT": place})
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            with pytest.raises(httpx.TransportError):
                raw.json("POST", "/v1/sessions/s/rollback", {"version": 2})
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            old.raw = raw
            version, parameters = old.pull()
            assert version in (2, 4)
            done = place.startswith(("snapshot.named:3", "snapshot.renamed:3", "snapshot.forg", "journal.forget"))
            assert version == (2 if done else 4)
            assert equal(parameters, versions[version])
            if version == 4:
                assert old.push(gradient(4, SHAPES), base=4).status == 200
            else:
                assert old.push(gradient(4, SHAPES), base=4).document["code"] == "rolled_back"
            fresh = raw.join("s", "w1", SHAPES)
            assert fresh.push(gradient(5, SHAPES), base=version).status == 200
            now = fresh.pull()
        server.kill()
        server.restart()
        with RawClient(server.url) as raw:
            came_back(raw, "s")
            fresh.raw = raw
            assert fresh.pull()[0] == now[0]
            assert equal(fresh.pull()[1], now[1])


# -- fork


@pytest.mark.promise(
    "`farstep sessions fork` creates a session with the state of another one, now or at a version.",
    area="sessions and files",
)
@pytest.mark.parametrize("at", [None, 2])
def test_a_fork_has_the_same_state_and_its_own_future(raw: RawClient, at: int | None) -> None:
    """Both take the same step with the same gradient; steps of one do not change the other."""
    name, new = f"origin-{at}", f"fork-{at}"
    document: dict[str, Any] = {"groups": [{"lr": 0.1, "lr_decay": 0.1}]}
    worker, versions = trained(raw, name, 4, **document)
    begin = 4 if at is None else at
    life = post(raw, f"{name}/fork", {"name": new, "version": at})
    assert (life["version"], life["durability"]) == (begin, "journal:os")
    assert life["incarnation"] != worker.joined["incarnation"]
    forked = raw.join(new, "w0", SHAPES, **document)
    assert equal(forked.pull()[1], versions[begin])
    assert forked.push(gradient(begin, SHAPES), base=begin).status == 200
    assert equal(worker.pull()[1], versions[4])
    assert worker.push(gradient(4, SHAPES), base=4).status == 200
    if at is None:
        assert equal(forked.pull()[1], worker.pull()[1])
    else:
        assert equal(forked.pull()[1], versions[3])


def test_a_fork_has_the_rounds_that_are_accumulated(raw: RawClient) -> None:
    """A round that waits for its second one waits in the fork, too: the same second round makes the same step."""
    document: dict[str, Any] = {"policy": {"accumulate": 2}}
    (worker,) = raw.begun("rounds", parameters=SHAPES, **document)
    assert worker.push(gradient(1, SHAPES)).receipt["reason"] == "accumulated"
    post(raw, "rounds/fork", {"name": "rounds-2"})
    forked = raw.join("rounds-2", "w0", SHAPES, **document)
    for each in (worker, forked):
        assert each.push(gradient(2, SHAPES)).receipt["applied"]
    assert equal(worker.pull()[1], forked.pull()[1])


def test_a_fork_survives_the_server_and_its_origin(server: RunningServer) -> None:
    """After the origin was removed and the server killed, the fork is there with its bits."""
    with RawClient(server.url) as raw:
        trained(raw, "gone", 3)
        post(raw, "gone/fork", {"name": "stays", "version": 1})
        forked = raw.join("stays", "w0", SHAPES)
        assert forked.push(gradient(1, SHAPES), base=1).status == 200
        before = forked.pull()
        assert raw.request("DELETE", "/v1/sessions/gone").status == 204
    server.kill()
    server.restart()
    with RawClient(server.url) as raw:
        came_back(raw, "stays")
        forked.raw = raw
        assert forked.pull()[0] == before[0]
        assert equal(forked.pull()[1], before[1])


def test_a_fork_needs_a_free_name(raw: RawClient) -> None:
    """A name that is taken is refused, and so is one that is no name."""
    trained(raw, "taken", 1)
    assert raw.json("POST", "/v1/sessions/taken/fork", {"name": "taken"}).document["code"] == "session_exists"
    assert raw.json("POST", "/v1/sessions/taken/fork", {"name": "../up"}).status == 400
    assert raw.json("POST", "/v1/sessions/nowhere/fork", {"name": "x"}).document["code"] == "unknown_session"


# -- replay


@pytest.mark.promise(
    "`farstep sessions replay` names the worker whose gradient grew most, in a session beside the live one.",
    area="sessions and files",
)
def test_a_replay_names_the_worker_whose_gradient_exploded(server: RunningServer, raw: RawClient) -> None:
    """One of three workers sends a gradient that is 1,000 times too large: the command names it, and the version."""
    workers = raw.begun("explodes", "w0", "w1", "w2", parameters=SHAPES)
    sent: dict[int, list[Tensor]] = {}
    for step in range(12):
        gradients = gradient(step, SHAPES)
        if step == 7:
            gradients[1][1, 2] = 1000.0
        sent[step + 1] = gradients
        assert workers[step % 3].push(gradients, base=step).status == 200
    before = workers[0].pull()
    found = json.loads(cli(server, "replay", "explodes", "--from", "2", "--to", "11", "--json"))
    assert [each["version"] for each in found] == list(range(2, 12))
    for each in found:
        (brought,) = each["gradients"]
        flat = torch.cat([tensor.flatten() for tensor in sent[each["version"]]]).double()
        assert brought["norm"] == pytest.approx(flat.norm().item())
        assert brought["largest"] == pytest.approx(flat.abs().max().item())
        assert brought["worker"] == f"w{(each['version'] - 1) % 3}"
    assert [each["version"] for each in found if each["jump"]] == [8]
    assert found[6]["gradients"][0] == {**found[6]["gradients"][0], "worker": "w1", "parameter": "p1"}
    said = cli(server, "replay", "explodes", "--from", "2", "--to", "11")
    assert "The gradient of w1 for version 8" in said
    assert "its largest element is in p1" in said
    assert workers[0].pull()[0] == before[0]
    assert equal(workers[0].pull()[1], before[1])


def test_a_replay_says_how_far_the_parameters_moved(raw: RawClient) -> None:
    """The change of each version is the norm of the difference of the parameters before and after."""
    _, versions = trained(raw, "moved", 4)
    answer = raw.request("GET", "/v1/sessions/moved/replay?from=0&to=4")
    changes = [each["change"] for each in answer.document]
    flat = [torch.cat([each.flatten() for each in version]).double() for version in versions]
    wanted = [0.0, *((after - before).norm().item() for before, after in itertools.pairwise(flat))]
    assert changes == pytest.approx(wanted)


def test_a_replay_counts_each_round_of_an_accumulated_step(raw: RawClient) -> None:
    """A step of three rounds has three gradients; one that is not finite is said to be, and marked."""
    (worker,) = raw.begun("thrice", parameters=SHAPES, policy={"accumulate": 3}, nonfinite="allow")
    for step in range(6):
        gradients = gradient(step, SHAPES)
        if step == 4:
            gradients[0][0] = float("nan")
        worker.push(gradients, base=step // 3)
    answer = raw.request("GET", "/v1/sessions/thrice/replay?from=1&to=2")
    assert answer.status == 200, answer.body
    first, second = answer.document
    assert [len(each["gradients"]) for each in (first, second)] == [3, 3]
    assert [each["norm"] is None for each in second["gradients"]] == [False, True, False]
    assert (first["jump"], second["jump"]) == (False, True)


def test_a_replay_of_what_is_not_kept_is_refused(raw: RawClient) -> None:
    """Versions that were not made, and ranges that are none, are refused with what is kept."""
    trained(raw, "short", 2)
    for query in ("from=1&to=9", "from=5&to=9"):
        answer = raw.request("GET", f"/v1/sessions/short/replay?{query}")
        assert answer.status == 422
        assert "versions 0 to 2 can be had" in answer.document["detail"]
    assert raw.request("GET", "/v1/sessions/short/replay?from=2&to=1").status == 422
    assert raw.request("GET", "/v1/sessions/short/replay?from=2").status == 400


# -- the command line


def cli(server: RunningServer, verb: str, *arguments: str) -> str:
    """Return what a verb of `farstep sessions` prints."""
    done = run_farstep("sessions", verb, *arguments, "--server", server.url, loaded=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_verbs_print_what_they_did(server: RunningServer, raw: RawClient) -> None:
    """Log, fork and rollback print a table and a sentence, or one line of JSON."""
    trained(raw, "verbs", 3)
    rows = cli(server, "log", "verbs").splitlines()
    assert rows[0].split() == ["VERSION", "TIME", "WRITE", "WORKERS", "STALENESS", "NORM", "KERNEL", "HASH"]
    assert [row.split()[0] for row in rows[1:]] == ["0", "1", "2", "3"]
    assert [line["version"] for line in json.loads(cli(server, "log", "verbs", "--json"))] == [0, 1, 2, 3]
    assert cli(server, "fork", "verbs", "verbs-2", "--at", "1") == "Session verbs-2 begins at version 1 of verbs.\n"
    assert json.loads(cli(server, "fork", "verbs", "verbs-3", "--json"))["version"] == 3
    assert cli(server, "rollback", "verbs", "--to", "2", "--yes") == "Session verbs goes on at version 2.\n"
    assert json.loads(cli(server, "rollback", "verbs", "--to", "2", "--yes", "--json"))["version"] == 2


def test_a_rollback_asks_first(server: RunningServer, raw: RawClient) -> None:
    """Without --yes the verb asks, with both versions; with another answer than yes nothing happens."""
    trained(raw, "asks", 3)
    done = run_farstep("sessions", "rollback", "asks", "--to", "1", "--server", server.url, answer="n\n", loaded=True)
    assert done.returncode == 1
    assert "from version 3 to 1?" in done.stdout
    assert raw.request("GET", "/v1/sessions/asks").document["version"] == 3
    refused = run_farstep("sessions", "rollback", "asks", "--to", "1", "--server", server.url, "--json", loaded=True)
    assert refused.returncode == 2
