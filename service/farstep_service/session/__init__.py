"""The single writer: orders writes, applies each exactly once, owns the version."""

from farstep_service.session.outcomes import Outcome, Outcomes
from farstep_service.session.session import Session
from farstep_service.session.state import SessionState
from farstep_service.session.states import state_of
from farstep_service.session.steps import Left, Steps

__all__ = ["Left", "Outcome", "Outcomes", "Session", "SessionState", "Steps", "state_of"]
