"""Which process this is, and that there is one way to find out."""

from __future__ import annotations

import re
from pathlib import Path

import farstep
import farstep_service
from farstep.transport import this
from tests.support.forks import in_a_fork


def test_a_fork_is_another_process() -> None:
    """What notes its process finds itself in another one in a child, and in that one's child, and here as before."""
    here = this.process

    def child() -> None:
        there = this.process
        assert there is not here
        assert there is this.process

        def grandchild() -> None:
            assert this.process not in (here, there)

        assert in_a_fork(grandchild) == 0
        assert there is this.process

    assert in_a_fork(child) == 0
    assert here is this.process


def test_nothing_compares_numbers_of_processes() -> None:
    """A number may be given to another process later; and two ways to ask would be two answers."""
    sources = [path for package in (farstep, farstep_service) for path in Path(package.__path__[0]).rglob("*.py")]
    assert len(sources) > 100
    assert [str(path) for path in sources if re.search(r"[!=]= os\.getpid|getpid\(\) [!=]=", path.read_text())] == []
