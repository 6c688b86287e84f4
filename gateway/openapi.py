"""``/openapi.json``, made from the table of endpoints and from the types themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from gateway.problems import MEDIA_TYPE
from gateway.table import ENDPOINTS, Endpoint
from headrace.model import Problem
from headrace.names import NAME_RULE

_REF = "#/components/schemas/{name}"
_VARIABLE = re.compile(r"\{(\w+)\}")


def document(version: str, endpoints: Iterable[Endpoint] = ENDPOINTS) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of these endpoints."""
    endpoints = list(endpoints)
    kinds = [Problem, *_kinds(endpoints)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = {_key(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": version,
            "summary": "Triggers of experiments in, right answers out, before their deadlines.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


class OpenApi:
    """Serves the document, encoded once."""

    def __init__(self, version: str) -> None:
        self._body = msgspec.json.encode(document(version))

    async def get(self, request: web.Request) -> web.Response:
        """Answer ``GET /openapi.json``."""
        return web.Response(body=self._body, content_type="application/json")


def _kinds(endpoints: list[Endpoint]) -> list[Any]:
    """Return every type that the endpoints name, each once."""
    found: dict[str, Any] = {}
    for endpoint in endpoints:
        named = [p.kind for p in endpoint.params]
        named += [b.kind for b in endpoint.bodies if b.kind is not None]
        named += [a for a in endpoint.answers.values() if a is not None and not isinstance(a, str)]
        found.update((_key(kind), kind) for kind in named)
    return list(found.values())


def _key(kind: Any) -> str:
    return repr(kind)


def _operation(endpoint: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    name_schema = {"type": "string", "pattern": f"^{NAME_RULE}$"}
    free = {"number": {"type": "integer", "minimum": 1}, "file": {"type": "string"}}
    parameters: list[dict[str, Any]] = [
        {"name": variable, "in": "path", "required": True, "schema": free.get(variable, name_schema)}
        for variable in _VARIABLE.findall(endpoint.path)
    ]
    parameters += [
        {"name": p.name, "in": p.where, "description": p.text, "schema": schema_of[_key(p.kind)]}
        for p in endpoint.params
    ]
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.text,
        "responses": {
            **{str(status): _answer(status, carried, schema_of) for status, carried in endpoint.answers.items()},
            "default": {
                "description": "What went wrong, and the cure.",
                "content": {MEDIA_TYPE: {"schema": schema_of[_key(Problem)]}},
            },
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if endpoint.bodies:
        operation["requestBody"] = {
            "required": all(body.kind is not None for body in endpoint.bodies),
            "content": {
                body.content_type: {} if body.kind is None else {"schema": schema_of[_key(body.kind)]}
                for body in endpoint.bodies
            },
        }
    if endpoint.open:
        operation["security"] = []
    return operation


def _answer(status: int, carried: Any, schema_of: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if isinstance(carried, str):
        answer["content"] = {carried: {}}
    elif carried is not None:
        answer["content"] = {"application/json": {"schema": schema_of[_key(carried)]}}
    return answer
