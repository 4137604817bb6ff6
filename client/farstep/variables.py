"""Environment variables that farstep reads, and names that look like misspellings of them.

A misspelt variable would silently have no effect. A server refuses an unknown `FARSTEP_SERVE_*`, a prefix that is its
own. Elsewhere a name close to a known one is warned about, and any other is ignored: it may belong to another program,
or to Kubernetes, which sets `FARSTEP_PORT` and similar names in every container beside a service called farstep.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Final

OURS: Final = "FARSTEP_"
KNOWN: Final = frozenset(
    OURS + name
    for name in (
        *("SERVER", "SESSION", "WORKER", "TOKEN", "WIRE", "OVERLAP", "OPTIONS", "RUN", "RESTART", "KERNEL_CACHE"),
        "FAILPOINT",
    )
)
"""Variables that client or service read; those of `farstep serve` follow from its options."""
ARGUMENTS: Final[Mapping[str, str]] = {
    OURS + name: argument
    for name, argument in (
        ("KERNEL", "kernel"),
        ("KERNELS", "kernel"),
        ("TIMEOUT", "timeout_s"),
        ("TIMEOUT_S", "timeout_s"),
        ("CONSISTENCY", "consistency"),
        ("DURABILITY", "durability"),
        ("NONFINITE", "nonfinite"),
        ("URL", "server"),
    )
}
"""Names that could be expected to exist, and the argument that has their effect."""
ALIKE: Final = 0.85
"""The similarity from which one name counts as a misspelling of another."""

_OF_OTHERS: Final = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_[0-9]+_[A-Z]+.*)?)|FARSTEP_(GPU_)?HTTP_PORT")
_OF_SERVE: Final = OURS + "SERVE_"


def unknown(environment: Mapping[str, str], prefix: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield unknown variables with a prefix, each with the closest known name, "" for none.

    Args:
        environment: all variables.
        prefix: the prefix of the names.
        known: the names that are read.
    """
    for name in sorted(environment):
        if name.startswith(prefix) and name not in known and not _OF_OTHERS.fullmatch(name):
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=ALIKE)
            yield name, near[0] if near else ""


def warn_of_misspelt(environment: Mapping[str, str], known: Collection[str] = KNOWN) -> None:
    """Warn of each variable whose name is nearly a known one; Python shows each warning once."""
    for name, near in unknown(environment, OURS, known):
        if name in ARGUMENTS and not near:
            text = f"The variable {name} is not read; give the argument {ARGUMENTS[name]}= in the script."
            warnings.warn(text, UserWarning, stacklevel=2)
        elif near and not name.startswith(_OF_SERVE):
            warnings.warn(f"The variable {name} is not read; did you mean {near}?", UserWarning, stacklevel=2)
