"""Server-sent events, read from a stream of bytes."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import NamedTuple

EVENT_BYTES_MAX = 64 * 1024 * 1024


class Message(NamedTuple):
    """One event of the stream as it was sent. ``id`` is the last one seen, which need not be this event's own.

    Where the server only tells where the stream stands, ``event`` is empty.
    """

    id: str
    event: str
    data: bytes


async def messages(chunks: AsyncIterable[bytes]) -> AsyncIterator[Message]:
    """Yield the events in a stream of bytes, however it is cut into chunks. Comments and half an event are dropped.

    Raises:
        ValueError: one event is larger than 64 MiB.
    """
    last_id, told_id, event = "", "", ""
    data: list[bytes] = []
    async for line in _lines(chunks):
        if not line:
            if data:
                yield Message(last_id, event or "message", b"\n".join(data))
            elif last_id != told_id:
                yield Message(last_id, "", b"")
            told_id, event, data = last_id, "", []
            continue
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            last_id = value.decode("utf-8", "replace")


async def _lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield lines without their ends, which are LF, CR LF or CR."""
    pieces: list[bytes] = []
    size = 0
    after_cr = False
    async for chunk in chunks:
        text = chunk[1:] if after_cr and chunk.startswith(b"\n") else chunk  # the CR has already ended that line
        after_cr = chunk.endswith(b"\r") if chunk else after_cr
        first, *more = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        pieces.append(first)
        size += len(first)
        for piece in more:
            yield b"".join(pieces)
            pieces, size = [piece], len(piece)
        if size > EVENT_BYTES_MAX:
            raise ValueError(f"an event of more than {EVENT_BYTES_MAX:,} bytes")
