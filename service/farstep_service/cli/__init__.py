"""The command line, `farstep`: one module per family of verbs."""

from farstep_service.cli.entry import main

__all__ = ["main"]
