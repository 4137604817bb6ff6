"""Hooks that report each gradient as it is computed, so that a push can begin during the backward pass.

`farstep.overlap` decides which of them are final, and sends them. Errors here never reach the backward pass: they end
the stream, and the step sends its gradients as usual.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from farstep.overlap import (
    AGAIN,
    BROKEN,
    CHANGED,
    OTHERS,
    PAUSE_STEPS,
    UNUSED,
    WRONG_IN_A_ROW,
    BackwardOrder,
    Overlapped,
    plain,
)
from farstep.protocol.receipt import StepReport

Begin = Callable[[Sequence[int]], Overlapped | None]
"""Begin the push of these gradients, in this order, if possible."""

REMEDIES: Final = {
    AGAIN: "Put all backward passes of a step but the last one into `with optimizer.no_sync():`.",
    CHANGED: "Gradients that are clipped, unscaled or averaged after the backward pass are sent in step().",
    OTHERS: "Change options and parameters before the backward pass or after step(), and use the same parameters.",
    BROKEN: "A server waits 30 s for the next gradient; a slower backward pass goes without it.",
    UNUSED: "It is for loops in which each backward pass is followed by its step.",
}
"""The remedy for each way in which a stream ends."""

CALLER: Final = 8
"""Frames from here to the caller of step(), with those of torch between."""

_LOG = logging.getLogger("farstep.overlap")


@final
class Overlap:
    """Watch the parameters of one optimizer, and pass their gradients on as they become final.

    Args:
        parameters: in the session's order.
        begin: begins a push.
    """

    def __init__(self, parameters: Sequence[Tensor], begin: Begin) -> None:
        self._begin = begin
        self._backward_order = BackwardOrder()
        self._current: Overlapped | None = None
        self._tried = self._held = self._told = False
        self._turn = threading.Lock()  # several devices have a thread each in a backward pass
        self._handles: dict[int, RemovableHandle] = {}
        self.watch(parameters)

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Watch these parameters and no others."""
        self.close()
        self._parameters = list(parameters)
        self._watch_more()

    def _watch_more(self) -> None:
        """Watch those that have come to require a gradient."""
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad and index not in self._handles:
                hook = partial(_fired, weakref.ref(self), index)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles[index] = handle

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Treat no gradient of the backward passes inside as final."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def fired(self, index: int, parameter: Tensor) -> None:
        """Record that a parameter's gradient was accumulated."""
        with self._turn:
            if self._held:
                return
            report = self._backward_order.reported(index)
            if report == "late" and self._current is not None:
                self._current.end(AGAIN)
            gradient = parameter.grad
            if report != "last" or gradient is None or gradient.layout is not torch.strided:
                return
            if not self._tried:
                self._tried = True
                self._current = self._begin(self._backward_order.order)
            if self._current is not None:
                self._current.ready(index, plain(gradient))

    def stepped(self, gradients: Sequence[Tensor | None], report: StepReport) -> None:
        """Learn from a step."""
        dense = all(each is None or each.layout is torch.strided for each in gradients)
        present = {index for index, each in enumerate(gradients) if each is not None} if dense else set()
        with self._turn:
            self._current, self._tried = None, False
            wrong = self._backward_order.stepped(present, report.overlap)
        if len(self._handles) < len(self._parameters):
            self._watch_more()
        if wrong and not self._told:
            self._told = True
            warnings.warn(
                f"overlap=True does not help here: {WRONG_IN_A_ROW} times in a row a push had to be sent again, "
                f"because {report.overlap}. It is not tried in the next {PAUSE_STEPS} steps. "
                + REMEDIES[report.overlap],
                stacklevel=CALLER,
            )


def _fired(watching: weakref.ref[Overlap], index: int, parameter: Tensor) -> None:
    overlap = watching()
    if overlap is None:
        return
    try:
        overlap.fired(index, parameter)
    except Exception:
        _LOG.warning("Gradients cannot be sent during the backward pass.", exc_info=True)
