"""Show which promise to users is shown by which test: `python -m tests.promises`, or `make promises`.

    python -m tests.promises [--write]

Prints the page, or writes it to `docs/promises.md`. Ends with 1 if a marker is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.promises.page import PAGE, collect, complaints, render


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the page, and return whether something was wrong, as an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name} instead of printing it")
    options = parser.parse_args(arguments)
    marked = collect()
    if wrong := complaints(marked):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if options.write:
        PAGE.write_text(render(marked))
    else:
        print(render(marked), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
