"""The link over HTTP: a session on a server, joined, pushed to and pulled from by one worker."""

from farstep.http_link.link import HttpLink

__all__ = ["HttpLink"]
