"""The page at `/docs`: the OpenAPI description in plain, self-contained HTML.

    title, description
    one section per tag, with its operations:   method and path, what it does, what it takes and answers
    the documents that they name, each with its members

It loads nothing else, and its policy forbids a browser to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any, Final

from starlette.responses import HTMLResponse

Described = Mapping[str, Any]
"""A part of an OpenAPI description."""

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
h3 { border-top: 1px solid #ccc; padding-top: 1rem; }
td, th { text-align: left; vertical-align: top; padding: 0.1rem 1.5rem 0.1rem 0; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #8bf; } }
"""
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def page_of(description: Described) -> HTMLResponse:
    """Return the page that shows an OpenAPI description."""
    return HTMLResponse("\n".join(_page(description)), headers={"content-security-policy": POLICY})


def _page(description: Described) -> Iterator[str]:
    info = description["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
    yield from (f"<p>{_prose(each)}</p>" for each in info["description"].split("\n\n"))
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
    tagged: dict[str, list[str]] = {}
    for path, item in description["paths"].items():
        for method, operation in item.items():
            tagged.setdefault(operation["tags"][0], []).extend(_operation(method, path, operation))
    for tag, lines in tagged.items():
        yield f"<h2>{escape(tag)}</h2>"
        yield from lines
    yield "<h2>documents</h2>"
    for name, schema in description["components"]["schemas"].items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_prose(schema.get("description", ""))}</p>'
        required = schema.get("required", ())
        members = schema.get("properties", {}).items()
        yield _table((key, _kind(member), _bounds(member, key in required)) for key, member in members)
    yield "</body></html>"


def _operation(method: str, path: str, operation: Described) -> Iterator[str]:
    yield f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{_prose(operation['description'])}</p>"
    rows = [
        (each["name"], _kind(each["schema"]), f"in the {each['in']}; {_bounds(each['schema'], each['required'])}")
        for each in operation.get("parameters", ())
    ]
    if "requestBody" in operation:
        rows.append(("body", _content(operation["requestBody"]), "required"))
    rows += [
        (status, _content(answer), _prose(answer["description"])) for status, answer in operation["responses"].items()
    ]
    yield _table(rows)


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [
        f"<tr><th><code>{escape(name)}</code></th><td>{kind}</td><td>{said}</td></tr>" for name, kind, said in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _content(body: Described) -> str:
    """Return the content of a body as HTML."""
    return ", ".join(
        f"{_kind(each['schema'])} <small>{escape(kind)}</small>" for kind, each in body.get("content", {}).items()
    )


def _kind(schema: Described) -> str:
    """Return the kind of a value as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(each))}</code>" for each in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    if isinstance(members := schema.get("additionalProperties"), Mapping):
        return f"object of {_kind(members)}"
    if schema.get("type") == "object" and "properties" in schema:
        return escape(str(schema.get("title", "object")))
    return escape(str(schema.get("type", "anything")))


def _bounds(schema: Described, required: bool) -> str:
    """Return the bounds of a value as HTML."""
    said = ["required" if required else "optional"]
    if "default" in schema:
        said.append(f"default <code>{escape(json.dumps(schema['default']))}</code>")
    for key in ("minimum", "maximum", "exclusiveMaximum", "minItems", "maxItems", "maxProperties", "pattern"):
        if key in schema:
            said.append(f"{key} <code>{escape(str(schema[key]))}</code>")
    return ", ".join(said)


def _prose(text: str) -> str:
    """Return text as HTML, with code between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
