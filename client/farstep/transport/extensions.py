"""The keys under which a request tells the transport something, and the transport the caller.

They live in `httpx.Request.extensions` and `httpx.Response.extensions`, where other transports ignore them.
"""

from __future__ import annotations

from typing import Final

NAMED: Final = "farstep_named"
"""Request: true when the server recognises a repetition, so that sending it twice changes nothing more than once."""

DEADLINE_S: Final = "farstep_deadline_s"
"""Request: seconds from the call until the last byte of the answer's body, whatever each single read or write took."""

BODY: Final = "farstep_body"
"""Response: the answer's body as something with `readinto`; read it through `farstep.transport.body_of`."""
