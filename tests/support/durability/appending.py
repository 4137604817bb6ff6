"""A process that writes a journal until it is killed: `python -m tests.support.durability.appending DIR LEVEL SEED`.

It prints how many events it has appended after each thing it does, so that its reader knows what has to be there.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import types
from pathlib import Path
from typing import cast


def without_torch() -> None:
    """Let the modules of files be imported alone: what the package offers takes two seconds, most of them torch's."""
    room = importlib.util.find_spec("farstep_service")
    assert room is not None
    package = types.ModuleType("farstep_service.durability")
    package.__path__ = [str(Path(cast(str, room.origin)).parent / "durability")]
    sys.modules[package.__name__] = package


def main() -> None:
    """Live a session's life, for ever."""
    without_torch()
    from farstep_service.durability.journal import Sync
    from farstep_service.durability.storage import DiskStorage
    from tests.support.durability.life import Life

    root, sync, seed = sys.argv[1:]
    life = Life(DiskStorage(Path(root)), cast(Sync, sync), random.Random(int(seed)))
    while True:
        life.act()
        print(len(life.events), flush=True)


if __name__ == "__main__":
    main()
