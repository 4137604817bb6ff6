"""How bytes move: an httpx transport whose bodies are not copied."""

from .body import Readable, ResponseBody, body_of
from .extensions import BODY, DEADLINE_S, NAMED
from .pieces import Batch, Pieces, Supply
from .sockets import Dial, SocketTransport, dial_tcp

__all__ = [
    "BODY",
    "DEADLINE_S",
    "NAMED",
    "Batch",
    "Dial",
    "Pieces",
    "Readable",
    "ResponseBody",
    "SocketTransport",
    "Supply",
    "body_of",
    "dial_tcp",
]
