"""A push that is sent while the backward pass still computes its gradients.

    begun       when the first gradient is final: the head names the gradients that follow, and their order
    sent        each gradient in its turn, as soon as it is final, by a thread of the push; the last bytes are held back
    compared    in `step()`: the head with the one that the step would send now, and what was sent with the gradients
    finished    if both are equal: the last bytes are sent, and the answer is awaited
    ended       otherwise: the connection is closed in the middle of the body, so the server changes nothing, the name
                of the push is free, and the step makes an ordinary push

A server accepts complete bodies only. So a failed backward pass, a step that never comes and a gradient that is clipped
change nothing, and cost only time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, final

import httpx
from torch import Tensor

from farstep.overlap.backward_order import STREAMED
from farstep.overlap.stage import Stage, Unit, plain
from farstep.tensors import Encoder
from farstep.transport import Answer, Batch, StreamedBody, this

HELD_BYTES: Final = 4096
"""The end of a payload, which is held back until the push is known to be right."""
BATCH_BYTES: Final = 512 * 1024
"""Small gradients are sent together up to this size."""

LEAST_BYTES: Final = 64 * 1024
"""Payloads below this size are not worth a thread."""

AGAIN: Final = "gradients were accumulated again after they had been sent"
CHANGED: Final = "gradients were changed after they had been sent"
OTHERS: Final = "the step was another one than its stream had said"
BROKEN: Final = "the stream broke off"
UNUSED: Final = "no step followed"

Send = Callable[[StreamedBody], Answer]
"""Send a payload behind the head of a push, and return when the head of an answer has arrived."""


class Ended(Exception):
    """The push was ended; its request is aborted in the middle of its body."""


@final
class Overlapped:
    """One push that is sent while its gradients are being computed, by a thread of its own.

    Args:
        header: its head.
        order: whose gradients follow, in this order.
        stage: memory for them, which is not used otherwise until the push is over.

    Attributes:
        header, order: as above.
        outcome: `STREAMED`, or why it was ended; "" until then.
        bytes_overlapped: payload bytes that had been sent at the comparison.
    """

    def __init__(self, header: Mapping[str, Any], order: Sequence[int], stage: Stage) -> None:
        self.header = header
        self.order = tuple(order)
        self.outcome = ""
        self.bytes_overlapped = 0
        self._stage = stage
        self._units = stage.units(order)
        self._nbytes = stage.nbytes(order)
        self._process = this.process
        self._moved = threading.Condition()
        self._ready: dict[int, Tensor] = {}
        self._final: Mapping[int, Tensor] | None = None
        self._begun = self._filled = self._sent_bytes = 0
        self._released = False
        self._over = False
        self._answer: Answer | BaseException | None = None

    # -- the thread that computes ------------------------------------------------------------------------------------

    def start(self, send: Send) -> None:
        """Begin to send."""
        name = f"farstep-push-{self.header['seq']}"
        self._thread = threading.Thread(target=self._run, args=(send,), name=name, daemon=True)
        self._thread.start()

    def ready(self, index: int, gradient: Tensor) -> None:
        """Report that a plain gradient is final. If it is changed nevertheless, the comparison finds it."""
        if self._process is not this.process:
            return
        with self._moved:
            self._ready[index] = gradient
            self._moved.notify_all()

    def end(self, why: str) -> None:
        """End the push. `outcome` keeps the first reason."""
        if self._process is not this.process:
            self.outcome = self.outcome or why
            return  # the thread and the connection belong to the parent of this fork
        with self._moved:
            self.outcome = why if self.outcome in ("", STREAMED) else self.outcome
            self._final = None
            if isinstance(self._answer, Answer):
                self._answer.close()
            self._moved.notify_all()

    @property
    def over(self) -> bool:
        """Return whether its thread has ended, so that the stage may be reused."""
        return self._process is this.process and self._over

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end."""
        if self._process is this.process:
            self._thread.join(timeout_s)

    def carries(self, header: Mapping[str, Any], gradients: Sequence[Tensor | None]) -> bool:
        """Return whether the push equals, in every bit, what a step sends now; end it if not.

        What has not been sent is taken from these gradients from now on.

        Args:
            header: the step's head.
            gradients: by parameter.
        """
        if self._process is not this.process or header != self.header:
            self.end(OTHERS)
        takes = self._stage.takes
        final = {i: plain(each) for i in self.order if (each := gradients[i]) is not None and takes(i, each)}
        if len(final) < len(self.order):
            self.end(CHANGED)
        with self._moved:
            if self._over:
                self.outcome = self.outcome or BROKEN
            if self.outcome:
                return False
            self._final, begun = final, self._begun
            self.bytes_overlapped = self._sent_bytes
            self._moved.notify_all()
        if not self._right(final, begun):
            self.end(CHANGED)
            return False
        self.outcome = STREAMED
        return True

    def _right(self, final: Mapping[int, Tensor], begun: int) -> bool:
        """Compare the units that were copied before the gradients were known to be final."""
        counts = {unit.index: unit.last for unit in self._units[: max(0, begun - 1)]}
        if not all(self._stage.holds(index, count, final[index]) for index, count in counts.items()):
            return False
        if not begun:
            return True
        with self._moved:
            self._moved.wait_for(lambda: self._filled >= begun or self._over)
        last = self._units[begun - 1]
        return self._stage.holds(last.index, last.last, final[last.index])

    def finish(self) -> Answer:
        """Send the rest and return when the head of an answer has arrived.

        Raises:
            httpx.TransportError: see `Conversation.data`.
        """
        try:
            with self._moved:
                self._released = True
                self._moved.notify_all()
                self._moved.wait_for(lambda: self._over)
                answer, self._answer = self._answer, None
            if not isinstance(answer, Answer):
                raise answer or httpx.WriteError(BROKEN)
            return answer
        except BaseException:
            self.outcome = BROKEN
            raise
        finally:
            for unit in self._units[self._filled :]:
                self._stage.fill_(unit, (self._final or {})[unit.index])
            self._final = None

    # -- the thread that sends ---------------------------------------------------------------------------------------

    @property
    def supply(self) -> StreamedBody:
        """The payload, made while it is sent."""
        return StreamedBody(self._batches, self._nbytes)

    def payload(self) -> list[memoryview]:
        """Return the whole payload, after `finish`, to be sent again."""
        return self._stage.payload(self.order)

    def _run(self, send: Send) -> None:
        answer: Answer | BaseException
        try:
            answer = send(self.supply)
        except BaseException as exc:
            answer = exc
        with self._moved:
            if isinstance(answer, Answer) and self.outcome not in ("", STREAMED):
                answer.close()
            self._answer, self._over = answer, True
            self._ready.clear()
            self._moved.notify_all()

    def _batches(self) -> Generator[Batch]:
        """Yield the payload as it becomes final, and its end once the push is known to be right."""
        batch: list[memoryview] = []
        size = sent = 0
        free = max(0, self._nbytes - HELD_BYTES)
        held: list[memoryview] = []
        yield batch  # the head
        for place, unit in enumerate(self._units):
            if batch and (size >= BATCH_BYTES or not self._there(unit)):
                yield batch
                sent += size
                self._sent_bytes = sent
                batch, size = [], 0
            self._fill_(place, unit)
            view = self._stage.memory(unit)
            room = free - sent - size
            if len(view) <= room:
                batch.append(view)
                size += len(view)
            else:
                if room > 0:
                    batch.append(view[:room])
                    size += room
                held.append(view[max(0, room) :])
        yield batch
        self._sent_bytes = sent + size
        with self._moved:
            self._moved.wait_for(lambda: self._released or self._is_ended)
            self._check()
        yield held

    @property
    def _is_ended(self) -> bool:
        return self.outcome not in ("", STREAMED)

    def _there(self, unit: Unit) -> bool:
        return self._final is not None or unit.index in self._ready

    def _fill_(self, place: int, unit: Unit) -> None:
        """Copy a unit when its gradient has arrived, unless it was copied before."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_ended or self._there(unit))
            self._check()
            if place < self._filled:
                return  # the connection was closed, and everything is sent again over another one
            gradient = (self._final or self._ready)[unit.index]
            self._begun = place + 1
        self._stage.fill_(unit, gradient)
        with self._moved:
            self._filled = place + 1
            self._moved.notify_all()

    def _check(self) -> None:
        if self._is_ended:
            raise Ended


@final
class Overlapping:
    """Begin the pushes of one worker during the backward pass: one at a time, over the same memory."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._current: Overlapped | None = None
        self._last: Overlapped | None = None

    def begin(
        self,
        header: Mapping[str, Any],
        order: Sequence[int],
        parameters: Sequence[Tensor],
        encoder: Encoder,
        send: Send,
    ) -> Overlapped | None:
        """Begin a push, unless the thread of the one before is still running.

        Args:
            header, order: see `Overlapped`.
            parameters: all of them.
            encoder: see `Stage`.
            send: sends it.
        """
        self.end(UNUSED)
        if self._last is not None and not self._last.over:
            return None
        if self._stage is None:
            self._stage = Stage(parameters, encoder)
        self._current = self._last = Overlapped(header, order, self._stage)
        self._current.start(send)
        return self._current

    def take(self) -> Overlapped | None:
        """Return the push that was begun, for its step."""
        taken, self._current = self._current, None
        return taken

    def end(self, why: str) -> None:
        """End the present push, if any."""
        if (taken := self.take()) is not None:
            taken.end(why)

    def forget_(self) -> None:
        """Use other memory from the next push on, as the parameters have changed."""
        self.end(OTHERS)
        self._stage = None

    def close(self, timeout_s: float) -> None:
        """End for good, after the connections are closed."""
        self.end(UNUSED)
        if self._last is not None:
            self._last.join(timeout_s)
