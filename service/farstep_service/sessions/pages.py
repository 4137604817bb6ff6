"""What a listing says of one session: pages of its workers and its groups, and a summary; asked for within a turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any, final

from farstep.errors import StepInterrupted
from farstep_service.session import Session
from farstep_service.sessions.answers import Summary, WorkerPage
from farstep_service.sessions.reads import Reads


@final
class Pages:
    """Describe one session.

    Args:
        session: the session.
        clock: its clock, in seconds.
    """

    def __init__(self, session: Session, clock: Callable[[], float]) -> None:
        self._session = session
        self._clock = clock

    def worker(self, worker: str) -> WorkerPage:
        """Return where a worker stands."""
        return WorkerPage(*self._session.position(worker), lease_s=self._session.lease_s(worker, self._clock()))

    def workers(self, after: str, most: int) -> dict[str, WorkerPage]:
        """Return where the first `most` workers stand whose names come after one."""
        with suppress(StepInterrupted):  # a session whose step cannot be finished is still there to be seen
            return {name: self.worker(name) for name in self._session.workers_after(after, most)}
        return {}

    def options(self, first: int, most: int) -> list[dict[str, Any]]:
        """Return the options of `most` param groups from one on."""
        return [group.to_options() for group in islice(self._session.groups, first, first + most)]

    def summary(self, most: int, reads: Reads) -> Summary:
        """Return what the session is now, with the first `most` of its groups and workers."""
        session = self._session
        groups, workers = self.options(0, most), self.workers("", most)
        nbytes = session.nbytes()
        nbytes["versions"] += reads.nbytes
        return Summary(
            version=session.version,
            initialised=session.initialised,
            groups=groups,
            group_count=len(session.groups),
            workers=workers,
            worker_count=session.worker_count,
            bytes=nbytes,
            readers=reads.page,
        )
