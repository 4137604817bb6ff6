"""Requests to a server over httpx, and its answers, which are checked before they are used."""

from farstep.conversation.bodies import Arrived, BuffersFor, Received
from farstep.conversation.conversation import FILE, READ_TIMEOUT_S, Conversation

__all__ = ["FILE", "READ_TIMEOUT_S", "Arrived", "BuffersFor", "Conversation", "Received"]
