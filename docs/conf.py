"""The documentation site: every page of the repository that is for readers, built by Sphinx (`make docs`).

Pages stay where they are and link to each other by path, so the same links work here and where the repository is shown.
What this file adds is the navigation; `tests/project/test_pages.py` checks that it is complete, without Sphinx.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

NAVIGATION: dict[str, list[str]] = {
    "Start": ["examples/README", "docs/launch", "docs/integrations", "deploy/README"],
    "Train": [
        "docs/optimizers",
        "docs/workers",
        "docs/local_sgd",
        "docs/policies",
        "docs/overlap",
        "docs/sessions",
        "docs/durability",
        "docs/errors",
    ],
    "Measure": ["docs/bench", "docs/benchmarks", "docs/training_speed", "docs/parity"],
    "Trust": ["docs/promises", "SECURITY", "docs/limits", "docs/attack", "docs/torture"],
    "Build": ["client/farstep/protocol/PROTOCOL", "CONTRIBUTING", "service/README", "client/README", "CHANGELOG"],
}
"""The sidebar: captions, and the pages below them, without their `.md`."""
DECISIONS = "service/decisions/*"

project = "farstep"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = [f"{root_doc}.md", *(f"{page}.md" for pages in NAVIGATION.values() for page in pages), DECISIONS]
exclude_patterns = [".*", "build", "dist", "**/__pycache__"]
myst_heading_anchors = 4
html_theme = "alabaster"
html_theme_options = {"description": "An optimizer as a service", "fixed_sidebar": True, "page_width": "72rem"}
html_copy_source = False
html_show_copyright = False


def setup(app: Any) -> None:
    """Add the navigation to pages that know nothing of it, and begin the site with the README."""
    from pygments.lexers.special import TextLexer

    app.add_lexer("hex", TextLexer)  # bytes, in the protocol's examples
    app.connect("source-read", _navigate)
    app.connect("build-finished", _begin)


def _navigate(_app: Any, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] += "".join(_contents(pages, caption=caption, hidden=True) for caption, pages in NAVIGATION.items())
    if page == "service/README":
        source[0] += _contents([DECISIONS.removeprefix("service/")], glob=True)


def _contents(pages: list[str], *, caption: str = "", hidden: bool = False, glob: bool = False) -> str:
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden + [":glob:"] * glob
    return "\n".join(["\n\n```{toctree}", *options, "", *pages, "```\n"])


def _begin(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        built = Path(app.outdir)
        shutil.copyfile(built / f"{root_doc}.html", built / "index.html")
