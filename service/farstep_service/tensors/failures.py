"""An instruction that failed before it changed anything, in words that a worker can act on."""

from __future__ import annotations

import logging

from farstep.errors import FarstepError, InternalError, InvalidOption
from farstep_service.memory import out_of_memory

log = logging.getLogger("farstep.session")


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
