"""Functions, routes and sites over HTTP. Code is kept as bytes here; only a worker's child opens it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from functions import catalog
from gateway.gate import Gate
from gateway.needs import Tables
from gateway.runs import as_json
from headrace.errors import BadRequest, NotFound
from headrace.model import Code, FunctionOptions, FunctionView, Route, RouteView, SiteView
from headrace.names import check_name
from headrace.wire import FunctionRecord, RouteRecord, decode
from streams.blobs import Blobs

S = TypeVar("S", bound=Struct)


class FunctionBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``PUT /v1/functions/{name}`` takes; ``blob`` in the code is base64."""

    code: Code
    options: FunctionOptions = FunctionOptions()
    doc: str = ""


class FunctionList(Struct, frozen=True, kw_only=True):
    """All registered functions by name, without their source."""

    functions: list[FunctionView]


class RouteList(Struct, frozen=True, kw_only=True):
    """All registered routes by name."""

    routes: list[RouteView]


class SiteList(Struct, frozen=True, kw_only=True):
    """All sites that the platform knows; there are none in this release."""

    sites: list[SiteView]


class Catalog:
    """The endpoints under ``/v1/functions``, ``/v1/routes`` and ``/v1/sites``."""

    def __init__(
        self, *, tables: Tables, blobs: Blobs, gate: Gate, tenant: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._tables = tables
        self._blobs = blobs
        self._gate = gate
        self._tenant = tenant
        self._clock = clock

    # ------------------------------------------------------------ functions

    async def put_function(self, request: web.Request) -> web.Response:
        """Answer ``PUT /v1/functions/{name}``: 201 for a new version, 200 where it is the current one already."""
        name = check_name(request.match_info["name"], "function name")
        body = await self._body(request, FunctionBody)
        version, content = catalog.version_of(body.code, body.options)
        record = catalog.register(
            name=name,
            version=version,
            options=body.options,
            code_blob=await self._blobs.put(content),
            doc=body.doc,
            now=self._clock(),
        )
        known = await self._tables.functions.fetch(name)
        if known is not None and known.version == version:
            return as_json(catalog.view(known, source_of(body.code)))
        # The version first: whoever sees it as the current one must find it.
        await self._tables.versions.put(f"{name}.{version}", record)
        await self._tables.functions.put(name, record)
        return as_json(catalog.view(record, source_of(body.code)), status=201)

    async def functions(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/functions``."""
        rows = self._tables.functions.items()
        return as_json(FunctionList(functions=[catalog.view(rows[name]) for name in sorted(rows)]))

    async def function(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/functions/{name}``: with its source, for reading."""
        name = check_name(request.match_info["name"], "function name")
        found = await self._function(name)
        if found is None:
            raise NotFound(f"there is no function {name}", hint="GET /v1/functions lists them.")
        code = decode(await self._blobs.get(found.code_blob), Code)
        return as_json(catalog.view(found, source_of(code)))

    # ------------------------------------------------------------ routes

    async def put_route(self, request: web.Request) -> web.Response:
        """Answer ``PUT /v1/routes/{name}``: 201 for a new route, 200 for one that was there."""
        name = check_name(request.match_info["name"], "route name")
        route = await self._body(request, Route)
        catalog.check_route(name, route, await self._function(check_name(route.function, "function name")))
        known = await self._tables.routes.fetch(name)
        await self._tables.routes.put(name, RouteRecord(name=name, tenant=self._tenant, route=route))
        return as_json(RouteView(name=name, route=route), status=201 if known is None else 200)

    async def routes(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/routes``."""
        rows = self._tables.routes.items()
        return as_json(
            RouteList(
                routes=[
                    RouteView(name=name, route=rows[name].route)
                    for name in sorted(rows)
                    if rows[name].tenant == self._tenant
                ]
            )
        )

    async def route(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/routes/{name}``."""
        name = check_name(request.match_info["name"], "route name")
        found = self._tables.routes.get(name) or await self._tables.routes.fetch(name)
        if found is None or found.tenant != self._tenant:
            raise _no_route(name)
        return as_json(RouteView(name=name, route=found.route))

    async def delete_route(self, request: web.Request) -> web.Response:
        """Answer ``DELETE /v1/routes/{name}``: runs that it has started go on."""
        name = check_name(request.match_info["name"], "route name")
        found = await self._tables.routes.fetch(name)
        if found is None or found.tenant != self._tenant or not await self._tables.routes.delete(name):
            raise _no_route(name)
        return web.Response(status=204)

    # ------------------------------------------------------------ sites

    async def sites(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/sites``."""
        return as_json(SiteList(sites=[]))

    async def site(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/sites/{name}``."""
        name = check_name(request.match_info["name"], "site name")
        raise NotFound(f"there is no site {name}", hint="GET /v1/sites lists them.")

    # ------------------------------------------------------------ in between

    async def _function(self, name: str) -> FunctionRecord | None:
        return self._tables.functions.get(name) or await self._tables.functions.fetch(name)

    async def _body(self, request: web.Request, kind: type[S]) -> S:
        held = self._gate.enter(request)
        try:
            return read_json(await held.read(), kind)
        finally:
            held.leave()


def read_json(body: bytes, kind: type[S]) -> S:
    """Return a body that somebody wrote by hand as its type.

    Raises:
        BadRequest: it is not JSON, or not of this form; the message names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(
            f"the body is not right: {error}", hint=f"Its fields: {', '.join(kind.__struct_fields__)}."
        ) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRequest(f"the body is not JSON: {error}", hint="Send JSON.") from error
    except RecursionError as error:
        raise BadRequest("the body is not acceptable JSON: it is nested too deeply") from error


def source_of(code: Code) -> str:
    """Return the file that a function is from, for reading; the first one where its module is not among them."""
    wanted = code.module.replace(".", "/") + ".py"
    found = code.files.get(wanted)
    return next(iter(code.files.values()), "") if found is None else found


def _no_route(name: str) -> NotFound:
    return NotFound(f"there is no route {name}", hint="GET /v1/routes lists them.")
