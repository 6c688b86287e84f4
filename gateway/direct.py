"""Uploads whose parts go straight to a bucket, by addresses that are signed for them: no byte of them passes here.

What arrived is checked without being read back: the server itself refuses a part that is not of the size its address
was signed for, and completing compares what it has with what was announced. A SHA-256 that was announced goes into the
URI; whoever stages the upload checks it and refuses what differs. Once complete, an upload cannot be changed any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct, structs

from gateway.spool import SCHEME, Announced, Kept, no_upload
from headrace.errors import Conflict, NotFound
from streams.blobs import ID

if TYPE_CHECKING:
    from streams.s3 import Bucket

UPLOADS = "uploads/"
ANNOUNCED = "announced/"
PART_BYTES_MIN = 5 * 1024 * 1024  # the least that S3 takes, but for the last one
FORGET_S = 86400.0
BEGINNING_S = 60.0


class Begun(Struct, frozen=True, kw_only=True):
    """An upload as it is kept in the bucket: what was announced, and the bucket's own id for it."""

    announced: Announced
    native: str


class Direct:
    """All uploads to one bucket. Nothing is kept in memory; methods block, call them in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def begin(self, upload_id: str, announced: Announced, keep_s: float) -> tuple[Announced, list[str]]:
        """Make room for an upload; return its parts as they have to be, and an address for each."""
        announced = structs.replace(announced, part_bytes=max(announced.part_bytes, PART_BYTES_MIN))
        key = UPLOADS + upload_id
        native = self._bucket.begin(key) if announced.size else ""
        begun = Begun(announced=announced, native=native)
        self._bucket.put(ANNOUNCED + upload_id, msgspec.json.encode(begun))
        numbers = range(1, announced.parts + 1)
        return announced, [self._bucket.link_part(key, native, n, announced.part_size(n), keep_s) for n in numbers]

    def complete(self, upload_id: str, tenant: str) -> Kept:
        """Check an upload against what was announced and make it an object. A repeat returns the same.

        Raises:
            NotFound: this tenant has begun none of this id, or it has expired.
            Conflict: parts are missing, or of another size.
        """
        begun = self._begun(upload_id)
        if begun.announced.tenant != tenant:
            raise no_upload()
        key, announced = UPLOADS + upload_id, begun.announced
        if self._bucket.size(key) is None:
            if announced.size:
                self._finish(key, begun)
            else:
                self._bucket.put(key, b"")
        if (size := self._bucket.size(key)) != announced.size:
            raise Conflict(f"{size:,} bytes arrived, announced were {announced.size:,}", hint="Begin a new upload.")
        digest = "" if announced.sha256 is None else f"sha256={announced.sha256}&"
        return Kept(
            uri=f"{SCHEME}{upload_id}#{digest}size={announced.size}", size=announced.size, sha256=announced.sha256
        )

    def reserved(self) -> tuple[int, int]:
        """Return how many uploads are open, and the bytes that they may still take on our disk: none."""
        return len(self._bucket.begun(UPLOADS)), 0

    def sweep(self, now: float) -> int:
        """Remove uploads whose time is over, and return how many."""
        removed = 0
        for key, native, begun_at in self._bucket.begun(UPLOADS):
            # One that is being begun at this moment is not announced yet.
            if begun_at < now - BEGINNING_S and self._is_over(key.removeprefix(UPLOADS), now):
                self._bucket.abort(key, native)
                removed += 1
        for key, stored_at in self._bucket.keys(ANNOUNCED):
            if stored_at < now - FORGET_S and self._is_over(key.removeprefix(ANNOUNCED), now):
                self._bucket.delete(key)
        return removed

    def _begun(self, upload_id: str) -> Begun:
        if ID.fullmatch(upload_id):
            try:
                return msgspec.json.decode(self._bucket.read(ANNOUNCED + upload_id), type=Begun)
            except NotFound:
                pass
        raise no_upload()

    def _is_over(self, upload_id: str, now: float) -> bool:
        try:
            return self._begun(upload_id).announced.expires_at < now
        except (NotFound, msgspec.MsgspecError):
            return True

    def _finish(self, key: str, begun: Begun) -> None:
        announced = begun.announced
        try:
            found = {part.number: part for part in self._bucket.parts(key, begun.native)}
            wanted = range(1, announced.parts + 1)
            missing = [n for n in wanted if n not in found or found[n].size != announced.part_size(n)]
            if missing:
                raise Conflict(
                    f"{len(missing)} of {announced.parts} parts are missing, the first is {missing[0]}",
                    hint="PUT the missing parts, then complete again.",
                )
            self._bucket.finish(key, begun.native, [found[n] for n in wanted])
        except NotFound:  # it has expired, or somebody else completes it at this moment
            if self._bucket.size(key) is None:
                raise no_upload() from None
