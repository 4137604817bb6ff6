"""Bytes at rest: a session as a file."""

from farstep_service.durability.session_file import file_of, places_of
from farstep_service.durability.snapshot import Snapshot

__all__ = ["Snapshot", "file_of", "places_of"]
