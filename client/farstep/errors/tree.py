"""Every error farstep raises, on both sides of the wire.

    FarstepError
    ├── InvalidRequest            400  a body, header or document that is not what the protocol says
    │   ├── Truncated             400  it ended early
    │   ├── LimitExceeded         413  it is larger than a stated limit
    │   ├── UnsupportedMedia      415  another content type or encoding
    │   ├── NoSuchRoute           404  the path does not exist
    │   │   └── NoSuchMethod      405  the path does not have this method
    │   └── InvalidAnswer         400  an answer is not what the protocol says, or not a farstep server's
    │       └── ResponseTooLarge  400  the answer is larger than a client takes
    ├── ProtocolMismatch          426  the other side speaks another protocol version
    ├── Unauthorized              401  no token, or a wrong one
    ├── HostNotAllowed            421  the server does not answer to the name that it was asked by
    ├── OriginNotAllowed          403  a web page of another origin
    ├── InvalidOption             422  an option is unknown, or its value out of range (also a ValueError)
    ├── TensorMismatch            422  a tensor that does not fit the session or its optimizer (also a RuntimeError)
    ├── InvalidFile               422  a session file that is damaged, foreign, or of a newer release
    ├── NonFinite                 422  a gradient holds NaN or Inf
    ├── Conflict                  409
    │   ├── OptionsDiffer         409  a session of that name has other options or parameters
    │   ├── SessionExists         409  a session of that name is there, and would have to be another one
    │   ├── NotInitialised        409  the session's first parameters have not arrived
    │   ├── SequenceGap           409  a push before this one is missing
    │   ├── ReceiptExpired        409  a push is repeated whose receipt is not kept any more; it was not applied again
    │   ├── Fenced                409  the worker's name was taken, or the session has grown
    │   ├── SessionFull           409  every place of a sync session is taken
    │   ├── BarrierTimeout        409  a push waited for others until its deadline; it was not applied
    │   ├── StepDiscarded         409  the step that an evaluation belongs to was given up meanwhile
    │   └── StateRolledBack       409  the session went back to an older version, without steps that were acknowledged
    ├── IdempotencyMismatch       422  the same push name with another content
    ├── UnknownSession            404  no session of that name
    ├── SessionLost               410  the session this worker joined is gone, with its optimizer state
    ├── Unavailable               503  the other side cannot answer now; the outcome of the call is unknown
    │   ├── Busy                  503  a budget is used up for the moment
    │   ├── OutOfMemory           503  the machine gave the server no memory for the request
    │   ├── StepInterrupted       503  a kernel failed midway; the step is finished before anything else happens
    │   ├── Recovering            503  the server is reading the session from its disk; it says how long that may take
    │   └── NotDurable            507  the server's disk is full or fails; nothing was applied
    ├── CannotConnect             503  the address does not lead to a server, however often it is tried
    ├── DamagedJournal            503  what the server's disk has of the session is damaged
    └── InternalError             500  a defect of ours

There is one class for each thing a caller would do differently. `code` is stable and documented in `docs/errors.md`;
`status` is the HTTP status the error suggests. On the wire an error is RFC 9457 `application/problem+json`
(`to_problem`, and `from_problem` in `problem.py`). A message says what happened, on which side, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

Side = Literal["client", "server"]
Scalar = str | int | float | bool | None
URN = "urn:farstep:error:"


class FarstepError(Exception):
    """Base class of every error that farstep raises.

    Attributes:
        detail: what happened, in one sentence.
        side: the side that found it, `client` or `server`.
        field: the field, option or tensor at fault, if there is one.
        limit: the bound that was exceeded, if there is one.
        remedy: what to do.
        extra: further facts under stable names (for `sequence_gap`: `expected`).
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        detail: str,
        *,
        remedy: str = "",
        field: str | None = None,
        limit: int | float | str | None = None,
        side: Side = "server",
        **extra: Scalar | list[str],
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy
        self.field = field
        self.limit = limit
        self.side: Side = side
        self.extra = extra

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"[{self.code}, found by the {self.side}] {self.detail}{remedy}"

    def to_problem(self) -> dict[str, object]:
        """Return the error as an RFC 9457 problem document."""
        problem: dict[str, object] = {
            "type": URN + self.code,
            "title": (type(self).__doc__ or "").strip().split("\n", 1)[0],
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "side": self.side,
        }
        for name in ("field", "limit", "remedy"):
            if (value := getattr(self, name)) not in (None, ""):
                problem[name] = value
        return {**problem, **self.extra}


class InvalidRequest(FarstepError):
    """The request is not what the protocol says."""

    code = "invalid_request"
    status = 400


class Truncated(InvalidRequest):
    """The message ended before it was complete."""

    code = "truncated"


class LimitExceeded(InvalidRequest):
    """The message is larger than a stated limit."""

    code = "limit_exceeded"
    status = 413


class UnsupportedMedia(InvalidRequest):
    """The content type or encoding is not the protocol's."""

    code = "unsupported_media"
    status = 415


class NoSuchRoute(InvalidRequest):
    """The path, or the method on it, does not exist."""

    code = "no_such_route"
    status = 404


class NoSuchMethod(NoSuchRoute):
    """The path exists, but not with this method."""

    code = "no_such_method"
    status = 405


class InvalidAnswer(InvalidRequest):
    """The server's answer is not what the protocol says, or what answers is no farstep server."""

    code = "invalid_answer"


class ResponseTooLarge(InvalidAnswer):
    """The server's answer is larger than a client takes."""

    code = "response_too_large"


class ProtocolMismatch(FarstepError):
    """The other side speaks another version of the protocol."""

    code = "protocol_mismatch"
    status = 426


class Unauthorized(FarstepError):
    """The token is missing or wrong."""

    code = "unauthorized"
    status = 401


class HostNotAllowed(FarstepError):
    """The server does not answer to the name that it was asked by."""

    code = "host_not_allowed"
    status = 421


class OriginNotAllowed(FarstepError):
    """A web page that has no business with the server asked it."""

    code = "origin_not_allowed"
    status = 403


class InvalidOption(FarstepError, ValueError):
    """An option is unknown or its value is out of range."""

    code = "invalid_option"
    status = 422


class TensorMismatch(FarstepError, RuntimeError):
    """A tensor does not fit the session's layout, or its optimizer does not take it."""

    code = "tensor_mismatch"
    status = 422


class InvalidFile(FarstepError):
    """The session file is damaged, foreign, or of a newer release."""

    code = "invalid_file"
    status = 422


class NonFinite(FarstepError):
    """A gradient holds NaN or Inf."""

    code = "non_finite_gradient"
    status = 422


class Conflict(FarstepError):
    """The session is not in a state that allows the request."""

    code = "conflict"
    status = 409


class OptionsDiffer(Conflict):
    """A session of that name exists with other options or parameters."""

    code = "options_differ"


class SessionExists(Conflict):
    """A session of that name is there already."""

    code = "session_exists"


class NotInitialised(Conflict):
    """The session's first parameters have not arrived."""

    code = "not_initialised"


class SequenceGap(Conflict):
    """A push before this one is missing."""

    code = "sequence_gap"


class ReceiptExpired(Conflict):
    """This write was committed so long ago that its receipt is no longer kept; it was not applied again."""

    code = "receipt_expired"


class Fenced(Conflict):
    """This worker was shut out: its name was taken, or the session has grown."""

    code = "fenced"


class SessionFull(Conflict):
    """Every place of a sync session is taken."""

    code = "session_full"


class BarrierTimeout(Conflict):
    """A push waited for those of others until its deadline; it was not applied."""

    code = "barrier_timeout"


class StepDiscarded(Conflict):
    """The step that an evaluation of the closure belongs to was given up meanwhile; begin another one."""

    code = "step_discarded"


class StateRolledBack(Conflict):
    """The session went back to an older version; steps that had been acknowledged are lost."""

    code = "rolled_back"


class IdempotencyMismatch(FarstepError):
    """The same push name came with another content."""

    code = "idempotency_mismatch"
    status = 422


class UnknownSession(FarstepError):
    """No session has that name."""

    code = "unknown_session"
    status = 404


class SessionLost(FarstepError):
    """The session this worker joined is gone, with its optimizer state."""

    code = "session_lost"
    status = 410


class Unavailable(FarstepError):
    """The server cannot answer now; the outcome of the call is unknown.

    Attributes:
        retry_after_s: seconds after which the server asks to be tried again, None if it does not say.
    """

    code = "unavailable"
    status = 503
    retry_after_s: float | None = None


class Busy(Unavailable):
    """A budget of the server is used up at the moment."""

    code = "busy"


class OutOfMemory(Unavailable):
    """The machine gave the server no memory for the request."""

    code = "out_of_memory"


class StepInterrupted(Unavailable):
    """A kernel failed midway; the step is finished before anything else happens."""

    code = "step_interrupted"


class Recovering(Unavailable):
    """The server is reading the session from its disk, and does not answer for it before that is done."""

    code = "recovering"


class NotDurable(Unavailable):
    """The server's disk is full or fails, so that it cannot keep the write; nothing was applied."""

    code = "not_durable"
    status = 507


class DamagedJournal(FarstepError):
    """What the server's disk has of the session is damaged; the server's other sessions are not concerned."""

    code = "damaged_journal"
    status = 503


class CannotConnect(FarstepError):
    """The address leads to no server, and retrying does not help."""

    code = "cannot_connect"
    status = 503


class InternalError(FarstepError):
    """The server met a defect of its own."""

    code = "internal_error"


def invalid_option(
    detail: str, field: str | None = None, remedy: str = "", limit: float | str | None = None
) -> InvalidOption:
    """Return the error of an option given in this process, found by a client.

    Code that reads the options of others sets `found_by`.
    """
    return InvalidOption(detail, field=field, remedy=remedy, limit=limit, side="client")


@contextmanager
def found_by(side: Side) -> Iterator[None]:
    """Set the side on which a record that checks itself was read, in the errors that it raises."""
    try:
        yield
    except FarstepError as exc:
        exc.side = side
        raise
