"""Train with an optimizer that lives on another machine.

    optimizer = farstep.optim.Adagrad(model.parameters(), lr=1e-2, server="http://127.0.0.1:7171")

torch is imported when `farstep.optim` is first used, so that the command line answers quickly.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from farstep.errors import FarstepError
from farstep.identity import Worker, worker
from farstep.protocol.codecs import Wire
from farstep.protocol.consistency import Async, Bounded, Sync
from farstep.protocol.durability import Journal, Snapshot

if TYPE_CHECKING:
    from farstep import optim
    from farstep.heartbeat import Heartbeat
    from farstep.local_sgd import DiLoCo, LocalSGD
    from farstep.optim.moving import remote
    from farstep.protocol.receipt import StepReport
    from farstep.settings import RemoteOptions
    from farstep.transfer import export_session, import_session

__all__ = [
    "Async",
    "Bounded",
    "DiLoCo",
    "FarstepError",
    "Heartbeat",
    "Journal",
    "LocalSGD",
    "RemoteOptions",
    "Snapshot",
    "StepReport",
    "Sync",
    "Wire",
    "Worker",
    "export_session",
    "import_session",
    "optim",
    "remote",
    "worker",
]
__version__ = _version("farstep")

_LAZY = {
    "DiLoCo": "farstep.local_sgd",
    "Heartbeat": "farstep.heartbeat",
    "LocalSGD": "farstep.local_sgd",
    "RemoteOptions": "farstep.settings",
    "StepReport": "farstep.protocol.receipt",
    "export_session": "farstep.transfer",
    "import_session": "farstep.transfer",
    "remote": "farstep.optim.moving",
}


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module("farstep.optim")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'farstep' has no attribute {name!r}")
