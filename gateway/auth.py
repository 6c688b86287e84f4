"""Who comes in, and for which tenant: a bearer token, known here by its digest only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.needs import Table
from gateway.problems import NotAllowed
from headrace.errors import Unauthorized
from headrace.wire import TenantRecord
from streams.topology import DEFAULT_TENANT

_HINT = "Send the header `Authorization: Bearer TOKEN`; the embedded platform keeps its token in DIR/token."


class Caller(NamedTuple):
    """Whose request it is, and the SHA-256 (hex) of the token that said so."""

    tenant: str
    digest: str


_CALLER = web.RequestKey("caller", Caller)


def caller_of(request: web.Request) -> Caller:
    """Return who asks; only on paths that are not open."""
    return request[_CALLER]


def tenant_of(request: web.Request) -> str:
    """Return the tenant for whom a request is; only on paths that are not open."""
    return request[_CALLER].tenant


def check_operator(request: web.Request) -> None:
    """Return if the request comes from whoever runs the platform: what concerns all tenants is told to nobody else.

    Raises:
        NotAllowed: it is another tenant's.
    """
    if tenant_of(request) != DEFAULT_TENANT:
        raise NotAllowed(
            "this tells of all tenants, and is for whoever runs the platform",
            hint="Ask with the platform's own token; the embedded platform keeps it in DIR/token.",
        )


class Tokens:
    """Knows the digests of all tokens and none of the tokens; its repr tells neither.

    A token is looked up by its digest in a dict. How long that takes tells a stranger something of digests at most,
    and nobody can choose a token by its digest; so nothing has to be compared in constant time.
    """

    def __init__(self, token: str, tenants: Table[TenantRecord]) -> None:
        """Follow a table of tenants.

        Args:
            token: the platform's own, which speaks for the default tenant.
            tenants: the others.
        """
        self._own = _digest(token)
        self._tenants = tenants
        self._tenant_of: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = [self._read]
        self.forget = tenants.listen(self._changed)
        self._read()

    def listen(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` after each change of the tokens."""
        self._listeners.append(changed)

    def shared(self) -> bool:
        """Return whether there are other tenants than the default one."""
        return len(self._tenant_of) > 1

    def is_valid(self, caller: Caller) -> bool:
        """Return whether the token of a caller still speaks for his tenant."""
        return self._tenant_of.get(caller.digest) == caller.tenant

    def check(self, header: str | None) -> Caller:
        """Return whose token the value of an ``Authorization`` header carries.

        Raises:
            Unauthorized: there is no header, it is not a bearer token, or it is nobody's token.
        """
        if header is None:
            raise Unauthorized("the header Authorization is missing", hint=_HINT)
        scheme, _, given = header.partition(" ")
        digest = _digest(given.strip())
        tenant = self._tenant_of.get(digest)
        if tenant is None or scheme.lower() != "bearer":
            raise Unauthorized("the token is not valid here", hint=_HINT)
        return Caller(tenant, digest)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def _read(self) -> None:
        rows = self._tenants.items().values()
        found = {digest: row.name for row in rows if row.name != DEFAULT_TENANT for digest in row.digests}
        self._tenant_of = found | {self._own: DEFAULT_TENANT}


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def middleware(tokens: Tokens, open_paths: Collection[str]) -> Middleware:
    """Return a middleware that asks for a token everywhere but at the open paths of the route table.

    A path that is in no table is closed if it lies under ``/v1``: a new endpoint has to be opened, never closed.
    """
    opened = frozenset(open_paths)

    @web.middleware
    async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        known = resource.canonical if resource is not None else None
        if known not in opened and (known is not None or request.rel_url.path.startswith("/v1")):
            request[_CALLER] = tokens.check(request.headers.get("Authorization"))
        return await handler(request)

    return auth
