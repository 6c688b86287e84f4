"""Reading stretches of what a server holds: one HTTP connection at a time, to addresses that were judged.

These are blocking connections for threads. Bytes go from the socket into a buffer that is used again and again, so the
memory stays flat whatever the size; nothing is decoded on the way.
"""

from __future__ import annotations

import http.client
import re
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote, urljoin, urlsplit

from msgspec import Struct

from headrace.errors import BadRequest, HeadraceError, NotFound
from workers.egress import STRAIGHT, Connection, Cut, Egress
from workers.guard import PORTS, Endpoint, Guard

REDIRECTS_MAX = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")


class Changed(Exception):
    """What lies under the address is no longer what it was when the transfer began."""


class Source(Struct, frozen=True, kw_only=True):
    """Something to fetch.

    ``name`` is what people may see of it; ``address`` returns where to GET it from at this moment, which may be signed
    and so is never shown; ``guard`` judges each address, None for the operator's own store; ``egress`` leads there.
    """

    name: str
    address: Callable[[], str]
    guard: Guard | None = None
    egress: Egress = STRAIGHT


class Reply(Struct, kw_only=True):
    """The head of an answer: ``start`` is where its bytes begin, ``size`` that of the whole (None: not told)."""

    response: http.client.HTTPResponse
    start: int
    size: int | None
    etag: str
    ranged: bool


class Line:
    """One connection of one thread, kept for as long as it leads to the server that is wanted."""

    def __init__(self, stopped: threading.Event) -> None:
        """Open nothing yet; ``stopped`` is set when nobody waits for what it brings any more."""
        self._stopped = stopped
        self._connection: Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._to: Endpoint | None = None

    def close(self) -> None:
        """Close it. Safe to repeat; the next ``get`` opens another."""
        connection, self._connection, self._to = self._connection, None, None
        response, self._response = self._response, None
        if response is not None:  # it has taken the socket over where the server keeps no connections
            response.close()
        if connection is not None:
            connection.close()

    def get(self, source: Source, start: int, end: int, etag: str = "") -> Reply:
        """Ask for the bytes from ``start`` to before ``end`` and return the head of the answer.

        Raises:
            Cut: no answer, or a busy server.
            Changed: the content is not that of ``etag`` any more.
            NotFound: there is nothing under the address.
            BadRequest: the address may not be fetched, or the server refuses.
        """
        url = source.address()
        for _ in range(REDIRECTS_MAX + 1):
            response = self._ask(source, url, start, end, etag)
            if response.status not in _REDIRECTS:
                return self._judge(source, response, start)
            self.close()
            url = _target(source, url, response.getheader("Location") or "")
        raise BadRequest(f"{source.name} redirects more than {REDIRECTS_MAX} times", hint="Use a direct address.")

    def _ask(self, source: Source, url: str, start: int, end: int, etag: str) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        endpoint = self._endpoint(source, url)
        port = "" if endpoint.port == PORTS[endpoint.scheme] else f":{endpoint.port}"
        headers = {
            "Host": (f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host) + port,
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": "headrace",
            **({"If-Match": etag} if etag.startswith('"') else {}),
        }
        try:
            kept = self._connection is not None and self._to == endpoint
            connection = self._open(endpoint, source.egress)
            try:
                connection.request("GET", path, headers=headers)
                self._response = connection.getresponse()
            except (OSError, http.client.HTTPException):
                if not kept:
                    raise
                self.close()  # a kept connection may have been closed at the other end long ago
                connection = self._open(endpoint, source.egress)
                connection.request("GET", path, headers=headers)
                self._response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise BadRequest(
                f"{endpoint.host} is not who it says: {error.verify_message}",
                hint="Use the name that its certificate is for, or have that mended; an operator has own certificates "
                "trusted with HEADRACE_STAGE_CA_FILE, those of the S3 server with HEADRACE_S3_CA_FILE.",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Cut(str(error) or type(error).__name__) from error
        except BaseException:
            self.close()
            raise
        return self._response

    def _endpoint(self, source: Source, url: str) -> Endpoint:
        if source.guard is None:
            return _own(url, source.egress)
        # What is connected was judged, and leads where it led then: no name has to be asked for each stretch.
        return self._to if self._to is not None and self._to.is_of(url) else source.guard.endpoint(url)

    def _open(self, endpoint: Endpoint, egress: Egress) -> Connection:
        if self._connection is None or self._to != endpoint:
            self.close()
            self._connection, self._to = Connection(endpoint, egress, self._stopped), endpoint
        return self._connection

    def _judge(self, source: Source, response: http.client.HTTPResponse, start: int) -> Reply:
        status, etag = response.status, response.getheader("ETag") or ""
        told = _RANGE.fullmatch(response.getheader("Content-Range") or "")
        if (
            status == 416 and start == 0
        ):  # only of nothing at all is there no first byte; not every server tells its size
            return Reply(response=_read(response), start=0, size=0, etag=etag, ranged=True)
        if status not in (200, 206):
            reason = f"{source.name}: the server answers {status}"
            _read(response)
            self.close()
            raise _refusal(status, reason)
        if response.getheader("Content-Encoding", "identity") != "identity":
            self.close()
            raise BadRequest(f"{source.name} comes compressed", hint="Nothing is unpacked here; offer it as it is.")
        if status == 200:
            return Reply(response=response, start=0, size=response.length, etag=etag, ranged=False)
        if told is None or told[1] is None or int(told[1]) != start:
            self.close()
            raise Cut("the answer is for another stretch")
        return Reply(response=response, start=start, size=int(told[3]), etag=etag, ranged=True)


def _target(source: Source, url: str, location: str) -> str:
    """Return where a redirect leads, if one may go there at all; the address itself is judged like a first one."""
    if source.guard is None:
        raise BadRequest(f"{source.name}: the store redirects", hint="Name the store's own address.")
    try:
        target = urljoin(url, location)
        scheme = urlsplit(target).scheme
    except ValueError as error:
        raise BadRequest(
            f"{source.name} redirects to what is no address", hint="Use the address of the content."
        ) from error
    if urlsplit(url).scheme == "https" and scheme != "https":
        raise BadRequest(f"{source.name} redirects away from https", hint="Use the address that it leads to.")
    return quote(target, safe="%/:=&?~#+!$,;'@()*[]", errors="replace")


def _own(url: str, egress: Egress) -> Endpoint:
    """Return the operator's own server, which nobody has to judge."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return Endpoint(
        scheme=parts.scheme,
        host=host,
        port=parts.port or PORTS[parts.scheme],
        addresses=(host,) if egress.proxy is None else (),
    )


def _read(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    """Read what little there is, so that the connection can be used again."""
    with suppress(OSError, http.client.HTTPException):
        response.read(64 * 1024)
    return response


def _refusal(status: int, reason: str) -> Exception:
    if status in _BUSY:
        return Cut(reason)
    if status == 412:
        return Changed(reason)
    if status in (404, 410):
        return NotFound(reason, hint="Check the URI; it may have been cleaned up.")
    error: HeadraceError = BadRequest(reason, hint="It must be readable without a login, or its address be signed.")
    return error
