"""The single writer: orders writes, applies each exactly once, owns the version."""

from farstep_service.session.session import Session
from farstep_service.session.state_machine import Journal, Outcome, Outcomes, SessionRecord, cannot_run

__all__ = ["Journal", "Outcome", "Outcomes", "Session", "SessionRecord", "cannot_run"]
