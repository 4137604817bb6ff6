"""How long and how often a client tries again."""

from __future__ import annotations

import re

import httpx
import pytest

from farstep.errors import NonFinite, NotDurable, Recovering, Unavailable
from farstep.http_link.retry import FIRST_WAIT_S, LONGEST_ABSENT_S, LONGEST_WAIT_S, RetryPolicy


class Clock:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def patience(timeout_s: float) -> tuple[RetryPolicy, Clock]:
    clock = Clock()
    return RetryPolicy(timeout_s, clock=clock, wait=clock.wait), clock


def test_a_call_is_repeated_until_it_answers() -> None:
    """Failures to connect and requests to wait are tried again; the answer is returned."""
    trying, _ = patience(60)
    failures: list[Exception] = [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), Unavailable("busy")]

    def attempt() -> str:
        if failures:
            raise failures.pop(0)
        return "answer"

    assert trying.call("Pushing", "http://server", attempt) == "answer"
    assert trying.attempts == 4


def test_the_error_comes_within_the_stated_time_and_says_what_to_do() -> None:
    """When the time is up, the error names the server, the time, the tries and the reason."""
    trying, clock = patience(10)

    def attempt() -> str:
        raise httpx.ConnectError("refused")

    with pytest.raises(Unavailable) as given_up:
        trying.call("Pushing", "http://server", attempt)
    assert clock.now == pytest.approx(10)
    assert max(clock.waits) <= LONGEST_WAIT_S
    text = str(given_up.value)
    assert "http://server" in text
    assert "10 s" in text
    assert "nothing accepts connections" in text
    assert given_up.value.side == "client"


def test_what_the_server_refused_is_not_repeated() -> None:
    """An error that trying again cannot change is raised at once."""
    trying, clock = patience(10)

    def attempt() -> str:
        raise NonFinite("NaN")

    with pytest.raises(NonFinite):
        trying.call("Pushing", "http://server", attempt)
    assert trying.attempts == 1
    assert not clock.waits


def test_a_server_that_is_being_started_is_looked_for_often() -> None:
    """A refused connection is tried again within a quarter of a second, however long it has been so."""
    trying, clock = patience(30)

    def attempt() -> str:
        if clock.now < 20:
            raise httpx.ConnectError("refused")
        return "answer"

    assert trying.call("Pushing", "http://server", attempt) == "answer"
    assert max(clock.waits) <= LONGEST_ABSENT_S
    assert clock.now <= 20 + LONGEST_ABSENT_S


@pytest.mark.parametrize(("asked_s", "longest_s"), [(0.3, 0.3), (0.0, 1.0), (600.0, 1.0)])
@pytest.mark.parametrize("took_s", [0.2, 2.0, 20.0])
def test_a_server_that_recovers_is_asked_the_more_often_the_shorter_it_takes(
    took_s: float, asked_s: float, longest_s: float
) -> None:
    """A recovery costs an eighth of its time more, at most what the server says it takes, and never over a second."""
    trying, clock = patience(30)
    recovering = Recovering("reading")
    recovering.retry_after_s = asked_s

    def attempt() -> str:
        if clock.now < took_s:
            raise recovering
        return "answer"

    assert trying.call("Pushing", "http://server", attempt) == "answer"
    assert clock.now <= took_s + min(max(FIRST_WAIT_S, took_s / 8), longest_s)
    assert max(clock.waits) <= longest_s
    assert trying.attempts < 200


@pytest.mark.parametrize("error", [Recovering("The session is being read."), NotDurable("No space left.")])
def test_what_the_last_answer_said_is_raised(error: Unavailable) -> None:
    """When the patience ends, the error is of the class of the last answer, and says what the server said."""
    trying, _ = patience(5)

    def attempt() -> str:
        raise error

    with pytest.raises(type(error), match=re.escape(error.detail.rstrip("."))) as given_up:
        trying.call("Pushing", "http://server", attempt)
    assert given_up.value.side == "client"
    assert trying.attempts > 1
