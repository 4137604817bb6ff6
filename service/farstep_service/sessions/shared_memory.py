"""The memory that workers share with one session: each worker's latest, for as long as its epoch lasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from farstep.errors import InvalidRequest
from farstep.messages import PushHead
from farstep_service.gradients import Contribution
from farstep_service.plan import Plan
from farstep_service.sessions.shared import Offer, Shared
from farstep_service.store import Buffers


@final
class Areas:
    """Keep what workers share, by worker."""

    def __init__(self) -> None:
        self._shared: dict[str, Shared] = {}

    @property
    def nbytes(self) -> int:
        """Return the size of all of it."""
        return sum(each.nbytes for each in self._shared.values())

    def share(self, worker: str, offer: Offer, plan: Plan) -> None:
        """Map memory of a worker, in the place of what it shared before.

        Raises:
            InvalidOption: it is not memory that can be shared. What it shared before is let go of even so.
        """
        self._shared.pop(worker, None)
        self._shared[worker] = Shared(offer, plan)

    def keep_only(self, epoch: Callable[[str], int]) -> None:
        """Let go of the memory of epochs that are over.

        Args:
            epoch: returns the current one of a worker.
        """
        self._shared = {worker: each for worker, each in self._shared.items() if epoch(worker) == each.epoch}

    def clear(self) -> None:
        """Let go of all of it."""
        self._shared.clear()

    def delivering(self, head: PushHead) -> Shared | None:
        """Return the memory in which a push wants its answer, None if it wants it in a body."""
        shared = self._shared.get(head.name.worker)
        wanted = head.fill is not None and head.fill.deliver and shared is not None and shared.key == head.fill.area
        return shared if wanted else None

    def copy_of(self, head: PushHead, contribution: Contribution) -> Buffers | None:
        """Return where the step of a push may write its answer: over its gradients, or into shared memory."""
        if head.wanted == "none":
            return None
        if head.wire_parameters is not None:
            return contribution.narrow() if head.wire_parameters == head.wire_gradients else None
        shared = self.delivering(head)
        return shared.parameters if shared is not None and shared.layout is contribution.layout else None

    def gradients_in(self, head: PushHead, contribution: Contribution) -> Shared | None:
        """Return the shared memory that a push's gradients are in, None if they come in its body.

        Raises:
            InvalidRequest: the worker shares no such memory.
        """
        if head.fill is None:
            return None
        shared = self._shared.get(head.name.worker)
        if shared is None or shared.key != head.fill.area or shared.layout is not contribution.layout:
            raise InvalidRequest(
                f"Worker {head.name.worker!r} shares no such memory.", remedy="Send the gradients.", field="area"
            )
        return shared
