"""How long and how often to try again: exponential backoff with jitter, up to a stated time.

A server that says when it wants to be tried again (`Retry-After`) is not tried before, but once when the time is up. A
server that is not there, or that recovers, is tried more often: a step that waits for it should not wait much longer.
What trying again cannot mend is raised at once; `farstep.conversation` tells the two apart.

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

from farstep.conversation.replies import why
from farstep.errors import FarstepError, Recovering, Unavailable

Answer = TypeVar("Answer")

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 2.0
LONGEST_ABSENT_S = 0.25
"""The longest pause where nothing accepts connections."""
LONGEST_RECOVERY_S = 1.0
"""The longest pause for a server that recovers a session; never longer than it says that this will take."""
RECOVERY_TRIES = 8
"""Until then, a pause is this part of the time that the recovery has taken so far."""
JITTER = (0.5, 1.0)
SPREAD = (1.0, 1.1)
"""The same for a pause that the server asked for: it is not cut short, and not all come back at once."""


@dataclass(slots=True)
class RetryPolicy:
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
        recovers_since: float | None = None
        self.attempts = 0
        while True:
            self.attempts += 1
            try:
                return attempt()
            except (httpx.TransportError, Unavailable) as exc:
                left_s = give_up - self.clock()
                if left_s <= 0:
                    raise self._given_up(what, server, exc) from exc
                asked_s = (exc.retry_after_s if isinstance(exc, Unavailable) else None) or 0.0
                if isinstance(exc, Recovering):  # what it says is an estimate, and it may be ready much earlier
                    recovers_since = self.clock() if recovers_since is None else recovers_since
                    pause_s = max(FIRST_WAIT_S, (self.clock() - recovers_since) / RECOVERY_TRIES)
                    asked_s, pause_s = 0.0, min(pause_s, asked_s or pause_s, LONGEST_RECOVERY_S)
                elif isinstance(exc, httpx.ConnectError):
                    pause_s = min(pause_s, LONGEST_ABSENT_S)
            pause = max(asked_s, pause_s) * random.uniform(*(SPREAD if asked_s > pause_s else JITTER))
            self.wait(min(left_s, pause))  # so the last try comes when the time is up
            pause_s = min(2 * pause_s, LONGEST_WAIT_S)

    def _given_up(self, what: str, server: str, last: Exception) -> FarstepError:
        tried = f"within {self.timeout_s:g} s and {self.attempts} tries"
        if isinstance(last, Unavailable) and last.side == "server":
            return type(last)(
                f"{what}: {server} was not ready {tried}; it says: {last.detail.rstrip('.')}.",
                remedy=last.remedy or "Try again later. A repeated write is never applied twice.",
                field=last.field,
                limit=last.limit,
                side="client",
            )
        reason, remedy = why(last)
        return Unavailable(
            f"{what}: {server} gave no answer {tried}; {reason}.",
            remedy=f"{remedy} A repeated write is never applied twice.",
            side="client",
        )
