"""The control routes describe themselves, errors included; the data routes are described in PROTOCOL.md."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

import farstep.errors
from farstep.errors import BY_CODE, FarstepError
from farstep_service.routes.problems import Problem, problem_of
from tests.support.service.servers import RunningServer

CONTROL = {
    ("get", "/healthz"),
    ("get", "/v1/info"),
    ("get", "/v1/sessions"),
    ("post", "/v1/sessions"),
    ("get", "/v1/sessions/{name}"),
    ("delete", "/v1/sessions/{name}"),
    ("get", "/v1/sessions/{name}/groups"),
    ("patch", "/v1/sessions/{name}/groups"),
    ("put", "/v1/sessions/{name}/consistency"),
    ("get", "/v1/sessions/{name}/log"),
    ("get", "/v1/sessions/{name}/replay"),
    ("post", "/v1/sessions/{name}/rollback"),
    ("post", "/v1/sessions/{name}/fork"),
    ("get", "/v1/sessions/{name}/workers"),
    ("get", "/v1/sessions/{name}/workers/{worker}"),
    ("delete", "/v1/sessions/{name}/workers/{worker}"),
    ("put", "/v1/sessions/{name}/workers/{worker}/lease"),
    ("put", "/v1/sessions/{name}/workers/{worker}/memory"),
}
ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/openapi.json", trust_env=False)
    assert answer.status_code == 200
    described = answer.json()
    assert isinstance(described, dict)
    return described


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method, path): each for path, item in document["paths"].items() for method, each in item.items()}


def test_every_control_route_is_described(document: dict[str, Any]) -> None:
    """The description holds the control routes, all of them, each with a summary, a sentence and a tag."""
    described = operations(document)
    assert described.keys() == CONTROL
    for operation in described.values():
        assert operation["summary"]
        assert operation["description"].endswith(".")
        assert operation["tags"]


def test_documents_have_schemas(document: dict[str, Any]) -> None:
    """What goes in and what comes out is a named schema; what goes in is closed to fields nobody knows."""
    schemas = document["components"]["schemas"]
    for key in (("post", "/v1/sessions"), ("patch", "/v1/sessions/{name}/groups")):
        operation = operations(document)[key]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schemas[name]["additionalProperties"] is False
        assert operation["requestBody"]["required"] is True
    for name in ("SessionDocument", "SegmentDocument", "JoinedDocument", "SessionView", "WorkerDocument", "Info"):
        assert schemas[name]["properties"]
        assert schemas[name]["description"].endswith(".")


def test_data_routes_are_named(document: dict[str, Any]) -> None:
    """The description names the msgpack routes, which it does not describe."""
    for route in (
        "`POST /v1/sessions/{name}/push`",
        "`GET|PUT /v1/sessions/{name}/contents`",
        "`POST /v1/sessions/{name}/groups`",
    ):
        assert route in document["info"]["description"]


def test_errors_are_described(document: dict[str, Any]) -> None:
    """Every operation names the problem document, which is what an error really looks like."""
    for operation in operations(document).values():
        answer = operation["responses"]["default"]
        assert answer["content"].keys() == {"application/problem+json"}
        assert answer["content"]["application/problem+json"]["schema"]["title"] == "Problem"
        assert "422" not in operation["responses"], "the framework's own error is never sent"
    known = Problem.model_validate_json(problem_of(farstep.errors.NonFinite("p0 holds NaN", field="p0", limit=1)))
    assert (known.code, known.status, known.field) == ("non_finite_gradient", 422, "p0")


def test_every_code_is_documented() -> None:
    """Each code stands in docs/errors.md with its status and its class, and no other does."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`.*? \| (\d+) \|", ERRORS.read_text(), re.MULTILINE)
    documented = {code: (name, int(status)) for code, name, status in rows}
    assert documented == {code: (each.__name__, each.status) for code, each in BY_CODE.items()}


@pytest.mark.promise("Every error has a documented code and class, and says what to do.", area="client errors")
@pytest.mark.parametrize("kind", list(BY_CODE.values()))
def test_every_error_is_a_problem_document(kind: type[FarstepError]) -> None:
    """Whatever the error, its document has the members the description promises, and is of bounded length."""
    error = kind("x" * 100_000, field="y" * 100_000, limit=1, remedy="Do it.", expected=3)
    body = problem_of(error)
    assert len(body) < 4000
    problem = Problem.model_validate_json(body)
    assert (problem.code, problem.status, problem.side) == (kind.code, kind.status, "server")
    assert problem.title == (kind.__doc__ or "").strip().split("\n", 1)[0]


class Page(HTMLParser):
    """What a browser would do with a page: load things, and jump to places in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data"):
                self.targets.add(str(value))
            if name == "id":
                self.places.add(f"#{value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_for_people_needs_nothing_from_elsewhere(server: RunningServer, document: dict[str, Any]) -> None:
    """/docs shows every operation and document of the description, runs no script and loads nothing."""
    answer = httpx.get(f"{server.url}/docs", trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = Page()
    page.feed(answer.text)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert page.targets - page.places == {"openapi.json"}
    assert {f"#{name}" for name in document["components"]["schemas"]} == page.places
    for (method, path), operation in operations(document).items():
        assert f"{method.upper()} {path}" in page.text
        assert operation["description"].replace("`", "") in page.text
    for name, schema in document["components"]["schemas"].items():
        assert all(member in page.text for member in (name, *schema["properties"]))


def test_the_pages_of_the_framework_are_gone(server: RunningServer) -> None:
    """Pages that would be blank without the internet are not there."""
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert httpx.get(f"{server.url}{path}", trust_env=False).json()["code"] == "no_such_route"
