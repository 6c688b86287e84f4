"""Uploads on disk while they grow: a folder each, with what was announced, the data, and a mark per part that is there.

Nothing of an upload is kept in memory, so it survives a restart, and any gateway on the same folder can go on with it.
Writers of parts hold a shared lock on the data, completing holds it alone: once the data has been adopted under its
digest, no late writer can change it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import Struct

from gateway.needs import Store
from headrace.errors import Conflict, NotFound
from streams.blobs import ID, measure
from streams.topology import DEFAULT_TENANT

SCHEME = "blob:"


class Announced(Struct, frozen=True, kw_only=True):
    """What was said of an upload when it began, and by whom; ``expires_at`` in epoch seconds."""

    size: int
    part_bytes: int
    expires_at: float
    sha256: str | None = None
    content_type: str | None = None
    tenant: str = DEFAULT_TENANT

    @property
    def parts(self) -> int:
        """How many parts there are; none for nothing."""
        return -(-self.size // self.part_bytes)

    def part_size(self, number: int) -> int:
        """Return the bytes of a part, counted from 1; the last one may be shorter."""
        return min(self.part_bytes, self.size - (number - 1) * self.part_bytes)


class Kept(Struct, frozen=True, kw_only=True):
    """A completed upload: where it is from now on."""

    uri: str
    size: int
    sha256: str | None


class Spool:
    """The folders of all uploads. Methods block; call those that move data in a thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = store.incoming / "uploads"
        self._root.mkdir(parents=True, exist_ok=True)

    def begin(self, upload_id: str, announced: Announced, keep_s: float) -> tuple[Announced, list[str]]:
        """Make room for an upload; return its parts as they are to be, and no addresses: they come through us."""
        folder = self._root / upload_id
        folder.mkdir()
        with (folder / "data").open("wb") as data:
            data.truncate(announced.size)
        (folder / "announced").write_bytes(msgspec.json.encode(announced))
        return announced, []

    def announced(self, upload_id: str) -> Announced:
        """Return what was said of an upload.

        Raises:
            NotFound: there is none of this id, or it has expired.
        """
        if ID.fullmatch(upload_id):
            try:
                return msgspec.json.decode((self._root / upload_id / "announced").read_bytes(), type=Announced)
            except FileNotFoundError:
                pass
        raise no_upload()

    @contextmanager
    def writing(self, upload_id: str) -> Iterator[int]:
        """Lend a file descriptor to write one part with.

        Raises:
            Conflict: the upload is complete, or being completed.
        """
        with self._locked(upload_id, fcntl.LOCK_SH) as handle:
            yield handle

    def mark(self, upload_id: str, number: int) -> None:
        """Say that a part is there."""
        (self._root / upload_id / f"part-{number}").touch()

    def unmark(self, upload_id: str, number: int) -> None:
        """Say that a part is not there: it is about to be written over."""
        (self._root / upload_id / f"part-{number}").unlink(missing_ok=True)

    def complete(self, upload_id: str, tenant: str) -> Kept:
        """Check an upload against what was announced and hand it to the store. A repeat returns the same.

        Raises:
            NotFound: this tenant has begun none of this id, or it has expired.
            Conflict: parts are missing or being written, or its SHA-256 is another.
        """
        folder = self._root / upload_id
        announced = self.announced(upload_id)
        if announced.tenant != tenant:
            raise no_upload()
        try:
            return msgspec.json.decode((folder / "kept").read_bytes(), type=Kept)
        except FileNotFoundError:
            pass
        with self._locked(upload_id, fcntl.LOCK_EX) as handle:
            missing = [n for n in range(1, announced.parts + 1) if not (folder / f"part-{n}").exists()]
            if missing:
                raise Conflict(
                    f"{len(missing)} of {announced.parts} parts are missing, the first is {missing[0]}",
                    hint="PUT the missing parts, then complete again.",
                )
            digest = measure(handle)
            if announced.sha256 is not None and digest != announced.sha256:
                raise Conflict(
                    f"the content has the SHA-256 {digest}, announced was {announced.sha256}",
                    hint="Send the parts again, or begin a new upload.",
                )
            os.fsync(handle)
            kept = Kept(uri=SCHEME + digest, size=announced.size, sha256=digest)
            self._store.adopt(folder / "data", digest)
            aside = folder / "kept.new"
            aside.write_bytes(msgspec.json.encode(kept))
            aside.replace(folder / "kept")
        return kept

    def reserved(self) -> tuple[int, int]:
        """Return how many uploads are open and the bytes that they may still take on disk."""
        number = total = 0
        for folder in self._root.iterdir():
            try:
                data = (folder / "data").stat()
            except FileNotFoundError:
                continue
            number += 1
            total += max(0, data.st_size - data.st_blocks * 512)
        return number, total

    def sweep(self, now: float) -> int:
        """Remove uploads whose time is over and return how many."""
        removed = 0
        for folder in list(self._root.iterdir()):
            try:
                over = self.announced(folder.name).expires_at < now
            except (NotFound, msgspec.MsgspecError):
                over = folder.stat().st_mtime < now - 60.0  # begun and never finished being made
            if over:
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed

    @contextmanager
    def _locked(self, upload_id: str, kind: int) -> Iterator[int]:
        path = self._root / upload_id / "data"
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise _busy() from error
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            # Between opening and locking the data may have been adopted; what is locked then belongs to the store.
            if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
                raise _busy()
            yield handle
        except BlockingIOError as error:
            raise _busy() from error
        finally:
            os.close(handle)


def no_upload() -> NotFound:
    """Return the error for an upload that nobody has begun, or that has expired."""
    return NotFound("there is no such upload (any more)", hint="Begin again with POST /v1/uploads.")


def _busy() -> Conflict:
    return Conflict(
        "the upload is complete, or parts of it are being written", hint="Complete it when all parts are answered."
    )
