"""Versions of parameters that are computed elsewhere: for an optimizer that is no rule, such as LBFGS.

    buffers()          what is there now, to be copied before anything else is called
    write(segments)    other contents of some segments, as one new version
    hold()             the current version, which does not change until it is released

No kernel works on the memory, so nothing can be left unfinished: new contents are complete before they are written, and
then the memory that no reader holds becomes the current version.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import final

import torch

from farstep.errors import TensorMismatch
from farstep_service.layout import Layout
from farstep_service.store.buffers import Buffers, FlatBuffers
from farstep_service.store.versions import Held, Versions


@final
class PlainStore:
    """Hold a session's parameters.

    Args:
        layout: the segments.
        device: where the parameters are.
        parameters: their memory; the store takes ownership of flat buffers.
        version: the number of the first version.
    """

    def __init__(self, layout: Layout, *, device: torch.device, parameters: Buffers, version: int = 0) -> None:
        if parameters.layout != layout or parameters.device != device:
            raise TensorMismatch("The parameters are not in the session's layout, or not on its device.")
        self.layout = layout
        self.version = version
        self._lock = threading.RLock()
        self._versions = Versions(parameters, version)
        self._changed: Sequence[int] = [version for _ in layout.segments]

    @property
    def nbytes(self) -> tuple[int, int]:
        """Return the memory of the current version, and that of others."""
        return self._versions.current.nbytes, self._versions.other_bytes

    @property
    def buffers(self) -> Buffers:
        """Return the memory of the current version."""
        return self._versions.current

    @property
    def coming_bytes(self) -> int:
        """Return the additional parameter memory that the next version takes."""
        return self._versions.coming_bytes

    def hold(self) -> Held:
        """Return the current version, which does not change until it is released."""
        with self._lock, torch.no_grad():
            return self._versions.hold(self.version, self._changed)

    def write(self, segments: Sequence[int], values: Buffers | None) -> int:
        """Create a new version with other contents of some segments, and return its number.

        Args:
            segments: those that change.
            values: memory in the store's layout; None if only the number changes.
        """
        with self._lock, torch.no_grad():
            version = self.version + 1
            changed = list(self._changed)
            if values is not None:
                self._write(segments, values, version)
                for index in segments:
                    changed[index] = version
            self._changed = changed
            self.version = version
            return version

    def _write(self, segments: Sequence[int], values: Buffers, version: int) -> None:
        target = self._versions.target()
        current = self._versions.current
        if isinstance(target.buffers, FlatBuffers):
            if target.buffers is not current:
                written = set(segments)
                stale = [i for i, last in enumerate(self._changed) if last > target.version and i not in written]
                target.buffers.copy_(current, stale)
            target.buffers.copy_(values, segments)
        else:
            for index in segments:
                target.buffers.segment(index).copy_(values.segment(index))
        self._versions.publish(target, version)
