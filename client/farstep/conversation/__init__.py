"""Requests to a server and its answers, over httpx: nothing that it says is believed before it is checked."""

from farstep.conversation.bodies import Arrived, BuffersFor, Received
from farstep.conversation.conversation import FILE, READ_TIMEOUT_S, Conversation

__all__ = ["FILE", "READ_TIMEOUT_S", "Arrived", "BuffersFor", "Conversation", "Received"]
