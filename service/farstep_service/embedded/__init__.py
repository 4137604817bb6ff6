"""The session in the caller's own process: no server, no socket, no copy of the parameters."""

from farstep_service.embedded.embedded_link import EmbeddedLink, open_link

__all__ = ["EmbeddedLink", "open_link"]
