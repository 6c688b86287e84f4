"""How connections leave a site: straight or through its proxy, whom they trust, and how slow an answer may be.

A proxy is asked for a tunnel (``CONNECT``) by the server's name, and TLS is spoken through it with the server: it sees
names and never content. Variables such as ``https_proxy`` do not count here: what holds is what was set.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from msgspec import Struct

from headrace.errors import BadRequest
from workers.guard import Endpoint

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CONNECT_S_MAX = 10.0
SILENCE_S_MAX = 30.0
# Silence alone would let a server hold us for ever with a byte now and then.
PACE_S = 60.0
PACE_BYTES_MIN = 64 * 1024


class Cut(Exception):
    """The server went away, was busy, or said less than it promised: the same may be asked again."""


class Stopped(Exception):
    """Nobody waits for it any more."""


class Egress(Struct, frozen=True, kw_only=True):
    """One way out: ``proxy`` is its host and port, None for straight; ``tls`` says whom to trust, None: the public."""

    proxy: tuple[str, int] | None = None
    tls: ssl.SSLContext | None = None


STRAIGHT = Egress()


def proxy_of(url: str) -> tuple[str, int]:
    """Return host and port of a proxy.

    Raises:
        BadRequest: it is no address of one; proxies that are spoken to by TLS or want a password cannot be used.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "http" or parts.username or parts.path.strip("/") or parts.query:
        raise BadRequest("it is not the address of a proxy", hint="Write http://HOST:PORT.")
    return host, port


def trusting(ca_file: Path, *, public: bool) -> ssl.SSLContext:
    """Return what trusts the certificates in a PEM file, and the public ones where ``public`` says so.

    Raises:
        OSError: the file cannot be read, or holds no certificates (``ssl.SSLError``).
    """
    if not public:
        return ssl.create_default_context(cafile=ca_file)
    tls = ssl.create_default_context()
    tls.load_verify_locations(ca_file)
    return tls


class Connection(http.client.HTTPConnection):
    """A connection to the addresses that were judged, whatever the name means by now; or to the proxy's idea of it."""

    def __init__(self, endpoint: Endpoint, egress: Egress, stopped: threading.Event) -> None:
        super().__init__(endpoint.host, endpoint.port, timeout=SILENCE_S_MAX)
        self._endpoint = endpoint
        self._egress = egress
        self._answer = partial(_Answer, stopped)
        self.response_class = self._answer  # type: ignore[assignment]

    def connect(self) -> None:
        """Connect to the first address that answers, or by the proxy.

        Raises:
            Cut: the proxy does not answer, or cannot reach the server.
            BadRequest: the proxy refuses.
            OSError: the server does not answer, or is not who it says.
        """
        sock = self._reach()
        try:
            sock.settimeout(SILENCE_S_MAX)
            if not self._endpoint.addresses:
                self._tunnel_through(sock)
            if self._endpoint.scheme == "https":
                sock = (self._egress.tls or _public()).wrap_socket(sock, server_hostname=self._endpoint.host)
        except BaseException:
            sock.close()
            raise
        self.sock = sock

    def _reach(self) -> socket.socket:
        if self._endpoint.addresses:
            return _first(self._endpoint.addresses, self._endpoint.port)
        if self._egress.proxy is None:
            raise Cut("there is no proxy to ask")
        try:
            return socket.create_connection(self._egress.proxy, CONNECT_S_MAX)
        except OSError as error:
            raise Cut(f"the proxy of this site does not answer: {error}") from error

    def _tunnel_through(self, sock: socket.socket) -> None:
        host = self._endpoint.host
        there = f"[{host}]:{self._endpoint.port}" if ":" in host else f"{host}:{self._endpoint.port}"
        sock.sendall(f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\nUser-Agent: headrace\r\n\r\n".encode("ascii"))
        answer = self._answer(sock, method="CONNECT")
        try:
            answer.begin()
        except (OSError, http.client.HTTPException) as error:
            raise Cut(f"the proxy of this site says nothing that can be understood: {error!r}") from error
        finally:
            answer.close()
        if answer.status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            raise BadRequest("the proxy of this site wants a password", hint="Name one that lets this machine through.")
        if answer.status >= 500 or answer.status == http.HTTPStatus.TOO_MANY_REQUESTS:
            raise Cut(f"the proxy of this site answers {answer.status} for {host}")
        if answer.status >= 300:
            raise BadRequest(
                f"the proxy of this site does not lead to {host}: it answers {answer.status}",
                hint="Ask the site to allow that server, or use another.",
            )


class _Answer(http.client.HTTPResponse):
    """An answer that may be slow, but not endlessly so."""

    def __init__(self, stopped: threading.Event, sock: socket.socket, *rest: Any, **more: Any) -> None:
        super().__init__(sock, *rest, **more)
        self.fp = io.BufferedReader(_Paced(self.fp.detach(), stopped))


class _Paced(io.RawIOBase):
    """What comes over a line, for as long as it comes quickly enough and somebody waits for it."""

    def __init__(self, line: io.RawIOBase, stopped: threading.Event) -> None:
        self._line = line
        self._stopped = stopped
        self._waited_s = 0.0
        self._came = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self._stopped.is_set():
            raise Stopped
        began = time.monotonic()
        count = self._line.readinto(buffer)
        # Our own pauses are not counted: a disk that is slow is no fault of the server.
        self._waited_s += time.monotonic() - began
        self._came += count or 0
        if self._waited_s > PACE_S:
            if self._came < PACE_BYTES_MIN:
                raise TimeoutError(f"it sends less than {PACE_BYTES_MIN:,} bytes in {PACE_S:g} s")
            self._waited_s, self._came = 0.0, 0
        return count

    def close(self) -> None:
        self._line.close()
        super().close()


@cache
def _public() -> ssl.SSLContext:
    return ssl.create_default_context()


def _first(addresses: tuple[str, ...], port: int) -> socket.socket:
    """Return a connection to the first address that answers."""
    for number, address in enumerate(addresses):
        try:
            return socket.create_connection((address, port), CONNECT_S_MAX)
        except OSError:
            if number + 1 == len(addresses):
                raise
    raise OSError("there is no address")
