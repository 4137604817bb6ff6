"""How long and how often to try again: exponential backoff with jitter, up to a stated time.

Only calls that are safe to repeat are tried again: every write carries a name (worker, epoch, sequence), reads change
nothing, and joining twice only opens a new epoch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from farstep.errors import FarstepError, Unavailable

Answer = TypeVar("Answer")

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 2.0


@dataclass(slots=True)
class Patience:
    """Repeat a call until it answers, or until `timeout_s` has passed.

    Attributes:
        timeout_s: seconds from the first try until the error is raised.
        clock: monotonic seconds.
        wait: sleeps that many seconds.
        attempts: how often the last call was tried.
    """

    timeout_s: float
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = time.sleep
    attempts: int = field(default=0, init=False)

    def call(self, what: str, server: str, attempt: Callable[[], Answer]) -> Answer:
        """Return what `attempt` returns, trying again while the server cannot be reached or asks to wait.

        Raises:
            Unavailable: the time is up; whether the server acted on the last try is unknown.
        """
        give_up = self.clock() + self.timeout_s
        pause_s = FIRST_WAIT_S
        self.attempts = 0
        while True:
            self.attempts += 1
            try:
                return attempt()
            except (httpx.TransportError, Unavailable) as exc:
                left_s = give_up - self.clock()
                if left_s <= 0:
                    raise self._given_up(what, server, exc) from exc
            self.wait(min(left_s, pause_s * random.uniform(0.5, 1.0)))  # so the last try comes when the time is up
            pause_s = min(2 * pause_s, LONGEST_WAIT_S)

    def _given_up(self, what: str, server: str, last: Exception) -> FarstepError:
        if isinstance(last, Unavailable):
            reason = last.detail
        elif isinstance(last, (httpx.ConnectError, httpx.ConnectTimeout)):
            reason = "nothing accepts connections there"
        else:
            reason = f"the last try ended with {type(last).__name__}"
        return Unavailable(
            f"{what}: {server} gave no answer within {self.timeout_s:g} s and {self.attempts} tries; {reason}.",
            remedy="Check that `farstep serve` runs there. A repeated write is never applied twice.",
            side="client",
        )
