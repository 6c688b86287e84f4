"""An HTTP load generator that leaves the machine to what it measures: fixed requests, many connections, no parsing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import NamedTuple, cast


class Sent(NamedTuple):
    """What came of a run of requests: per second, latencies in seconds in order of their ends, and other statuses."""

    per_s: float
    latencies_s: list[float]
    refused: int


class _Connection(asyncio.Protocol):
    """Sends one request after the other and reads just enough of each answer to know where it ends."""

    def __init__(self, requests: Iterator[bytes], expect: bytes, result: _Result) -> None:
        self._requests = requests
        self._expect = b"HTTP/1.1 " + expect
        self._result = result
        self._buffer = bytearray()
        self._began = 0.0
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own does not inherit from it
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(self._buffer[:head_end]).lower()
        at = head.find(b"content-length: ")
        length = int(head[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._buffer) < head_end + 4 + length:
            return
        self._result.latencies_s.append(time.perf_counter() - self._began)
        if not self._buffer.startswith(self._expect):
            self._result.refused += 1
        del self._buffer[: head_end + 4 + length]
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the gateway closed the connection"))

    def _next(self) -> None:
        request = next(self._requests, None)
        if self._transport is None:
            return
        if request is None:
            if not self.done.done():
                self.done.set_result(None)
            self._transport.close()
            return
        self._began = time.perf_counter()
        self._transport.write(request)


class _Result:
    def __init__(self) -> None:
        self.latencies_s: list[float] = []
        self.refused = 0


def request(host: str, token: str, path: str, body: bytes, content_type: str, *headers: str) -> bytes:
    """Return the bytes of one POST."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        f"Authorization: Bearer {token}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *headers,
        "\r\n",
    ]
    return "\r\n".join(lines).encode() + body


async def send(host: str, port: int, requests: Iterator[bytes], *, in_flight: int, expect: bytes = b"202") -> Sent:
    """Send all requests with so many in flight and return what came of them."""
    loop = asyncio.get_running_loop()
    result = _Result()
    began = time.perf_counter()
    connections = []
    for _ in range(in_flight):
        _, connection = await loop.create_connection(lambda: _Connection(requests, expect, result), host, port)
        connections.append(connection.done)
    await asyncio.gather(*connections)
    took_s = time.perf_counter() - began
    return Sent(len(result.latencies_s) / took_s, result.latencies_s, result.refused)


def quantile(values: list[float], q: float) -> float:
    """Return the value below which a share ``q`` of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]
