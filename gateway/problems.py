"""Errors become HTTP here and nowhere else, as RFC 9457 writes them, with a hint that holds the cure.

``MEANINGS`` is the table: a class of errors, its status, and the last part of the problem's ``type``, which is stable.
"""

from __future__ import annotations

import errno
import logging
import math
from http import HTTPStatus
from typing import NamedTuple

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from multidict import CIMultiDict

from headrace.errors import (
    BadName,
    BadRequest,
    Conflict,
    HeadraceError,
    Infeasible,
    NotFound,
    Overloaded,
    RunFailed,
    RunRetracted,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from headrace.model import Problem, Quote, Refusal

_log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
URN = "urn:headrace:problem:"
INSTANCE_CHARS_MAX = 256


class Unreadable(BadRequest):
    """The body is in a format or charset that is not read here."""

    title = "This format is not supported"


class KeyReused(Conflict):
    """The same event id came again with another body."""

    title = "This id was used for something else"


class Busy(Overloaded):
    """The gateway itself has too much in its hands; the caller is not to blame."""

    title = "The gateway has its hands full"


class Over(Conflict):
    """What this is about has ended, and nothing more is heard of it."""

    title = "It has ended"


class NotAllowed(Unauthorized):
    """The token is good, and not for this."""

    title = "Not allowed"


class Meaning(NamedTuple):
    """How an error is told over HTTP."""

    status: int
    slug: str


MEANINGS: dict[type[HeadraceError], Meaning] = {
    BadRequest: Meaning(400, "bad-request"),
    BadName: Meaning(400, "bad-name"),
    Unreadable: Meaning(415, "unsupported-format"),
    TooLarge: Meaning(413, "too-large"),
    Unauthorized: Meaning(401, "unauthorized"),
    NotAllowed: Meaning(403, "not-allowed"),
    NotFound: Meaning(404, "not-found"),
    Conflict: Meaning(409, "conflict"),
    Infeasible: Meaning(409, "infeasible"),
    KeyReused: Meaning(422, "key-reused"),
    Over: Meaning(410, "over"),
    Overloaded: Meaning(429, "overloaded"),
    Busy: Meaning(503, "busy"),
    Unavailable: Meaning(503, "unavailable"),
    RunFailed: Meaning(410, "run-failed"),
    RunRetracted: Meaning(410, "run-retracted"),
    HeadraceError: Meaning(500, "internal"),
}

_HINTS: dict[int, str] = {
    404: "GET /openapi.json lists every path.",
    405: "The header Allow lists the methods that this path takes.",
    408: "Send the whole body without long pauses.",
    413: "Send large data with POST /v1/uploads and pass its URI as dataref.",
}


def meaning_of(error: HeadraceError) -> Meaning:
    """Return how an error is told: by its own class, else by the nearest one above it."""
    for kind in type(error).__mro__:
        found = MEANINGS.get(kind)
        if found is not None:
            return found
    return MEANINGS[HeadraceError]


def body(
    *, slug: str, title: str, status: int, detail: str, hint: str = "", instance: str = "", quote: Quote | None = None
) -> bytes:
    """Return the JSON of a problem; text that UTF-8 cannot say is shown with question marks."""
    problem = Problem(
        type=URN + slug,
        title=title,
        status=status,
        detail=_sayable(detail),
        hint=_sayable(hint),
        instance=_sayable(instance)[:INSTANCE_CHARS_MAX] if instance else msgspec.UNSET,
        quote=quote or msgspec.UNSET,
    )
    return msgspec.json.encode(problem)


def _sayable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def refusal(error: HeadraceError) -> Refusal:
    """Return what this error would be told as, for those who ask before they send."""
    status = meaning_of(error).status
    return Refusal(status=status, title=error.title, detail=_sayable(str(error)), hint=_sayable(error.hint))


def respond(error: HeadraceError, request: web.BaseRequest) -> web.Response:
    """Return the response that tells this error."""
    status, slug = meaning_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="headrace"'
    content = body(
        slug=slug,
        title=error.title,
        status=status,
        detail=str(error),
        hint=error.hint,
        instance=request.rel_url.raw_path,
        quote=error.quote if isinstance(error, Infeasible) else None,
    )
    return web.Response(status=status, body=content, content_type=MEDIA_TYPE, headers=headers)


def _respond_http(error: web.HTTPException, request: web.BaseRequest) -> web.Response:
    """Tell what aiohttp itself refuses (404, 405, 413, ...), and keep headers such as Allow."""
    headers = CIMultiDict(error.headers)
    headers.popall("Content-Type", None)
    headers.popall("Content-Length", None)
    path = request.rel_url.raw_path[:INSTANCE_CHARS_MAX]
    details = {
        404: f"there is nothing at {path}",
        405: f"{request.method} is not possible at {path}",
        413: "the body is larger than the limit",
    }
    title = error.reason or HTTPStatus(error.status).phrase
    content = body(
        slug=title.lower().replace(" ", "-"),
        title=title,
        status=error.status,
        detail=details.get(error.status, title),
        hint=_HINTS.get(error.status, ""),
        instance=path,
    )
    return web.Response(status=error.status, body=content, content_type=MEDIA_TYPE, headers=headers)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into its problem. What nobody foresaw is logged in full and told without a stack trace."""
    try:
        return await handler(request)
    except HeadraceError as error:
        if meaning_of(error).status == 500:
            _log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        return respond(error, request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _respond_http(error, request)
    except HttpProcessingError as error:  # a body that breaks HTTP's own coding: gzip, chunks
        return respond(BadRequest(f"the body is not well-formed HTTP: {error.message}"), request)
    except web.RequestPayloadError as error:
        return respond(BadRequest(f"the body could not be read: {error}", hint="Send it again."), request)
    except ConnectionError:
        raise  # the client is gone; nobody reads an answer
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _respond_unforeseen(request)
        full = Unavailable("the disk of the platform is full", hint="Send it again in a while.", retry_after_s=30)
        return respond(full, request)
    except Exception:
        return _respond_unforeseen(request)


def _respond_unforeseen(request: web.Request) -> web.Response:
    """Log the error that is being handled in full, and tell that there was one."""
    _log.exception("%s %s failed", request.method, request.rel_url.raw_path)
    content = body(
        slug="internal",
        title="Something went wrong",
        status=500,
        detail="the gateway met an error that nobody foresaw; its log says more",
        hint="Send it again; if it fails again, show the operator the time and the path.",
        instance=request.rel_url.raw_path,
    )
    return web.Response(status=500, body=content, content_type=MEDIA_TYPE)
