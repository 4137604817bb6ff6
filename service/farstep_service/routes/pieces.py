"""Reading JSON documents in pieces, so that no single piece blocks the event loop.

    {"name": "s", "segments": [{...}, {...}, ... 100,000 of them], "groups": [{...}, ...]}
                               └ a piece ┘

`json.loads` holds the interpreter's lock from the first byte to the last: for a document of 32 MB nothing else runs for
a second, in any thread. Here the decoder is called once for each element of a large list, and once for each member of a
large object. Between two calls another thread may run, and the length of a piece is bounded.

The text is UTF-8, as RFC 8259 requires. A repeated key is refused: either value could be meant.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final, NoReturn, final

from farstep.errors import InvalidRequest

PIECE_CHARS: Final = 512 * 1024
"""The most characters of a value that is not read in pieces; decoding them takes a few milliseconds."""
CHUNK_BYTES: Final = 16 * 1024
"""Bytes that are decoded together."""

_REST_OF_NUMBER: Final = len("e+1")
"""Characters that must follow a value to show that it is not a number that continues."""
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_DECODER: Final = json.JSONDecoder()


@final
class JsonReader:
    """Read one document from its first character to its last.

    Each value is read by one of `value`, `elements` and `members`, in the document's order.

    Args:
        chunks: the document's bytes.

    Raises:
        InvalidRequest: it is not JSON, or one value is too long.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = _cut(chunks)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text = ""
        self._at = 0
        self._before = 0  # characters that were dropped
        self._over = False

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> object:
        """Read a whole value of limited length."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as exc:
                at = exc.pos - self._at
                if self._twice_as_much():
                    continue
                self._fail(exc.msg, self._at + at)
            except (ValueError, RecursionError) as exc:
                self._fail(f"{exc}"[:100] if isinstance(exc, ValueError) else "It is nested too deeply", self._at)
            if len(self._text) - end < _REST_OF_NUMBER and not self._over:
                self._more()
                continue
            self._at = end
            return found

    def elements(self) -> Iterator[None]:
        """Iterate over a list; each element must be read before the next iteration."""
        self._take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield
            if self._take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Iterate over an object's keys; each value must be read before the next iteration."""
        self._take("{")
        if self.peek() == "}":
            self._at += 1
            return
        seen: set[str] = set()
        while True:
            if self.peek() != '"':
                self._fail("Expecting a key in double quotes", self._at)
            key = str(self.value())
            if key in seen:
                raise InvalidRequest(f"{key[:80]!r} is there twice.", remedy="Give each key once.", field=key[:80])
            seen.add(key)
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Refuse anything that follows."""
        if self.peek():
            self._fail("Something follows", self._at)

    def _take(self, wanted: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            self._fail(f"Expecting {' or '.join(map(repr, wanted))}", self._at)
        self._at += 1
        return found

    def _twice_as_much(self) -> bool:
        """Double the decoded text, so that rescanning a long value costs no more than scanning it twice."""
        wanted = 2 * (len(self._text) - self._at)
        before = self._before + len(self._text)
        while len(self._text) - self._at < wanted and self._more():
            pass
        return self._before + len(self._text) > before

    def _more(self) -> bool:
        """Drop the characters read so far and decode more; return whether more followed."""
        if self._over:
            return False
        if len(self._text) - self._at > PIECE_CHARS:
            raise InvalidRequest(
                f"At character {self._before + self._at} of the document a value has more than {PIECE_CHARS} "
                "characters, or is no JSON.",
                limit=PIECE_CHARS,
            )
        chunk = next(self._chunks, b"")
        self._over = not chunk
        try:
            decoded = self._decode(chunk, final=self._over)
        except UnicodeDecodeError:
            self._fail("It is not UTF-8", len(self._text))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + decoded, 0
        return not self._over

    def _fail(self, what: str, at: int) -> NoReturn:
        raise InvalidRequest(f"The document is no JSON: {what}, at character {self._before + at}.") from None


def _cut(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for at in range(0, len(chunk), CHUNK_BYTES):
            yield chunk[at : at + CHUNK_BYTES]
