"""Short questions to servers nearby, asked while they start and by ``headrace doctor``. No answer is an answer too."""

from __future__ import annotations

import asyncio
import contextlib

PATIENCE_S = 1.0


async def ask(host: str, port: int, request: bytes, until: bytes | None) -> bytes:
    """Send bytes and return the answer up to ``until`` (None: to its end); nothing if none comes within a second."""
    with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                return await (reader.read() if until is None else reader.readuntil(until))
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    return b""


async def http_get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Return the status and the body of a page; status 0 if nobody answers."""
    request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    head, _, body = (await ask(host, port, request, None)).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 2 and words[1].isdigit() else 0), body
