"""How bytes move: an httpx transport whose bodies are not copied."""

from .body import Readable, ResponseBody, body_of
from .extensions import BODY, DEADLINE_S, NAMED
from .head import MalformedAnswer, OversizedAnswer
from .pieces import Batch, BufferedBody, StreamedBody
from .route import Answer, Described, Route
from .sockets import Dial, SocketTransport, dial_tcp

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
]
