"""A training run to watch: handwritten digits, an optimizer in a server process, workers, and torch.optim beside it."""

from farstep_service.demo.run import run

__all__ = ["run"]
