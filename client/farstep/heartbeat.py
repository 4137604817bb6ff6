"""Heartbeats: requests that renew the lease of a worker that has nothing to push.

    push, pull, join     renew it, and need nothing of this
    heartbeat()          one small request without tensors
    keep_alive()         one of them at once and every third of a lease, from a thread, while something else is done

A heartbeat also means that other workers are to wait for this one.
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
"""The time limit of a thread's heartbeat, and so of ending the thread."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A session's answer to a heartbeat.

    Attributes:
        worker, epoch: the worker whose lease was renewed, and its epoch.
        lapsed: whether the lease had run out, so that others did not wait for this worker, and its gradient may be
            late.
        lease_s: seconds from the answer until the lease runs out; infinite in an embedded session.
        live: the number of live workers, including this one.
        version: the session's version, which may be ahead of the worker's.
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
        """Return the heartbeat that a server answered.

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
    """Renew a lease from a thread until the end of the block, or until the optimizer is closed.

    A refusal also reaches the worker's next step. The worker may join again after that, so the thread continues.

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
        except FarstepError:  # refused; also if it overtook a join
            pause_s = max(pause_s, 1.0)
        except RuntimeError:  # the optimizer was closed meanwhile
            return
