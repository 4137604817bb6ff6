"""The pages for readers: each is in the navigation of the site, and the links between them lead somewhere.

Links have to work both where the repository is shown and in the site that `make docs` builds from docs/conf.py.
"""

from __future__ import annotations

import re
import runpy
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = runpy.run_path(str(ROOT / "docs" / "conf.py"))
NAVIGATION: dict[str, list[str]] = SITE["NAVIGATION"]
DECISIONS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"{SITE['DECISIONS']}.md"))
LISTED = [f"{page}.md" for pages in NAVIGATION.values() for page in pages]
PAGES = [f"{SITE['root_doc']}.md", *LISTED, *DECISIONS]

FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


@cache
def text_of(page: str) -> str:
    """Return a page without its blocks of code."""
    return FENCED.sub("", (ROOT / page).read_text())


@cache
def anchors(page: str) -> frozenset[str]:
    """Return what links may name in a page: its headings, as code hosts and the site make anchors of them."""
    found: Counter[str] = Counter()
    names = set()
    for title in re.findall(r"^#{1,4} (.+?)(?: #+)?$", text_of(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return frozenset(names)


def links(page: str) -> list[str]:
    """Return where a page's links lead, but for those to other places."""
    plain = re.sub(r"`[^`\n]*`", "", text_of(page))
    targets: list[str] = LINK.findall(plain) + LINK.findall(text_of(page))
    return sorted({target for target in targets if not re.match(r"[a-z]+:", target)})


def test_every_page_is_in_the_navigation_once() -> None:
    """Each page below docs/, each README and each page in the root is in the sidebar, which names nothing else."""
    assert [page for page, count in Counter(PAGES).items() if count > 1] == []
    there = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    there |= {str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/README.md")}
    there |= {"client/farstep/protocol/PROTOCOL.md", *DECISIONS}
    assert set(PAGES) == there
    assert len(DECISIONS) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    """A link leads to a page of the site, to a heading that it has, or to a file; not to a directory."""
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        name = str(target.resolve().relative_to(ROOT))
        if not target.is_file():
            broken.append(f"{link}: there is no such file")
        elif target.suffix == ".md" and name not in PAGES:
            broken.append(f"{link}: the page is not in docs/conf.py")
        elif anchor and anchor not in anchors(name):
            broken.append(f"{link}: {name} has no such heading")
    assert broken == []


def test_links_are_found() -> None:
    """The search for links sees those that there are, so that an empty list of broken ones means something."""
    assert "../README.md#many-workers" in links("docs/local_sgd.md")
    assert "../examples/digits_workers.py" in links("docs/launch.md")
    assert "many-workers" in anchors("README.md")
    assert "16-bits-on-the-wire" in anchors("docs/optimizers.md")
