"""How bytes move: an httpx transport whose bodies are not copied."""

from .body import Readable, ResponseBody, body_of
from .extensions import BODY, DEADLINE_S, NAMED
from .head import MalformedAnswer, OversizedAnswer
from .pieces import Batch, Pieces, Supply
from .route import Answer, Described, Route
from .sockets import Dial, SocketTransport, dial_tcp

__all__ = [
    "BODY",
    "DEADLINE_S",
    "NAMED",
    "Answer",
    "Batch",
    "Described",
    "Dial",
    "MalformedAnswer",
    "OversizedAnswer",
    "Pieces",
    "Readable",
    "ResponseBody",
    "Route",
    "SocketTransport",
    "Supply",
    "body_of",
    "dial_tcp",
]
