"""The single writer: orders writes, applies each exactly once, owns the version."""

from farstep_service.session.session import Outcome, Outcomes, Session
from farstep_service.session.state import SessionState
from farstep_service.session.states import state_of

__all__ = ["Outcome", "Outcomes", "Session", "SessionState", "state_of"]
