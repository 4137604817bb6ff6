"""Requests to a server and its answers, over httpx: nothing that it says is believed before it is checked."""

from farstep.conversation.bodies import Arrived, Place, Received
from farstep.conversation.conversation import FILE, READ_TIMEOUT_S, Conversation

__all__ = ["FILE", "READ_TIMEOUT_S", "Arrived", "Conversation", "Place", "Received"]
