"""Who may speak: bearer tokens, decided before the first body byte is read.

One check stands outermost, around every route. What is public is an exact list; everything else needs a token where the
server has any. Tokens are kept as SHA-256 digests and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from farstep.errors import Unauthorized

PUBLIC = frozenset({("GET", "/healthz"), ("HEAD", "/healthz")})
"""Method and path of what anyone may ask, compared exactly."""


class Tokens:
    """The accepted tokens, as digests."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = tuple(_digest(token.encode()) for token in tokens)

    @property
    def required(self) -> bool:
        """Say whether a token has to be shown at all."""
        return bool(self._digests)

    def check(self, method: str, path: str, authorization: Iterable[bytes]) -> None:
        """Let a request through, or refuse it.

        Args:
            path: the raw path of the request line, as it was received.
            authorization: the values of its `Authorization` headers.

        Raises:
            Unauthorized: no token, more than one header, or a wrong token.
        """
        if not self.required or (method, path) in PUBLIC:
            return
        values = list(authorization)
        scheme, _, credential = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = _digest(credential.strip())
        known = False
        for each in self._digests:  # every digest is compared, so that the time tells nothing
            known |= hmac.compare_digest(digest, each)
        if scheme.lower() != b"bearer" or not known:
            raise Unauthorized(
                "The request shows no valid token.",
                remedy="Send `Authorization: Bearer ...`: give token=..., or set FARSTEP_TOKEN.",
            )


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
