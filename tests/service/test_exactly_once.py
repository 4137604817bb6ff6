"""The exactly-once table over HTTP, with retries, races and connections that break."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, half_sent, opened
from tests.support.service.plain import plain_server
from tests.support.service.raw import RawClient, RawWorker, gradient, session_document, tensors_of
from tests.support.service.servers import RunningServer, running_server

PARAMETERS = (torch.linspace(-1, 1, 12).view(3, 4), torch.ones(5, dtype=torch.float64))


@pytest.fixture(scope="module", params=["own connections", "plain ASGI"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Say where a server is: one of ours, or the application on somebody else's."""
    if request.param == "own connections":
        server: RunningServer = request.getfixturevalue("server")
        yield server.url
    else:
        with plain_server() as plain:
            yield plain


@pytest.fixture(scope="module")
def raw(url: str) -> Iterator[RawClient]:
    with RawClient(url) as client:
        yield client


@pytest.fixture
def worker(raw: RawClient, request: pytest.FixtureRequest) -> Iterator[RawWorker]:
    """Return the one worker of a session of this test's own."""
    name = str(abs(hash(request.node.name)))
    yield raw.begun(name, parameters=PARAMETERS)[0]
    raw.request("DELETE", f"/v1/sessions/{name}")


def torch_steps(*gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    parameters = [each.clone() for each in PARAMETERS]
    optimizer = torch.optim.Adagrad(parameters, lr=0.1, foreach=False)
    for step in gradients:
        for parameter, own in zip(parameters, step, strict=True):
            parameter.grad = own.clone()
        optimizer.step()
    return parameters


@pytest.mark.promise(
    "The answer to a push holds the parameters after it, so a worker reads its own writes.",
    area="reads",
)
def test_a_push_is_answered_with_the_step_it_made(worker: RawWorker) -> None:
    """The answer to a push is the receipt, the incarnation, and the parameters of torch after the same step."""
    steps = [gradient(seed, PARAMETERS) for seed in range(5)]
    for index, step in enumerate(steps):
        answer = worker.push(step, base=index)
        assert answer.header["incarnation"] == worker.joined["incarnation"]
        assert answer.receipt == {
            "version": index + 1,
            "base": index,
            "staleness": 0,
            "applied": True,
            "contributors": ["w0"],
            "divisor": 1,
            "kernel": "reference",
        }
        assert set(answer.header["times"]) == {"queue", "receive", "check", "barrier", "kernel"}
        expected = torch_steps(*steps[: index + 1])
        assert all(map(torch.equal, tensors_of(answer.payload, PARAMETERS), expected))


@pytest.mark.promise(
    "A repeated push gets the first receipt and changes nothing, also after later steps.",
    area="exactly once",
)
def test_a_retry_gets_the_original_receipt_and_the_parameters_of_now(worker: RawWorker) -> None:
    """Repeated after later steps, a push is a duplicate; its answer carries what is current."""
    first = worker.push(gradient(1, PARAMETERS)).header
    worker.push(gradient(2, PARAMETERS))
    again = worker.push(gradient(1, PARAMETERS), seq=2)
    assert again.header["duplicate"] is True
    assert again.receipt == first["receipt"]
    assert again.header["version"] == 2
    assert all(map(torch.equal, tensors_of(again.payload, PARAMETERS), worker.pull()[1]))
    assert worker.version == 2


@pytest.mark.promise(
    "A gap in the sequence, other content under a used name, and a push of an older epoch are refused.",
    area="exactly once",
)
@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"seq": 2, "base": 1}, 422, "idempotency_mismatch"),
        ({"seq": 4}, 409, "sequence_gap"),
        ({"seq": 2**62}, 409, "sequence_gap"),
        ({"epoch": 2}, 409, "fenced"),
        ({"worker": "nobody"}, 409, "fenced"),
        ({"incarnation": "0" * 32}, 410, "session_lost"),
        ({"base": 2}, 422, "tensor_mismatch"),
    ],
)
def test_a_push_that_is_not_next_is_refused(
    worker: RawWorker, changes: dict[str, object], status: int, code: str
) -> None:
    """Other content, a gap, another epoch, another incarnation: each is refused, and the next push still works."""
    worker.push(gradient(1, PARAMETERS))
    answer = worker.push(gradient(1, PARAMETERS), **changes)
    assert (answer.status, answer.code) == (status, code)
    if code == "sequence_gap":
        assert answer.document["expected"] == 3
    assert worker.version == 1
    assert worker.push(gradient(2, PARAMETERS)).receipt["version"] == 2
    assert all(map(torch.equal, worker.pull()[1], torch_steps(gradient(1, PARAMETERS), gradient(2, PARAMETERS))))


@pytest.mark.promise(
    "A gap in the sequence, other content under a used name, and a push of an older epoch are refused.",
    area="exactly once",
)
def test_an_older_epoch_is_fenced(raw: RawClient, worker: RawWorker) -> None:
    """When a worker has joined again, what its former life sends is refused before the body is read."""
    raw.join(worker.session, parameters=PARAMETERS)
    answer = worker.push(gradient(1, PARAMETERS))
    assert (answer.status, answer.code) == (409, "fenced")
    assert worker.version == 0


@pytest.mark.promise("A push that is repeated while the first one still waits shares its outcome.", area="exactly once")
def test_a_retry_while_the_push_waits_joins_its_result(raw: RawClient) -> None:
    """A push repeated while the first still waits at the barrier waits with it: one step, one receipt for all."""
    name = "joining"
    w0, w1 = raw.begun(name, "w0", "w1", parameters=PARAMETERS, consistency={"mode": "sync", "workers": 2})
    mine = gradient(1, PARAMETERS)
    head, payload = w0.message(mine)
    with ThreadPoolExecutor(8) as pool:
        twins = [pool.submit(raw.message, "POST", f"{w0.path}/push", head, payload) for _ in range(4)]
        while not raw.request("GET", f"{w0.path}/workers/w0").document["waiting"]:
            pass
        twins += [pool.submit(raw.message, "POST", f"{w0.path}/push", head, payload) for _ in range(4)]
        theirs = w1.push(gradient(2, PARAMETERS))
        answers = [twin.result() for twin in twins]
    receipts = [answer.receipt for answer in (*answers, theirs)]
    assert all(each == receipts[0] for each in receipts)
    assert receipts[0]["contributors"] == ["w0", "w1"]
    assert w0.version == 1
    expected = torch_steps([(a + b) / 2 for a, b in zip(mine, gradient(2, PARAMETERS), strict=True)])
    for answer in answers:
        assert all(map(torch.equal, tensors_of(answer.payload, PARAMETERS), expected))


@pytest.mark.promise(
    "When the deadline of a sync step passes, every waiting worker gets `BarrierTimeout`, and nothing is applied.",
    area="consistency modes",
)
def test_all_who_wait_learn_that_the_deadline_passed(raw: RawClient) -> None:
    """When a sync step times out, everyone who waits gets 409 naming who was missing, and may push the same again."""
    mode = {"mode": "sync", "workers": 3, "deadline_s": 0.2}
    workers = raw.begun("deadline", "w0", "w1", "w2", parameters=PARAMETERS, consistency=mode)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda worker: worker.push(gradient(1, PARAMETERS)), workers[:2]))
    for answer in answers:
        assert (answer.status, answer.code) == (409, "barrier_timeout")
        assert (answer.document["missing"], answer.document["missing_count"]) == (["w2"], 1)
    assert workers[0].version == 0
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda worker: worker.push(gradient(1, PARAMETERS)), workers))
    assert [answer.receipt["version"] for answer in answers] == [1, 1, 1]


def test_an_error_names_a_few_of_many_missing_workers(raw: RawClient) -> None:
    """However many workers a barrier waited for, its answer names the first twenty and counts them all."""
    mode = {"mode": "sync", "workers": 71, "deadline_s": 0.1}
    names = [f"w{number:02}" for number in range(71)]
    first, *_ = raw.begun("crowded-barrier", *names, consistency=mode)
    answer = first.push([torch.ones(4)])
    assert (answer.status, answer.code) == (409, "barrier_timeout")
    assert (answer.document["missing"], answer.document["missing_count"]) == (names[1:21], 70)
    assert "w20 and 50 more" in answer.document["detail"]
    assert "w21" not in answer.document["detail"]


def test_removing_a_session_tells_those_who_wait(raw: RawClient) -> None:
    """A session that is removed while a push waits answers it 410; afterwards there is none of that name."""
    w0, _ = raw.begun("removed", "w0", "w1", consistency={"mode": "sync", "workers": 2})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(w0.push, [torch.ones(4)])
        while not raw.request("GET", f"{w0.path}/workers/w0").document["waiting"]:
            pass
        assert raw.request("DELETE", w0.path).status == 204
        assert (waiting.result().status, waiting.result().code) == (410, "session_lost")
    assert w0.push([torch.ones(4)]).code == "unknown_session"
    anew = raw.join("removed", "w0")
    assert anew.joined["created"] is True
    assert w0.push([torch.ones(4)]).code == "session_lost"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_body_that_is_cut_off_changes_nothing(url: str, worker: RawWorker, share: float) -> None:
    """A client that dies while it sends leaves no trace: the same push, sent whole, is applied once."""
    pieces = encode(*worker.message(gradient(1, PARAMETERS)))
    body = b"".join(pieces)
    cut = len(bytes(pieces[0])) + int(share * (len(body) - len(bytes(pieces[0]))))
    headers = {"Content-Type": MSGPACK, "Content-Length": str(len(body))}
    with half_sent(url, "POST", f"{worker.path}/push", headers, [body[:cut]]):
        pass
    assert worker.push(gradient(1, PARAMETERS)).header["duplicate"] is False
    assert worker.version == 1
    assert all(map(torch.equal, worker.pull()[1], torch_steps(gradient(1, PARAMETERS))))


def test_an_answer_that_is_not_read_changes_nothing(url: str, worker: RawWorker) -> None:
    """A client that dies before it reads the answer finds, when it asks again, that its push was applied once."""
    body = b"".join(encode(*worker.message(gradient(1, PARAMETERS))))
    headers = {"Content-Type": MSGPACK, "Content-Length": str(len(body))}
    with half_sent(url, "POST", f"{worker.path}/push", headers, [body]):
        pass
    assert worker.push(gradient(1, PARAMETERS)).receipt["version"] == 1
    assert worker.version == 1


@pytest.mark.promise(
    "A worker that joins starts from the session's newest parameters; of several that race, one brings the first.",
    area="reads",
)
def test_a_race_to_create_has_one_winner(url: str) -> None:
    """Of 20 clients that create a session at the same moment, one is told that it did, and one sends parameters."""
    count, start = 20, Barrier(20)

    def join(index: int) -> dict[str, object]:
        with RawClient(url) as own, opened(url):
            start.wait()
            document = own.json("POST", "/v1/sessions", session_document("race", f"w{index}", PARAMETERS)).document
            assert isinstance(document, dict)
            return document

    with ThreadPoolExecutor(count) as pool:
        joined = list(pool.map(join, range(count)))
    assert sum(bool(each["created"]) for each in joined) == 1
    assert sum(bool(each["initialise"]) for each in joined) == 1
    assert len({each["incarnation"] for each in joined}) == 1
    assert all(each["epoch"] == 1 for each in joined)


def test_a_race_with_other_options_has_one_session(url: str) -> None:
    """Of clients that create one name with different options, those that differ from the first are told how."""
    count, start = 8, Barrier(8)

    def join(index: int) -> tuple[int, str]:
        with RawClient(url) as own:
            start.wait()
            groups = [{"lr": 0.1 * (1 + index % 2)}]
            answer = own.json("POST", "/v1/sessions", session_document("differ", f"w{index}", groups=groups))
            return answer.status, answer.document.get("detail", "")

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(join, range(count)))
    assert [status for status, _ in answers].count(200) == count // 2
    refused = [detail for status, detail in answers if status == 409]
    assert len(refused) == count // 2
    assert all("lr of its group 0" in detail for detail in refused)


def test_the_creator_that_died_and_came_back_is_asked_again(raw: RawClient) -> None:
    """A worker that created a session, died and joins again is asked for first parameters at once; others wait."""
    first = raw.join("reborn", "w0")
    other = raw.join("reborn", "w1")
    again = raw.join("reborn", "w0")
    assert [each.joined["initialise"] for each in (first, other, again)] == [True, False, True]
    assert first.begin().code == "fenced"
    assert again.begin().status == 200
    assert raw.join("reborn", "w1").joined["initialised"] is True


def test_a_creator_that_left_is_not_waited_for(raw: RawClient) -> None:
    """One that could not send the first parameters, and said so by leaving, leaves that to the next one at once."""
    first = raw.join("given-up", "w0")
    assert raw.request("DELETE", f"{first.path}/workers/w0?epoch={first.joined['epoch']}").status == 204
    other = raw.join("given-up", "w1")
    assert other.joined["initialise"] is True
    assert other.begin().status == 200


def test_a_creator_whose_lease_ran_out_is_not_waited_for(raw: RawClient) -> None:
    """One that was killed before it could send the first parameters holds the others up for its lease, not for ever."""
    raw.join("orphan", "w0", consistency={"mode": "async", "lease_s": 1e-9})
    other = raw.join("orphan", "w1", consistency={"mode": "async", "lease_s": 1e-9})
    assert other.joined["initialise"] is True
    assert other.begin().status == 200
    assert raw.join("orphan", "w2", consistency={"mode": "async", "lease_s": 1e-9}).joined["initialised"] is True


@pytest.mark.promise(
    "After a server was killed its sessions are lost and said to be: a name is never silently another session.",
    area="start and shutdown",
)
def test_a_server_that_was_killed_has_forgotten_and_says_so() -> None:
    """After kill -9 in the middle of a push the name is unknown, and once created anew it is another session."""
    with running_server(loaded=True) as server:
        with RawClient(server.url) as raw:
            (worker,) = raw.begun("killed", parameters=PARAMETERS)
            body = b"".join(encode(*worker.message(gradient(1, PARAMETERS))))
            headers = {"Content-Type": MSGPACK, "Content-Length": str(len(body))}
            with half_sent(server.url, "POST", f"{worker.path}/push", headers, [body[:-8]]):
                server.kill()
        server.restart()
        with RawClient(server.url) as raw:
            worker.raw = raw
            answer = worker.push(gradient(1, PARAMETERS))
            assert (answer.status, answer.code) == (404, "unknown_session")
            (anew,) = raw.begun("killed", parameters=PARAMETERS)
            assert anew.joined["incarnation"] != worker.joined["incarnation"]
            answer = worker.push(gradient(1, PARAMETERS))
            assert (answer.status, answer.code) == (410, "session_lost")
            assert anew.push(gradient(1, PARAMETERS)).receipt["version"] == 1
