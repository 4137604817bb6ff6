"""The single writer: orders writes, applies each exactly once, owns the version."""

from farstep_service.session.outcomes import Outcome, Outcomes
from farstep_service.session.session import Session

__all__ = ["Outcome", "Outcomes", "Session"]
