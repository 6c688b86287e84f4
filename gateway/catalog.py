"""Functions and routes over HTTP. Code is kept as bytes here; only a worker's child opens it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from functions import catalog
from gateway.auth import tenant_of
from gateway.gate import Gate
from gateway.needs import Tables
from gateway.runs import as_json
from headrace.errors import BadRequest, NotFound
from headrace.model import Code, FunctionOptions, FunctionView, Route, RouteView
from headrace.names import check_name
from headrace.wire import ForecastRow, FunctionRecord, RouteRecord, decode
from streams.blobs import Blobs
from streams.tables import row_key

S = TypeVar("S", bound=Struct)
R = TypeVar("R", FunctionRecord, RouteRecord)


class FunctionBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``PUT /v1/functions/{name}`` takes; ``blob`` in the code is base64."""

    code: Code
    options: FunctionOptions = FunctionOptions()
    doc: str = ""


class FunctionList(Struct, frozen=True, kw_only=True):
    """All functions that the caller's tenant has registered, by name, without their source."""

    functions: list[FunctionView]


class RouteList(Struct, frozen=True, kw_only=True):
    """All routes that the caller's tenant has registered, by name."""

    routes: list[RouteView]


class Catalog:
    """The endpoints under ``/v1/functions`` and ``/v1/routes``.

    Functions and routes belong to who registered them: others neither see them nor run them, and may have their own of
    the same name.
    """

    def __init__(self, *, tables: Tables, blobs: Blobs, gate: Gate, clock: Callable[[], float] = time.time) -> None:
        self._tables = tables
        self._blobs = blobs
        self._gate = gate
        self._clock = clock

    # ------------------------------------------------------------ functions

    async def put_function(self, request: web.Request) -> web.Response:
        """Answer ``PUT /v1/functions/{name}``: 201 for a new version, 200 where it is the current one already."""
        name = check_name(request.match_info["name"], "function name")
        body = await self._body(request, FunctionBody)
        version, content = catalog.version_of(body.code, body.options)
        await self._check_ladder(tenant_of(request), name, body.options)
        record = catalog.register(
            name=name,
            version=version,
            options=body.options,
            code_blob=await self._blobs.put(content),
            doc=body.doc,
            now=self._clock(),
            tenant=tenant_of(request),
        )
        key = row_key(record.tenant, name)
        known = await self._tables.functions.fetch(key)
        if known is not None and known.version == version:
            return as_json(catalog.view(known, source_of(body.code)))
        # The version first: whoever sees it as the current one must find it.
        await self._tables.versions.put(f"{key}.{version}", record)
        await self._tables.functions.put(key, record)
        return as_json(catalog.view(record, source_of(body.code)), status=201)

    async def functions(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/functions``."""
        mine = _of(tenant_of(request), self._tables.functions.items().values())
        return as_json(FunctionList(functions=[catalog.view(one, learned=self._learned(one)) for one in mine]))

    async def function(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/functions/{name}``: with its source, for reading."""
        name = check_name(request.match_info["name"], "function name")
        found = await self._function(tenant_of(request), name)
        if found is None:
            raise NotFound(f"there is no function {name}", hint="GET /v1/functions lists them.")
        code = decode(await self._blobs.get(found.code_blob), Code)
        return as_json(catalog.view(found, source_of(code), self._learned(found)))

    def _learned(self, record: FunctionRecord) -> ForecastRow | None:
        return self._tables.forecasts.get(row_key(record.tenant, record.name))

    # ------------------------------------------------------------ routes

    async def put_route(self, request: web.Request) -> web.Response:
        """Answer ``PUT /v1/routes/{name}``: 201 for a new route, 200 for one that was there."""
        name = check_name(request.match_info["name"], "route name")
        route = await self._body(request, Route)
        tenant = tenant_of(request)
        function = await self._function(tenant, check_name(route.function, "function name"))
        functions = _of(tenant, self._tables.functions.items().values())
        ladders = any(each.options.variants for each in ([function] if function else []) + functions)
        catalog.check_route(name, route, function, ladders=ladders)
        known = await self._tables.routes.fetch(row_key(tenant, name))
        await self._tables.routes.put(row_key(tenant, name), RouteRecord(name=name, tenant=tenant, route=route))
        return as_json(RouteView(name=name, route=route), status=201 if known is None else 200)

    async def routes(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/routes``."""
        mine = _of(tenant_of(request), self._tables.routes.items().values())
        return as_json(RouteList(routes=[RouteView(name=record.name, route=record.route) for record in mine]))

    async def route(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/routes/{name}``."""
        name = check_name(request.match_info["name"], "route name")
        key = row_key(tenant_of(request), name)
        found = self._tables.routes.get(key) or await self._tables.routes.fetch(key)
        if found is None:
            raise _no_route(name)
        return as_json(RouteView(name=name, route=found.route))

    async def delete_route(self, request: web.Request) -> web.Response:
        """Answer ``DELETE /v1/routes/{name}``: runs that it has started go on."""
        name = check_name(request.match_info["name"], "route name")
        if not await self._tables.routes.delete(row_key(tenant_of(request), name)):
            raise _no_route(name)
        return web.Response(status=204)

    # ------------------------------------------------------------ in between

    async def _check_ladder(self, tenant: str, name: str, options: FunctionOptions) -> None:
        others = {record.name: record for record in _of(tenant, self._tables.functions.items().values())}
        for each in options.variants:  # another gateway may have registered it just now
            found = await self._function(tenant, check_name(each, "variant"))
            if found is not None:
                others[each] = found
        catalog.check_ladder(name, options, others)

    async def _function(self, tenant: str, name: str) -> FunctionRecord | None:
        key = row_key(tenant, name)
        return self._tables.functions.get(key) or await self._tables.functions.fetch(key)

    async def _body(self, request: web.Request, kind: type[S]) -> S:
        held = self._gate.enter(request)
        try:
            return read_json(await held.read(), kind)
        finally:
            held.leave()


def _of(tenant: str, records: Iterable[R]) -> list[R]:
    """Return the records of a tenant by name."""
    return sorted((record for record in records if record.tenant == tenant), key=lambda record: record.name)


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
