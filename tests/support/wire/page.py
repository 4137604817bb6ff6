"""The protocol's page, and the blocks of bytes in it."""

import re
from pathlib import Path
from typing import NamedTuple

from farstep import protocol as wire

DOCUMENT = (Path(wire.__file__).parent / "PROTOCOL.md").read_text()


class Block(NamedTuple):
    title: str
    info: list[str]
    text: str


def blocks() -> list[Block]:
    """Return the document's fenced blocks, each with the heading above it."""
    found, title = [], ""
    for part in re.finditer(r"^#+ (.+)$|^```(.+)\n([\s\S]*?)^```$", DOCUMENT, re.MULTILINE):
        if part[1]:
            title = part[1]
        else:
            found.append(Block(title, part[2].split(), part[3]))
    return found
