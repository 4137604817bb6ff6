"""Reading messages: where bytes land, when a message ends, and what is refused."""

import socket
import threading

import pytest

from farstep.errors import InvalidRequest, LimitExceeded, TensorMismatch, Truncated
from farstep.protocol import Decoder, Limits, encode
from tests.support.wire.driving import drive, read

BODY = b"".join(encode({"v": 1, "worker": "w0"}, [memoryview(b"0123456789")], limits=Limits(frame_bytes=4)))


def decoder_of(*sizes: int, **options) -> Decoder:
    return Decoder(lambda header: [memoryview(bytearray(size)) for size in sizes], **options)


@pytest.mark.parametrize("way", ["feed", "buffer"])
@pytest.mark.parametrize("end", range(len(BODY)))
def test_every_cut_is_noticed(end, way):
    """A message that ends before its last byte, wherever, is truncated, and says how far it came."""
    decoder = decoder_of(10)
    drive(decoder, BODY[:end], ways=[way])
    assert not decoder.done
    with pytest.raises(Truncated, match=r"after \d+ (bytes|of its 10 payload bytes)"):
        decoder.close()
    assert not decoder.done


def test_cut_bodies_say_how_far_they_came():
    """The error of a cut payload has the bytes received and the bytes expected."""
    decoder = decoder_of(10)
    drive(decoder, BODY[:-1])
    with pytest.raises(Truncated) as caught:
        decoder.close()
    assert caught.value.detail == "The message ended after 9 of its 10 payload bytes."


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_bytes_after_the_end_are_refused(piece):
    """A byte after the payload is refused, whether it comes with the last bytes or later."""
    with pytest.raises(InvalidRequest, match="follow"):
        read(BODY + b"\xc0", [10], pieces=[piece], ways=["buffer"])


@pytest.mark.parametrize("extra", [b"\xc4\x01x", b"\x80"])
def test_bytes_after_a_message_without_payload_are_refused(extra):
    """A frame, or another message, after a header that has no payload is refused."""
    with pytest.raises(InvalidRequest, match="follow"):
        read(b"".join(encode({"v": 1}, [])) + extra, [])


@pytest.mark.parametrize(
    ("frame", "error", "words"),
    [
        (b"\xc4\x00", InvalidRequest, "empty"),
        (b"\xc6\x00\x00\x00\x00", InvalidRequest, "empty"),
        (b"\xc6\x00\x00\x00\x0b", InvalidRequest, "longer than the 10 bytes"),
        (b"\xc6\x01\x00\x00\x01", LimitExceeded, "16777217 bytes; at most 16777216"),
        (b"\xc6\xff\xff\xff\xff", LimitExceeded, "4294967295 bytes"),
        (b"\x93\x01\x02\x03", InvalidRequest, "0x93"),
        (b"\xaa0123456789", InvalidRequest, "0xaa"),
        (b"\xc0", InvalidRequest, "0xc0"),
        (b"\xc7\x04\x01xxxx", InvalidRequest, "0xc7"),
    ],
)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_what_is_not_a_frame_is_refused(frame, error, words, piece):
    """Empty and oversized frames, frames beyond the payload, and other objects are refused at their prefix."""
    with pytest.raises(error, match=words) as caught:
        read(b"\x80" + frame, [10], pieces=[piece])
    assert caught.value.field == "payload"


def test_frames_are_counted():
    """A message of more frames than the limit is refused at the first one too many."""
    body = b"\x80" + b"\xc4\x01x" * 4
    assert read(body, [4], limits=Limits(frames=4)) == ({}, [b"xxxx"])
    with pytest.raises(LimitExceeded, match="more than 3 frames") as caught:
        read(body, [4], limits=Limits(frames=3))
    assert caught.value.limit == 3


def test_place_is_asked_once_and_before_any_payload():
    """`place` is called once, as soon as the header is complete, and gets it whole."""
    asked = []
    memory = bytearray(10)

    def place(header):
        asked.append((header, bytes(memory)))
        return [memoryview(memory)]

    decoder = Decoder(place)
    assert decoder.header == {}
    drive(decoder, BODY, pieces=[1])
    assert asked == [({"v": 1, "worker": "w0"}, bytes(10))]
    assert memory == b"0123456789"


def test_refusal_of_place_reaches_the_caller():
    """What `place` raises comes out unchanged, and nothing more is read."""
    error = TensorMismatch("No such segment.")

    def place(header):
        raise error

    decoder = Decoder(place)
    with pytest.raises(TensorMismatch) as caught:
        decoder.feed(BODY)
    assert caught.value is error
    with pytest.raises(TensorMismatch):
        decoder.close()


@pytest.mark.parametrize("memory", [memoryview(b"0123456789"), memoryview(bytearray(20))[::2]])
def test_place_must_give_memory_that_can_be_written(memory):
    """Read-only and strided memory are refused."""
    with pytest.raises(ValueError, match=r"writable|contiguous"):
        Decoder(lambda header: [memory]).feed(BODY)


def test_a_decoder_is_spent_after_an_error():
    """After an error every call raises that error again, and the placed memory is let go."""
    memory = bytearray(10)
    decoder = Decoder(lambda header: [memoryview(memory)])
    with pytest.raises(InvalidRequest) as caught:
        decoder.feed(b"\x80\xc0")
    for again in (lambda: decoder.feed(b"x"), decoder.get_buffer, lambda: decoder.buffer_updated(0), decoder.close):
        with pytest.raises(InvalidRequest) as later:
            again()
        assert later.value is caught.value
    assert not decoder.done


def test_memory_is_let_go_at_the_end():
    """A decoder that is done holds on to none of the placed memory."""
    memory = bytearray(10)
    decoder = Decoder(lambda header: [memoryview(memory)])
    decoder.feed(BODY)
    memory.append(0)  # raises BufferError while a view exists
    assert decoder.done


def test_large_content_is_offered_its_final_place():
    """For the inside of a large tensor `get_buffer` offers the placed memory itself, up to its end or the frame's."""
    first, second = bytearray(100_000), bytearray(100_000)
    decoder = Decoder(lambda header: [memoryview(first), memoryview(second)], limits=Limits(frame_bytes=150_000))
    drive(decoder, b"\x80\xc6\x00\x02\x49\xf0" + b"a" * 1000, ways=["buffer"])
    for memory, size in ((first, 99_000), (second, 50_000)):
        offered = decoder.get_buffer()
        assert offered.obj is memory
        assert len(offered) == size
        offered[:] = b"b" * size
        decoder.buffer_updated(size)
    assert decoder.received == 150_000
    assert first == b"a" * 1000 + b"b" * 99_000
    assert second[49_990:50_010] == b"b" * 10 + bytes(10)


def test_small_tensors_share_reads():
    """A run of small tensors is received with few reads, not with one for each."""
    payload = bytes(range(250)) * 400
    body = b"".join(encode({"v": 1}, [memoryview(payload)]))
    came = [bytearray(100) for _ in range(1000)]
    decoder = Decoder(lambda header: [memoryview(each) for each in came])
    reads, at = 0, 0
    while not decoder.done:
        target = decoder.get_buffer()
        count = min(len(target), len(body) - at)
        target[:count] = body[at : at + count]
        decoder.buffer_updated(count)
        reads, at = reads + 1, at + count
    assert b"".join(came) == payload
    assert reads == 2


def test_a_small_message_is_one_read():
    """Header, prefix and payload of a small message fit in the first buffer."""
    assert len(decoder_of(10).get_buffer()) >= len(BODY)


def test_offers_end_with_the_message():
    """Once the header is known no offer reaches beyond the message's end."""
    body = BODY + b"the next message"
    decoder = decoder_of(10)
    at = BODY.index(b"\xc6")
    decoder.feed(body[:at])
    while not decoder.done:
        target = decoder.get_buffer()
        target[:] = body[at : at + len(target)]
        at += len(target)
        decoder.buffer_updated(len(target))
    assert at == len(BODY)


def test_nothing_received_is_no_progress():
    """No bytes, as from a socket at its end, change nothing."""
    decoder = decoder_of(10)
    drive(decoder, BODY[:-1])
    decoder.get_buffer()
    decoder.buffer_updated(0)
    decoder.feed(b"")
    decoder.feed(BODY[-1:])
    assert decoder.done


def test_more_bytes_than_offered_are_a_mistake():
    """Whoever reports more bytes than were offered has written elsewhere, and is told so."""
    decoder = decoder_of(10)
    size = len(decoder.get_buffer())
    with pytest.raises(ValueError, match="offered"):
        decoder.buffer_updated(size + 1)


@pytest.mark.parametrize(
    "body", [b"\xc0", b"\x80\xc0", b"\x80\xc4\x00", b"\x80\xc4\x0b", BODY + b"x", b"\x80", b"\x81", b"\x81\xc1"]
)
def test_errors_name_the_side_that_reads(body):
    """The error of a reply that a client reads says that the client found out."""
    decoder = decoder_of(10, side="client")
    with pytest.raises(InvalidRequest) as caught:  # noqa: PT012
        decoder.feed(body)
        decoder.close()
    assert caught.value.side == "client"


def test_sockets_fill_it():
    """A real socket's `recv_into`, with pieces as the kernel likes them, gives the payload bit for bit."""
    payload = bytes(range(251)) * 20_000
    came = [bytearray(3_000_000), bytearray(10), bytearray(len(payload) - 3_000_010)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = b"".join(encode({"v": 1}, [memoryview(payload)], limits=Limits(frame_bytes=1_000_000)))
        sender = threading.Thread(target=theirs.sendall, args=(body,))
        sender.start()
        decoder = Decoder(lambda header: [memoryview(each) for each in came])
        while not decoder.done:
            decoder.buffer_updated(ours.recv_into(decoder.get_buffer()))
        sender.join()
    assert b"".join(came) == payload
