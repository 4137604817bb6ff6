"""What is refused of a push because of NaN or Inf, and what workers are told of a write that could not begin."""

from __future__ import annotations

import logging
import math
import time

import torch

from farstep.errors import FarstepError, InternalError, InvalidOption, NonFinite
from farstep.protocol.codecs import FULL
from farstep.protocol.messages import Evaluation
from farstep_service.machine import out_of_memory
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.finite import all_finite

log = logging.getLogger("farstep.session")


def first_nonfinite(contribution: Contribution) -> int | None:
    """Return the first segment whose gradient holds NaN or Inf, None if all are finite.

    What was looked at while it arrived or was copied, and found to be finite, is not looked at again.
    """
    buffers = contribution.buffers
    if buffers is None or contribution.known_finite:
        return None
    if contribution.is_whole and len(buffers.flat) == 1:
        (whole,) = buffers.flat.values()
        if whole.nbytes == contribution.on_wire.nbytes and all_finite(whole):
            return None
    dense = contribution.dense
    for first, last in contribution.on_wire.spans(dense):
        span = buffers.span(first, last)
        if span is None or all_finite(span):
            continue
        for index in range(first, last):
            own = buffers.span(index, index + 1)
            if own is not None and not all_finite(own):
                return index
    for index, (_, values) in contribution.sparse.items():
        if not all_finite(torch.view_as_real(values) if values.is_complex() else values):
            return index
    return None


def check_finite(contribution: Contribution, worker: str, evaluation: Evaluation | None = None) -> None:
    """Refuse a loss or a gradient that is, or holds, NaN or Inf.

    Raises:
        NonFinite: naming the first one, and the worker that sent it.
    """
    if evaluation is not None and not math.isfinite(evaluation.loss):
        raise NonFinite(
            f"The loss from worker {worker!r} is {evaluation.loss}; the push was refused.",
            remedy="Lower the learning rate; nonfinite='allow' would take such a loss.",
            field="loss",
        )
    name, what = nonfinite_in(contribution, worker)
    if what:
        raise NonFinite(
            f"{what}; the push was refused.",
            remedy="Skip the step or lower the loss scale; nonfinite='allow' would take such gradients.",
            field=name,
        )


def nonfinite_in(contribution: Contribution, worker: str) -> tuple[str, str]:
    """Return the first parameter whose gradient holds NaN or Inf, and the same as a sentence without its stop.

    Both are "" if all gradients are finite. Notes in the contribution how long it took.
    """
    began = time.perf_counter()
    index = first_nonfinite(contribution)
    contribution.check_s += time.perf_counter() - began
    if index is None:
        return "", ""
    name = contribution.layout.segments[index].name
    came = "" if contribution.codec is FULL else f", as it came in {contribution.codec.name}"
    return name, f"The gradient of {name!r} from worker {worker!r} holds NaN or Inf{came}"


def told(exc: Exception, what: str) -> FarstepError:
    """Return what the workers of a write that failed before it changed anything are told.

    Args:
        what: the write, as the beginning of a sentence.
    """
    if isinstance(exc, FarstepError):
        return exc
    if isinstance(exc, ArithmeticError):
        return InvalidOption(f"There is no step with these options: {exc}.", remedy="Correct the group options.")
    log.error("%s could not begin", what.lower(), exc_info=exc)
    if short := out_of_memory(exc, f"{what} was not begun: it"):
        return short
    return InternalError(
        f"{what} could not begin ({type(exc).__name__}); nothing has changed.",
        remedy="Report it with the server's log.",
    )
