"""Large data on its way to the platform: measured first, then sent in the parts that the platform asks for."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from headrace.errors import BadRequest
from headrace.following import read
from headrace.transport import Answer, Transport
from headrace.wire import BYTES, JSON

_CHUNK_BYTES = 1024 * 1024


class Part(Struct):
    """One part: PUT exactly ``size`` bytes to ``url``; the address itself is the permission."""

    url: str
    size: int


class Offer(Struct):
    """What the platform answers to the announcement."""

    upload_id: str
    parts: list[Part]


class Complete(Struct):
    """What the platform answers when everything is there."""

    uri: str


class Measured(NamedTuple):
    """What is to be sent, and what it has to be when it arrives."""

    content: Path | bytes
    size: int
    sha256: str


async def upload(http: Transport, content: str | Path | bytes, content_type: str | None = None) -> str:
    """Upload a file or bytes and return the URI.

    Raises:
        BadRequest: there is no such file, or it changed on the way.
        TooLarge: it is larger than the platform takes.
    """
    measured = await asyncio.to_thread(measure, content)
    wanted = {"size": measured.size, "sha256": measured.sha256, "content_type": content_type}
    offer = read(await _say(http, "/v1/uploads", {k: v for k, v in wanted.items() if v is not None}), Offer)
    start = 0
    for part in offer.parts:
        headers = {"Content-Length": str(part.size), "Content-Type": BYTES}
        body = piece(measured.content, start, start + part.size)
        await http.ask("PUT", part.url, body=body, headers=headers)
        start += part.size
    # By path and not by the link: the token goes to the address that the user gave, whatever the platform calls itself.
    return read(await _say(http, f"/v1/uploads/{offer.upload_id}/complete", {}), Complete).uri


async def _say(http: Transport, path: str, body: object) -> Answer:
    return await http.ask("POST", path, body=msgspec.json.encode(body), headers={"Content-Type": JSON})


def measure(content: str | Path | bytes) -> Measured:
    """Return the size and the SHA-256 of a file or of bytes.

    Raises:
        BadRequest: there is no such file.
    """
    if isinstance(content, bytes):
        return Measured(content, len(content), hashlib.sha256(content).hexdigest())
    path = Path(content)
    if not path.is_file():
        raise BadRequest(f"there is no file {path}", hint="Name a file to upload.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Measured(path, file.tell(), digest)


def piece(content: Path | bytes, start: int, end: int) -> Callable[[], AsyncIterator[bytes]]:
    """Return what makes a stream of the bytes from ``start`` to ``end``, as often as it is asked to."""

    async def chunks() -> AsyncIterator[bytes]:
        if isinstance(content, bytes):
            for at in range(start, end, _CHUNK_BYTES):
                yield content[at : min(end, at + _CHUNK_BYTES)]
            return
        with content.open("rb") as file:
            file.seek(start)
            left = end - start
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk

    return chunks
