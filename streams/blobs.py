"""Bytes by their SHA-256: what is too large for the log, the code of functions, the files of users.

The embedded store is a folder, the one of a lab a bucket (``streams.s3``); content never changes under its name, so a
copy is a copy for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from msgspec import Struct

from headrace.errors import BadRequest, NotFound
from headrace.wire import Payload
from streams.topology import INLINE_BYTES_MAX

DIGEST = re.compile("[0-9a-f]{64}")
ID = re.compile("[0-9a-f]{32}")
_READ_BYTES = 1 << 20


class Link(Struct, frozen=True, kw_only=True):
    """The way to bytes on a server: ``name`` is what people may see of it.

    ``address`` returns a URL to GET them from, good for a while; it is itself the permission, so it is never shown.
    """

    name: str
    address: Callable[[], str]


class Blobs(Protocol):
    """A store of bytes by content. What ``put`` returned stays readable and is on disk when it returns."""

    async def put(self, body: bytes) -> str:
        """Keep the bytes and return their SHA-256 in hex."""

    async def get(self, digest: str) -> bytes:
        """Return the bytes.

        Raises:
            NotFound: there are none of this digest.
        """

    async def put_file(self, path: Path) -> str:
        """Keep a copy of a file and return its SHA-256 in hex."""

    async def where(self, name: str) -> Path | Link:
        """Return where bytes lie: a local file, not to be written to, or the way to a server that has them.

        Args:
            name: their digest, or the id of an upload that went straight to the store.

        Raises:
            NotFound: there are none of this name.
        """


class FolderBlobs:
    """The store as a folder: ``ab/abcdef...`` written aside, synced, then renamed into place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)

    async def put(self, body: bytes) -> str:
        """Keep the bytes and return their SHA-256 in hex."""
        return await asyncio.to_thread(self._put, body)

    async def get(self, digest: str) -> bytes:
        """Return the bytes; NotFound where there are none."""
        return await asyncio.to_thread((await self.where(digest)).read_bytes)

    async def put_file(self, path: Path) -> str:
        """Keep a copy of a file and return its SHA-256 in hex."""
        return await asyncio.to_thread(self._put_file, path)

    async def where(self, name: str) -> Path:
        """Return the file that holds the bytes; NotFound where there are none."""
        place = self._place(name)
        if not place.is_file():
            raise NotFound(f"no content with the digest {name}", hint="Upload it again; it may have been cleaned up.")
        return place

    def adopt(self, path: Path, digest: str) -> None:
        """Move a finished file from ``incoming`` into its place; its digest was checked by the caller."""
        place = self._place(digest)
        place.parent.mkdir(exist_ok=True)
        path.chmod(0o444)
        path.replace(place)
        _sync_folder(place.parent)

    def _place(self, digest: str) -> Path:
        check_digest(digest)
        return self.root / digest[:2] / digest

    def _put(self, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        if self._place(digest).is_file():
            return digest
        with self._aside() as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
            self.adopt(Path(file.name), digest)
        return digest

    def _put_file(self, path: Path) -> str:
        digest = hashlib.sha256()
        with self._aside() as copy, open_regular(path) as source:
            while chunk := os.read(source, _READ_BYTES):
                digest.update(chunk)
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
            self.adopt(Path(copy.name), digest.hexdigest())
        return digest.hexdigest()

    @contextmanager
    def _aside(self) -> Iterator[IO[bytes]]:
        """Lend a file to write to; it is gone again if that fails, as it does on a full disk."""
        handle, name = tempfile.mkstemp(dir=self.incoming)
        try:
            with open(name, "wb", opener=lambda *_: handle) as file:
                yield file
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def check_digest(digest: str) -> None:
    """Refuse what is no SHA-256 in hex; NotFound, for there can be nothing under it."""
    if not DIGEST.fullmatch(digest):
        raise NotFound(f"{ascii(digest)[:80]} is not a digest", hint="A digest is 64 hexadecimal digits.")


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Lend a descriptor to read a file with; anything but a regular file is refused, and a pipe not waited for.

    Raises:
        BadRequest: it is no regular file.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadRequest(f"{path} is no regular file", hint="Name a file.")
        yield handle
    finally:
        os.close(handle)


def measure(handle: int) -> str:
    """Return the SHA-256 in hex of an open file, from its beginning."""
    found, at = hashlib.sha256(), 0
    while chunk := os.pread(handle, _READ_BYTES, at):
        found.update(chunk)
        at += len(chunk)
    return found.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the name lives in the folder, and the folder has to reach the disk too."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def check_in(payload: Payload, blobs: Blobs) -> Payload:
    """Return the payload as the log may hold it: its body in the store if it is larger than 64 KiB (a claim check)."""
    if len(payload.body) <= INLINE_BYTES_MAX:
        return payload
    return Payload(type=payload.type, blob=await blobs.put(payload.body), size=len(payload.body))


async def check_out(payload: Payload, blobs: Blobs) -> bytes:
    """Return the body of a payload, wherever it lies."""
    return payload.body if payload.blob is None else await blobs.get(payload.blob)
