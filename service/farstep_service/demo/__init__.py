"""The demo: workers train on handwritten digits with an optimizer in a server process, and torch.optim repeats it."""

from farstep_service.demo.run import run

__all__ = ["run"]
