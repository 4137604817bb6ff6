"""PROTOCOL.md and the server have the same routes, queries, statuses and members, compared key by key."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from starlette.routing import Route

from farstep.conversation.answers import Joined
from farstep.protocol import from_ranges
from farstep.protocol.policies import default_options
from farstep_service.app import create_app
from farstep_service.routes.control import JoinedDocument
from farstep_service.routes.data import QUERY
from farstep_service.routes.documents import SegmentDocument, SessionDocument, plan_of
from farstep_service.settings import Settings
from tests.support.wire.page import DOCUMENT, blocks


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table whose heading line starts so."""
    table = DOCUMENT[DOCUMENT.index(f"\n| {heading} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def example(kind: str) -> dict[str, Any]:
    (block,) = [each for each in blocks() if each.info[:2] == ["json", kind]]
    found: dict[str, Any] = json.loads(block.text)
    return found


@pytest.fixture(scope="module")
def application() -> FastAPI:
    """Return the framework's application inside a server's."""
    app: Any = create_app(Settings())
    while not isinstance(app, FastAPI):
        app = app.app
    return app


def test_routes_queries_and_statuses_are_those_of_the_server(application: FastAPI) -> None:
    """The table has every route that there is, with its query and the status of its success, and no other."""
    served: dict[str, tuple[set[str], str]] = {}
    for path, item in application.openapi()["paths"].items():
        for method, operation in item.items():
            query = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"}
            (status,) = [each for each in operation["responses"] if each.startswith("2")]
            served[f"{method.upper()} {path}"] = (query, status)
    for route in application.routes:
        if type(route) is Route and route.path.startswith("/v1/"):  # the framework's own are in its description
            for method in (route.methods or set()) - {"HEAD"}:
                pull = f"{method} {route.path}" == "GET /v1/sessions/{name}/contents"
                made = f"{method} {route.path}" == "PUT /v1/sessions/{name}/file"
                served.setdefault(f"{method} {route.path}", (set(QUERY) if pull else set(), "201" if made else "200"))
    written = {names_in(route)[0]: (set(names_in(query)), status) for route, query, status, _ in rows("route")}
    assert written == served


def test_a_join_is_what_the_server_reads() -> None:
    """The request in the document is one that the server understands, and its table has every member there is."""
    document = SessionDocument.model_validate(example("join"))
    assert plan_of(document).name == "digits"
    assert example("join").keys() == SessionDocument.model_fields.keys()
    listed = [name for cell, *_ in rows("key of the request") for name in names_in(cell)]
    assert sorted(listed) == sorted(SessionDocument.model_fields)
    assert required(rows("key of the request")) == required_of(SessionDocument)
    (segments,) = [meaning for cell, _, meaning in rows("key of the request") if cell == "`segments`*"]
    assert set(names_in(segments)) == SegmentDocument.model_fields.keys()
    (policy,) = [meaning for cell, _, meaning in rows("key of the request") if cell == "`policy`"]
    assert set(names_in(policy)) == set(default_options())


def test_the_answer_to_a_join_is_what_the_server_says_and_the_client_reads() -> None:
    """Its members are those of the server's document, all of them always there, and the client takes the example in."""
    answer = TypeAdapter(JoinedDocument).validate_python(example("joined"), strict=True)
    assert example("joined").keys() == JoinedDocument.model_fields.keys()
    listed = [name for cell, *_ in rows("key of the answer") for name in names_in(cell)]
    assert sorted(listed) == sorted(JoinedDocument.model_fields)
    assert required(rows("key of the answer")) == required_of(JoinedDocument) == JoinedDocument.model_fields.keys()
    joined = Joined.of(example("joined"))
    assert (joined.epoch, joined.incarnation, joined.initialise) == (1, answer.incarnation, True)
    plan = plan_of(SessionDocument.model_validate(example("join")))
    assert answer.fields == plan.rule.kinds
    assert answer.eager is plan.rule.has_initial_state
    assert [from_ranges(each.segments, 2) for each in answer.placement] == [[0, 1]]


def required(table: list[list[str]]) -> set[str]:
    """Return the keys that are marked with a star."""
    return {name for cell, *_ in table for name in re.findall(r"`(\w+)`\*", cell)}


def required_of(kind: type[BaseModel]) -> set[str]:
    return {name for name, field in kind.model_fields.items() if field.is_required()}
