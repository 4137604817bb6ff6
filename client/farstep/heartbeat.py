"""The lease of a worker that has nothing to push, renewed by requests of its own.

    push, pull, join     renew it, and need nothing of this
    heartbeat()          one small request without tensors
    keep_alive()         one of them at once and every third of a lease, from a thread, while something else is done

A heartbeat says more than that the worker lives: it says that others are to wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, final

from farstep.conversation.replies import ReplyReader
from farstep.errors import FarstepError, InvalidAnswer, InvalidOption, Unavailable
from farstep.protocol.consistency import Consistency, from_options

BEATS: Final = 3
"""Heartbeats in a lease, so that one or two may be lost."""
LONGEST_PAUSE_S: Final = 3600.0
SHORTEST_PAUSE_S: Final = 0.005
WITHIN_S: Final = 10.0
"""How long one of a thread's may take, and the end of it with it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a session answers a heartbeat.

    Attributes:
        worker, epoch: whose lease was renewed.
        lapsed: whether it had run out, so that nobody waited for this worker, and its gradient may be late.
        lease_s: seconds from the answer until it runs out; infinite in this process.
        live: how many workers are live, this one included.
        version: the session's, which may be ahead of what the worker holds.
        consistency: the session's mode.
    """

    worker: str
    epoch: int
    lapsed: bool
    lease_s: float
    live: int
    version: int
    consistency: Consistency

    @classmethod
    def of(cls, document: object) -> Heartbeat:
        """Return what a server answered.

        Raises:
            InvalidAnswer: it is not the answer to a heartbeat.
        """
        reply = ReplyReader(document, "The answer to the heartbeat")
        try:
            mode = from_options(reply.mapping("consistency"))
        except InvalidOption as exc:
            raise InvalidAnswer(
                f"The answer to the heartbeat names a mode that is not known here: {exc.detail}",
                field="consistency",
                side="client",
            ) from exc
        return cls(
            worker=reply.text("worker"),
            epoch=reply.integer("epoch", least=1),
            lapsed=reply.flag("lapsed"),
            lease_s=reply.number("lease_s"),
            live=reply.integer("live"),
            version=reply.integer("version"),
            consistency=mode,
        )


@contextmanager
def beating(beat: Callable[[], Heartbeat]) -> Iterator[None]:
    """Renew a lease from a thread, until the end of the block or the optimizer's.

    What the session refuses the worker's next step is told, too. After that it may join again, so the thread goes on.

    Args:
        beat: tries once.
    """
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(beat, stopped), name="farstep-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _beat(beat: Callable[[], Heartbeat], stopped: threading.Event) -> None:
    pause_s = 0.0
    while not stopped.wait(pause_s):
        try:
            pause_s = min(max(beat().lease_s / BEATS, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
        except Unavailable:
            pause_s = max(pause_s / 2, 1.0)
        except FarstepError:  # refused, as it is, too, if it overtook a join
            pause_s = max(pause_s, 1.0)
        except RuntimeError:  # the optimizer was closed meanwhile
            return
