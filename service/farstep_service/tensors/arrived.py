"""What came with the writes of a session that are not decided about: gradients that wait, contents, a param group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.plan import Plan
from farstep_service.tensors.contents import Contents
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.payload import Payload


@dataclass(slots=True)
class ArrivedPush:
    """A push, and its gradients."""

    head: PushHead
    contribution: Contribution


@dataclass(slots=True)
class ArrivedContents:
    """What is to replace contents, or to be added: then with the plan that the session has afterwards."""

    contents: Contents
    head: PutHead | None = None
    plan: Plan | None = None


@final
class Arrived:
    """Keep what came with writes until they are decided about.

    Attributes:
        pushes, contents: by the names of their writes.
    """

    def __init__(self) -> None:
        self.pushes: dict[WriteName, ArrivedPush] = {}
        self.contents: dict[WriteName, ArrivedContents] = {}

    def receive_push(self, head: PushHead, contribution: Contribution) -> None:
        """Keep gradients until their push is decided about."""
        self.pushes[head.name] = ArrivedPush(head, contribution)

    def receive_contents(self, head: PutHead, contents: Contents) -> None:
        """Keep contents until they are written."""
        self.contents[head.name] = ArrivedContents(contents, head=head)

    def receive_group(self, name: WriteName, parameters: Contents, plan: Plan) -> None:
        """Keep the parameters of a group until the session grows by them, and has that plan."""
        self.contents[name] = ArrivedContents(parameters, plan=plan)

    def release(self, name: WriteName) -> None:
        """Let go of what came under a name, which is decided about."""
        self.pushes.pop(name, None)
        self.contents.pop(name, None)

    def payload(self, name: WriteName) -> Payload | None:
        """Return the bytes that came with a write; None where no journal wants them."""
        if (push := self.pushes.get(name)) is not None:
            return push.contribution.payload
        if (arrived := self.contents.get(name)) is not None:
            return Payload(arrived.contents.memory())
        return None

    def gradients(self, name: WriteName) -> Contribution | None:
        """Return the gradients of a push that is not decided about."""
        push = self.pushes.get(name)
        return None if push is None else push.contribution

    def waiting(self) -> list[tuple[PushHead, Payload | None]]:
        """Return the pushes that wait, and the bytes that came with each."""
        return [(each.head, each.contribution.payload) for each in self.pushes.values()]
