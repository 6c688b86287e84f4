"""Who may come in: one bearer token, compared by digest in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from headrace.errors import Unauthorized

_HINT = "Send the header `Authorization: Bearer TOKEN`; the embedded platform keeps its token in DIR/token."


class TokenCheck:
    """Knows the digest of the token and not the token; its repr tells neither."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()

    def check(self, header: str | None) -> None:
        """Return if the value of an ``Authorization`` header carries the token.

        Raises:
            Unauthorized: there is no header, it is not a bearer token, or it is another token.
        """
        if header is None:
            raise Unauthorized("the header Authorization is missing", hint=_HINT)
        scheme, _, given = header.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        # The comparison is made even for a wrong scheme, so that all refusals take the same time.
        if not hmac.compare_digest(digest, self._digest) or scheme.lower() != "bearer":
            raise Unauthorized("the token is not valid here", hint=_HINT)


def middleware(check: TokenCheck, open_paths: Collection[str]) -> Middleware:
    """Return a middleware that asks for the token everywhere but at the open paths of the route table.

    A path that is in no table is closed if it lies under ``/v1``: a new endpoint has to be opened, never closed.
    """
    opened = frozenset(open_paths)

    @web.middleware
    async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        known = resource.canonical if resource is not None else None
        if known not in opened and (known is not None or request.rel_url.path.startswith("/v1")):
            check.check(request.headers.get("Authorization"))
        return await handler(request)

    return auth
