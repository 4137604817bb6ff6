"""Bytes at rest: a session as a file."""

from farstep_service.durability.session_file import file_of, places_of

__all__ = ["file_of", "places_of"]
