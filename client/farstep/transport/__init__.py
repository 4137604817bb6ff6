"""How bytes move: an httpx transport whose bodies are not copied."""

from farstep.transport.body import Readable, ResponseBody, body_of
from farstep.transport.forks import this
from farstep.transport.head import BODY, DEADLINE_S, NAMED, MalformedAnswer, OversizedAnswer
from farstep.transport.pieces import Batch, BufferedBody, StreamedBody
from farstep.transport.route import Answer, Described, Route
from farstep.transport.sockets import Dial, SocketTransport, dial_tcp

__all__ = [
    "BODY",
    "DEADLINE_S",
    "NAMED",
    "Answer",
    "Batch",
    "BufferedBody",
    "Described",
    "Dial",
    "MalformedAnswer",
    "OversizedAnswer",
    "Readable",
    "ResponseBody",
    "Route",
    "SocketTransport",
    "StreamedBody",
    "body_of",
    "dial_tcp",
    "this",
]
