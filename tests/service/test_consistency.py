"""Consistency modes over HTTP: set while a session runs, told to its workers, and ended with the server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.service.raw import RawClient, RawWorker, gradient
from tests.support.service.servers import RunningServer, farstep, running_server


def waits(raw: RawClient, worker: RawWorker) -> None:
    """Return when a push of the worker waits for others."""
    while not raw.request("GET", f"{worker.path}/workers/{worker.name}").document["waiting"]:
        pass


@pytest.mark.promise(
    "A running session switches its mode, and every worker learns of it with its next step.",
    area="consistency modes",
)
def test_a_mode_is_switched_in_the_middle_of_a_barrier(raw: RawClient) -> None:
    """Who waits is answered as the new mode decides, and every later answer names the mode."""
    w0, w1 = raw.begun("switched", "w0", "w1", consistency={"mode": "sync", "workers": 2})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(w0.push, [torch.ones(4)])
        waits(raw, w0)
        answer = raw.json("PUT", f"{w0.path}/consistency", {"consistency": {"mode": "bounded", "staleness": 3}})
        assert (answer.status, answer.document) == (200, {"consistency": {"mode": "bounded", "staleness": 3}})
        first = waiting.result()
    assert (first.receipt["version"], first.receipt["contributors"]) == (1, ["w0"])
    second = w1.push([torch.ones(4)])
    assert (second.receipt["version"], second.header["consistency"]) == (2, {"mode": "bounded", "staleness": 3})
    assert raw.request("GET", w0.path).document["consistency"] == {"mode": "bounded", "staleness": 3}


def test_an_answer_names_no_mode_while_there_is_the_first(raw: RawClient) -> None:
    """Workers joined with it, so they know."""
    (w0,) = raw.begun("unswitched")
    assert "consistency" not in w0.push([torch.ones(4)]).header


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ({"mode": "eventual"}, "invalid_option"),
        ({"mode": "sync"}, "invalid_option"),
        ({"mode": "sync", "workers": 2, "quorum": 3}, "invalid_option"),
        ({"mode": "async", "staleness": 1}, "invalid_option"),
        ({"mode": "sync", "workers": 2**63, "quorum": 1}, "invalid_option"),  # which no answer could carry
        ({"mode": "bounded", "staleness": 2**63}, "invalid_option"),
        ({"mode": "async", "delay_compensation": 10**30}, "invalid_option"),
        ({"mode": "sync", "workers": 1}, "session_full"),
        ("async", "invalid_request"),
    ],
)
def test_a_mode_that_cannot_be_leaves_the_session_as_it_is(raw: RawClient, mode: object, code: str) -> None:
    """Unknown modes and options, and fewer places than live workers, are refused, and the barrier goes on."""
    w0, w1 = raw.begun("kept", "w0", "w1", consistency={"mode": "sync", "workers": 2})
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(w0.push, [torch.ones(4)])
            waits(raw, w0)
            assert raw.json("PUT", f"{w0.path}/consistency", {"consistency": mode}).code == code
            assert raw.request("GET", w0.path).document["consistency"] == {"mode": "sync", "workers": 2}
            assert w1.push([torch.ones(4)]).receipt["contributors"] == ["w0", "w1"]
            waiting.result()
    finally:
        raw.request("DELETE", w0.path)


def test_who_joins_has_to_name_the_present_mode(raw: RawClient) -> None:
    """After a switch the old mode is another option than the session's; the error says which it has."""
    (w0,) = raw.begun("renamed")
    raw.json("PUT", f"{w0.path}/consistency", {"consistency": {"mode": "sync", "workers": "live"}})
    document = {
        "name": "renamed",
        "worker": "w1",
        "optimizer": "Adagrad",
        "groups": [{"lr": 0.1}],
        "segments": [{"name": "p0", "shape": [4], "dtype": "float32"}],
        "kernel": "reference",
    }
    refused = raw.json("POST", "/v1/sessions", document)
    assert refused.code == "options_differ"
    assert "its consistency is Sync(workers='live'), not Async()" in refused.document["detail"]
    mode = {"mode": "sync", "workers": "live"}
    assert raw.json("POST", "/v1/sessions", {**document, "consistency": mode}).status == 200


@pytest.mark.promise(
    "A worker that comes late with a quorum is told so, gets the present parameters, and goes on.",
    area="consistency modes",
)
def test_a_late_push_is_answered_with_the_parameters(raw: RawClient) -> None:
    """Its receipt says that it was not applied, and why; its sequence is consumed, and a retry is told the same."""
    mode = {"mode": "sync", "workers": 3, "quorum": 1}
    w0, w1, _ = raw.begun("late", "w0", "w1", "w2", consistency=mode)
    w0.push([torch.ones(4)])
    late = w1.push([torch.ones(4)])
    assert late.receipt == {
        "version": 1,
        "base": 0,
        "staleness": 1,
        "applied": False,
        "contributors": [],
        "divisor": 1,
        "kernel": "",
        "reason": "late",
    }
    assert len(late.payload) == 16
    again = w1.push([torch.ones(4)], seq=1)
    assert again.header["duplicate"]
    assert again.receipt == late.receipt
    assert w1.push([torch.ones(4)], base=1).receipt["applied"]


def test_a_pull_renews_the_lease_of_a_worker_that_says_who_it_is(raw: RawClient) -> None:
    """After its lease it is not live; a pull under its present epoch makes it live again, one of another does not."""
    mode = {"mode": "async", "lease_s": 0.05}
    (w0,) = raw.begun("leases", consistency=mode)

    def live() -> bool:
        return bool(raw.request("GET", f"{w0.path}/workers/w0").document["live"])

    while live():
        pass
    for query in ("", "?worker=w0&epoch=7", "?worker=w9&epoch=1"):
        assert raw.request("GET", f"{w0.path}/contents{query}").status == 200
        assert not live()
    assert raw.request("GET", f"{w0.path}/contents?worker=w0&epoch=1").status == 200
    assert live()


@pytest.mark.parametrize(
    "query", ["worker=w0", "epoch=1", "worker=w0&epoch=one", "worker=&epoch=1", "worker=w0&epoch="]
)
def test_half_a_name_is_no_name(raw: RawClient, query: str) -> None:
    """A pull names its worker whole or not at all."""
    (w0,) = raw.begun("named")
    assert raw.request("GET", f"{w0.path}/contents?{query}").code == "invalid_request"


def test_the_command_line_switches_modes(raw: RawClient, server: RunningServer) -> None:
    """Options are NAME=VALUE; what is none, or is there twice, is refused with the command's own words."""
    (w0,) = raw.begun("verbal")
    done = farstep(
        "sessions",
        "mode",
        "verbal",
        "sync",
        "workers=3",
        "quorum=2",
        "deadline_s=2.5",
        "--server",
        server.url,
        loaded=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Session verbal goes on as mode sync, workers 3, quorum 2, deadline_s 2.5.\n"
    assert raw.request("GET", w0.path).document["consistency"]["quorum"] == 2
    done = farstep("sessions", "mode", "verbal", "sync", "workers", "--server", server.url, loaded=True)
    assert done.returncode != 0
    assert "OPTION=VALUE" in done.stderr
    done = farstep("sessions", "mode", "verbal", "sync", "workers=2", "workers=3", "--server", server.url, loaded=True)
    assert done.returncode != 0
    assert "'workers' is given twice." in done.stderr
    assert raw.request("GET", w0.path).document["consistency"]["workers"] == 3


@pytest.mark.promise(
    "A server that ends tells the workers that wait at a barrier, and applies nothing of theirs.",
    area="start and shutdown",
)
def test_who_waits_is_answered_when_the_server_ends() -> None:
    """SIGTERM in the middle of a barrier: the push is refused as unavailable at once, and the server ends well."""
    with running_server(loaded=True) as server, RawClient(server.url) as raw, ThreadPoolExecutor(1) as pool:
        w0, _ = raw.begun("ending", "w0", "w1", consistency={"mode": "sync", "workers": 2})
        waiting = pool.submit(w0.push, gradient(1, w0.parameters))
        waits(raw, w0)
        server.process.terminate()
        answer = waiting.result()
        assert (answer.status, answer.code) == (503, "unavailable")
        assert "which waited, was not applied" in answer.document["detail"]
        assert "again" in answer.document["remedy"]
        assert server.stop() == 0
