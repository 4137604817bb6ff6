"""The header map of a message as it is received: each key is taken once and checked, and none may be left over.

Each map says which protocol version it is of (`farstep/wire/PROTOCOL.md`). What the keys mean is in `farstep.messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farstep.errors import InvalidRequest, ProtocolMismatch

VERSION = 1


class Header:
    """Take values out of a received header map, one checked key after the other."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        if type(version := values.get("v")) is not int or version != VERSION:  # 1.0 and true are equal to 1
            raise ProtocolMismatch(
                f"The message is of protocol version {version!r:.80}; this side speaks {VERSION}.",
                remedy="Bring client and server to releases that share a protocol version.",
                field="v",
                limit=VERSION,
            )
        self._values = dict(values)
        del self._values["v"]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def is_empty(self) -> bool:
        """Return whether all has been taken."""
        return not self._values

    def integer(self, key: str, *, least: int = 0, most: int = 2**63 - 1, default: int | None = None) -> int:
        value = self._values.pop(key, default)
        if type(value) is not int or not least <= value <= most:
            raise InvalidRequest(
                f"Header key {key!r} is {value!r:.80}; it must be an int of at least {least}.", field=key
            )
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._values.pop(key, default)
        if type(value) is not str or not 0 < len(value) <= 128 or not value.isprintable():
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a printable name.", field=key)
        return value

    def flag(self, key: str) -> bool:
        value = self._values.pop(key, False)
        if type(value) is not bool:
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a bool.", field=key)
        return value

    def number(self, key: str) -> float | None:
        value = self._values.pop(key, None)
        if value is not None and type(value) not in (int, float):
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a number.", field=key)
        return None if value is None else float(value)

    def listing(self, key: str) -> list[Any] | None:
        value = self._values.pop(key, None)
        if value is not None and type(value) is not list:
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a list.", field=key)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._values.pop(key, None)
        if value is None:
            return {}
        if type(value) is not dict:
            raise InvalidRequest(f"Header key {key!r} is {value!r:.80}; it must be a map.", field=key)
        return value

    def nothing_left(self) -> None:
        """Refuse keys nobody knows: an option that is not understood is never ignored."""
        if self._values:
            key = sorted(map(str, self._values))[0]
            raise InvalidRequest(f"Unknown header key {key!r:.80}.", field=key[:80])
