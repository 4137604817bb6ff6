"""docs/limits.md shows the limits that the server holds connections to."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from farstep_service.limits import CONNECTION, DOCUMENTS, UNBOUNDED, Limit
from farstep_service.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()


def number(value: float) -> str:
    return "" if value in (0, inf, UNBOUNDED) else f"{value:,.0f}"


def row(limit: Limit) -> str:
    cells = [
        limit.state,
        "no" if limit.token else "yes",
        number(limit.most_bytes),
        f"{number(limit.most)} {limit.things}".strip(),
        number(limit.within_s),
        number(limit.silent_s),
        number(limit.least_bytes_per_s),
        limit.beyond,
    ]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def table(*heads: str) -> list[str]:
    """Return the rows below the head that begins with these cells."""
    lines = PAGE.splitlines()
    (begin,) = (number for number, line in enumerate(lines) if line.startswith(f"| {' | '.join(heads)} |"))
    rows = lines[begin + 2 :]
    return rows[: rows.index("")]


@pytest.mark.promise(
    "A connection lives no longer, and costs no more, than docs/limits.md says for its state.",
    area="limits",
)
def test_the_page_shows_every_state_with_its_limits() -> None:
    """The table of connection states is that of the code, row by row."""
    assert table("state", "without a token") == [row(each) for each in CONNECTION.rows().values()]


def test_the_page_shows_how_large_documents_may_be() -> None:
    """The table of JSON documents is that of the code."""
    routes = {f"`{route}`": size for route, size in DOCUMENTS.by_route.items()} | {
        "all others" if DOCUMENTS.by_route else "all": DOCUMENTS.other_bytes
    }
    assert table("route", "bytes") == [f"| {route} | {number(size)} |" for route, size in routes.items()]


def test_a_server_waits_for_bodies_as_long_as_the_table_says() -> None:
    """The default of the setting is the table's."""
    assert Settings().idle_body_s == CONNECTION.body.silent_s
