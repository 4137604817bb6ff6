"""Workers that are away for long: how long their receipts are kept, on a server whose clock is the test's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from farstep import Async
from farstep.errors import Fenced
from farstep.settings import RemoteOptions
from farstep_service.coordinator.roster import FORGOTTEN_AFTER_S, LAPSED_KEPT
from tests.support.client.carrying import Carrying
from tests.support.client.twins import check_parameters, drawn
from tests.support.client.workers import Reference, Worker
from tests.support.service.plain import plain_server
from tests.support.service.raw import RawClient

LEASE_S = 60.0


class Clock:
    """Tell the time that a test says it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class LosingAnswers(Carrying):
    """Carry a push and lose its answer, once, after something else has happened meanwhile.

    Attributes:
        meanwhile: what happens.
        joining: the document that its worker joined with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joining: dict[str, Any] = {}
        self.meanwhile: Callable[[], None] = lambda: None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/sessions":
            self.joining = json.loads(request.read())
        response = super().handle_request(request)
        if self.armed and request.url.path.endswith("/push"):
            self.armed = False
            response.read()
            self.meanwhile()
            raise httpx.ReadError("the answer was lost")
        return response


class Surroundings:
    """A session on a server with a clock, its worker `w0`, whose next answer is lost, and others."""

    def __init__(self, url: str, clock: Clock) -> None:
        self.clock = clock
        self.raw = RawClient(url)
        self._transport = LosingAnswers()
        self.place: RemoteOptions = {
            "server": url,
            "session": "away",
            "kernel": "reference",
            "consistency": Async(lease_s=LEASE_S),
        }
        self.w0 = Worker({**self.place, "transport": self._transport}, "w0")
        self.w0.step(drawn(1))

    def step_while(self, meanwhile: Callable[[], None]) -> None:
        """Let `w0` step, whose push is applied; something happens before it asks again for the answer."""
        self._transport.meanwhile = meanwhile
        self._transport.armed = True
        self.w0.step(drawn(2))

    def pass_s(self, seconds: float) -> None:
        """Let time pass, and somebody join at the end."""
        self.clock.now += seconds
        self.join("newcomer")

    def join(self, name: str) -> None:
        """Let somebody join who never pushes."""
        answer = self.raw.json("POST", "/v1/sessions", {**self._transport.joining, "worker": name})
        assert answer.status == 200, answer.body


@pytest.fixture
def around() -> Iterator[Surroundings]:
    """Run such a server."""
    clock = Clock()
    with plain_server(clock) as url:
        surroundings = Surroundings(url, clock)
        with surroundings.raw:
            yield surroundings
        surroundings.w0.optimizer.close()


@pytest.mark.promise(
    "A repeated push gets the first receipt and changes nothing, also after later steps.",
    area="exactly once",
)
def test_for_an_hour_a_retry_gets_the_first_receipt(around: Surroundings) -> None:
    """A worker that was away for its lease and nearly an hour learns what became of its push, which counts once."""

    def away() -> None:
        around.pass_s(LEASE_S)
        around.pass_s(FORGOTTEN_AFTER_S - 1)

    around.step_while(away)
    assert around.w0.optimizer.version == 2
    reference = Reference()
    for seed in (1, 2):
        reference.step(drawn(seed))
    check_parameters(around.w0.parameters, reference.parameters)


@pytest.mark.promise(
    "A push whose receipt is no longer kept is not applied again, and no receipt is made up.",
    area="exactly once",
)
def test_after_an_hour_it_is_fenced_until_it_joins_again(around: Surroundings) -> None:
    """Its push was applied once, its receipt is gone, and `rejoin()` goes on from the session's parameters."""

    def away() -> None:
        around.pass_s(LEASE_S)
        around.pass_s(FORGOTTEN_AFTER_S)

    with pytest.raises(Fenced, match="w0"):
        around.step_while(away)
    check_it_comes_back(around)


@pytest.mark.parametrize("others", [LAPSED_KEPT - 1, LAPSED_KEPT])
def test_so_many_others_may_go_away_after_it(around: Surroundings, others: int) -> None:
    """With one fewer than the documents say it has its receipt, with that many it is fenced."""

    def away() -> None:
        around.pass_s(LEASE_S)  # with a newcomer, who is the first of the others
        for number in range(1, others):
            around.join(f"w{number}")
        around.clock.now += LEASE_S
        around.join("last")

    if others < LAPSED_KEPT:
        around.step_while(away)
        assert around.w0.optimizer.version == 2
        return
    with pytest.raises(Fenced, match="w0"):
        around.step_while(away)
    check_it_comes_back(around)


def check_it_comes_back(around: Surroundings) -> None:
    """Check that `w0` is shut out until it joins again, and then goes on as if nothing had been asked twice."""
    w0 = around.w0
    with pytest.raises(Fenced):
        w0.step(drawn(3))
    assert w0.optimizer.rejoin() is False
    reference = Reference()
    for seed in (1, 2):
        reference.step(drawn(seed))
    check_parameters(w0.parameters, reference.parameters)
    w0.step(drawn(4))
    reference.step(drawn(4))
    check_parameters(w0.parameters, reference.parameters)
    assert w0.optimizer.version == 3
