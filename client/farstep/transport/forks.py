"""Which process this is: what was made before a fork belongs to the parent, and its child has to leave it alone.

    connection, pool     two processes over one connection would mix their bytes: the child starts with none
    push in progress     its thread is the parent's, and so is its answer
    worker               its epoch and its sequence are the parent's; the child has to join under a name of its own
    shared memory        the parent fills it, and the server reads it
    claims on memory     held as long as the parent steps

One object stands for this process. What is made notes it, and compares:

    self._process = this.process
    ...
    if self._process is not this.process:       a fork of the process that made this

`os.fork` gives a child another object before anything else runs there, so the comparison costs no call.
"""

from __future__ import annotations

import os
from typing import Final, final


@final
class This:
    """This process.

    Attributes:
        process: an object that no other process has; a fork has another one.
    """

    __slots__ = ("process",)

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """Be another process from now on."""
        self.process = object()


this: Final = This()
os.register_at_fork(after_in_child=this.forked)
