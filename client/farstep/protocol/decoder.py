"""Read one message from bytes that arrive in any pieces, without any I/O.

    header not complete  --bytes-->  `buffers_for(header)`  -->  prefix  --bytes-->  content  -->  prefix ... done

The reader of the socket has two ways to pass bytes, and may change between them at any time:

- `get_buffer()` and `buffer_updated(n)`: receive into the memory that is offered (`socket.recv_into`, `readinto`,
  `asyncio.BufferedProtocol`). Content lands at its final place without a copy; the head of the message, the prefixes
  and runs of small tensors go through a scratch buffer, so that a small message is one read.
- `feed(chunk)`: the bytes have been received already, and their content is copied to its place.

`buffers_for` decides where the payload goes: called once with the header, it returns memory whose total length is the
payload's. Only the scratch buffer and the header are allocated here. After an error a decoder cannot be used: it raises
the same error again, and the contents of the memory are unspecified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from farstep.errors import InvalidRequest, LimitExceeded, Side, Truncated
from farstep.protocol.frames import BIN32, PREFIX, PREFIX_BYTES, flat
from farstep.protocol.header import HeaderReader
from farstep.protocol.limits import DEFAULT_LIMITS, Limits

SCRATCH_BYTES = 64 << 10
_DIRECT_BYTES = 16 << 10
"""A read smaller than this costs more than copying the bytes, so neighbouring small tensors share one."""

BuffersFor = Callable[[dict[str, Any]], Sequence[memoryview]]


@final
class Decoder:
    """One message being read.

    Args:
        buffers_for: given the header (valid msgpack within the limits, nothing more), returns the writable memory for
            the payload, in order. What it raises about the header reaches the caller.
        limits: the bounds to hold the message to.
        side: the side that reads, for errors.
        placed: called with each piece of the payload when it is in its place; the pieces come in order.

    Attributes:
        header: the header; empty until it is complete, which is when `buffers_for` is called.
        received: payload bytes received so far.
        payload_bytes: size of the whole payload; 0 until the header is complete.
    """

    def __init__(
        self,
        buffers_for: BuffersFor,
        *,
        limits: Limits = DEFAULT_LIMITS,
        side: Side = "server",
        placed: Callable[[memoryview], object] | None = None,
    ) -> None:
        self.header: dict[str, Any] = {}
        self.payload_bytes = 0
        self.received = 0
        self._buffers_for = buffers_for
        self._limits = limits
        self._side: Side = side
        self._reader = HeaderReader(limits, side)
        self._note = placed
        self._placed = False
        self._views: list[memoryview] = []
        self._which = 0  # the view being filled
        self._at = 0  # bytes of it that are filled
        self._frame_left = 0  # bytes of the open frame not yet received
        self._frames = 0
        self._prefix = b""  # a prefix that came in part
        self._scratch: memoryview | None = None
        self._offered = 0  # size of what get_buffer offered last
        self._direct = False  # whether that was placed memory
        self._failure: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether the message is complete."""
        return self._placed and self.received == self.payload_bytes and self._failure is None

    def get_buffer(self) -> memoryview:
        """Return memory for the next bytes, never empty.

        Once the header is known, the buffer does not reach beyond the message. Before that it may be longer: cut it to
            the rest of the body where something else follows.
        """
        if self._failure is not None:
            raise self._failure
        if self._frame_left:
            view = self._views[self._which]
            room = min(len(view) - self._at, self._frame_left)
            if room >= _DIRECT_BYTES or room == self._frame_left:
                self._offered, self._direct = room, True
                return view[self._at : self._at + room]
            size = min(SCRATCH_BYTES, self._frame_left)
        elif not self._placed:
            size = SCRATCH_BYTES
        else:
            # What is left of the payload comes behind at least one byte of a prefix.
            size = min(SCRATCH_BYTES, self.payload_bytes - self.received + 1)
        if self._scratch is None:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._offered, self._direct = size, False
        return self._scratch[:size]

    def buffer_updated(self, count: int) -> None:
        """Record that the first `count` bytes of the last `get_buffer` have been written.

        Raises:
            InvalidRequest, LimitExceeded: the message is not what the protocol says, as early as it can be known.
            ValueError: more bytes than were offered.
        """
        if not 0 <= count <= self._offered:
            raise ValueError(f"{count} bytes were written where {self._offered} were offered.")
        self._offered = 0
        if self._failure is not None:
            raise self._failure
        if self._direct:
            self._advance(count)
        elif self._scratch is not None:
            self._take(self._scratch[:count])

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Read the next bytes of the message from `chunk`.

        Raises:
            InvalidRequest, LimitExceeded: the message is not what the protocol says, as early as it can be known.
        """
        if self._failure is not None:
            raise self._failure
        self._offered = 0
        self._take(memoryview(chunk).cast("B"))

    def close(self) -> None:
        """Record that no more bytes will come.

        Raises:
            Truncated: the message is not complete.
        """
        if self._failure is not None:
            raise self._failure
        if not self._placed:
            seen = self._reader.seen
            self._fail(
                Truncated(f"The message ended inside its header, after {seen} bytes.", field="header", side=self._side)
            )
        if self.received < self.payload_bytes:
            detail = f"The message ended after {self.received} of its {self.payload_bytes} payload bytes."
            self._fail(Truncated(detail, field="payload", side=self._side))

    def _take(self, chunk: memoryview) -> None:
        try:
            while chunk:
                if self._frame_left:
                    count = self._copy(chunk)
                elif not self._placed:
                    count = self._read_header(chunk)
                elif self.received < self.payload_bytes:
                    count = self._open_frame(chunk)
                else:
                    raise InvalidRequest(
                        f"Bytes follow the message's end; its payload is {self.received} bytes.",
                        field="payload",
                        side=self._side,
                    )
                chunk = chunk[count:]
        except Exception as exc:
            self._fail(exc)

    def _read_header(self, chunk: memoryview) -> int:
        count = self._reader.feed(chunk)
        if (header := self._reader.header) is not None:
            views = flat(self._buffers_for(header))
            for view in views:
                if view.readonly:
                    raise ValueError("The memory for a payload must be writable.")
            self._views = views
            self.payload_bytes = sum(map(len, views))
            self.header = header
            self._placed = True
        return count

    def _open_frame(self, chunk: memoryview) -> int:
        """Read a frame's prefix, or the part of it that has arrived, and return the number of bytes used."""
        if not self._prefix and len(chunk) >= PREFIX.size and chunk[0] == BIN32:
            used, size = PREFIX.size, PREFIX.unpack_from(chunk)[1]
        else:
            had = len(self._prefix)
            prefix = self._prefix + bytes(chunk[: PREFIX.size - had])
            if (length := PREFIX_BYTES.get(prefix[0])) is None:
                raise InvalidRequest(
                    f"Expected a frame (msgpack bin) and found an object that starts with 0x{prefix[0]:02x}.",
                    field="payload",
                    side=self._side,
                )
            if len(prefix) < length:
                self._prefix = prefix
                return len(chunk)
            used, size = length - had, int.from_bytes(prefix[1:length], "big")
            self._prefix = b""
        self._check_frame(size)
        self._frame_left = size
        return used

    def _check_frame(self, size: int) -> None:
        self._frames += 1
        limits, side = self._limits, self._side
        if not size:
            raise InvalidRequest("A frame is empty.", field="payload", remedy="Leave it out.", side=side)
        if size > limits.frame_bytes:
            raise LimitExceeded(
                f"A frame is {size} bytes; at most {limits.frame_bytes}.",
                field="payload",
                limit=limits.frame_bytes,
                remedy="Cut the payload into more frames.",
                side=side,
            )
        if self._frames > limits.frames:
            raise LimitExceeded(
                f"The message has more than {limits.frames} frames.",
                field="payload",
                limit=limits.frames,
                remedy="Put more into each frame.",
                side=side,
            )
        if size > self.payload_bytes - self.received:
            raise InvalidRequest(
                f"The payload is longer than the {self.payload_bytes} bytes its header describes.",
                field="payload",
                limit=self.payload_bytes,
                side=side,
            )

    def _copy(self, chunk: memoryview) -> int:
        view = self._views[self._which]
        count = min(len(chunk), self._frame_left, len(view) - self._at)
        view[self._at : self._at + count] = chunk[:count]
        self._advance(count)
        return count

    def _advance(self, count: int) -> None:
        if self._note is not None:
            self._note(self._views[self._which][self._at : self._at + count])
        self.received += count
        self._frame_left -= count
        self._at += count
        if self._at == len(self._views[self._which]):
            self._which += 1
            self._at = 0
            if self.received == self.payload_bytes:
                self._views = []  # the message is complete: let go of the memory

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        self._views = []
        raise failure
