"""What scripted servers do with a request, and the push that some of them refuse."""

import httpx

from farstep.transport import BufferedBody
from tests.support.transport.scripted import PATIENCE_S, Peer

LARGE = memoryview(bytearray(50_000_000))


def push(client: httpx.Client, url: str) -> httpx.Response:
    return client.send(BufferedBody([LARGE]).request(client, "POST", url))


def refuse(peer: Peer) -> None:
    """Say 413 and stop reading; the closing of a socket with unread bytes is a reset."""
    peer.read_head()
    peer.answer(b"too large", "413 Content Too Large", "Connection: close\r\n")


def refuse_and_reset(peer: Peer) -> None:
    refuse(peer)
    peer.sock.recv(100_000)
    peer.reset()


def refuse_and_read_on(peer: Peer) -> None:
    """Say 413 and go on reading, as uvicorn does, until the client has enough."""
    refuse(peer)
    while peer.sock.recv(1 << 20):
        pass


def refuse_and_wait(peer: Peer) -> None:
    """Say 413 and neither read nor close."""
    refuse(peer)
    peer.over.wait(PATIENCE_S)


def answer_once(peer: Peer) -> None:
    peer.read_request()
    peer.answer()


def answer_then_hang_up(peer: Peer) -> None:
    """Answer one request, take the next one's head and close without a word."""
    peer.read_request()
    peer.answer()
    peer.read_head()


def answer_then_reset(peer: Peer) -> None:
    peer.read_request()
    peer.answer()
    peer.read_head()
    peer.reset()


def answer_all(peer: Peer) -> None:
    while peer.read_request()[0]:
        peer.answer()
