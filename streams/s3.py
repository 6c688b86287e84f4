"""Bytes by their SHA-256 in an S3 bucket, and what else is asked of one: signed addresses, parts, sweeping.

boto3 blocks, so it is called in threads. It is imported here alone, by processes whose settings name a bucket. Keys:
``ab/abcdef...`` for what is named by its digest, ``uploads/ID`` for what callers have sent straight to the bucket.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from msgspec import Struct

from headrace.errors import BadRequest, HeadraceError, NotFound, Unavailable
from streams.blobs import ID, Link, check_digest, measure, open_regular

MIB = 1024 * 1024
PART_BYTES = 16 * MIB
PARTS_MAX = 10_000
SENDERS = 4
CALLS_MAX = 16
LINK_S = 3600
UPLOADS = "uploads/"
_DAMAGED = frozenset({"XAmzContentSHA256Mismatch", "BadDigest"})
_GONE = frozenset({"NoSuchKey", "NoSuchUpload", "404", "NotFound"})


class Access(Struct, frozen=True, kw_only=True):
    """Where the server is and who we are: no keys means the standard chain (environment, files, role of the machine).

    ``public_url`` is where callers reach the same server, if that is another address than ours; ``proxy_url`` is the
    HTTP proxy that leads there, and ``ca_file`` holds the certificates to trust, where that are not the public ones.
    """

    endpoint_url: str = ""
    public_url: str = ""
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: str = ""
    session_token: str = ""
    proxy_url: str = ""
    ca_file: str = ""

    def __repr__(self) -> str:
        """Say where, and never who."""
        return f"Access({self.endpoint_url or 'aws'!r})"


class Damaged(Unavailable):
    """What arrived at the server is not what was sent."""


class Found(Struct, frozen=True, kw_only=True):
    """One part of an upload that has arrived."""

    number: int
    size: int
    etag: str


class Store:
    """One S3 server. Methods block; call them in a thread.

    All raise NotFound where there is no such object, Unavailable where the server does not answer or lets us not.
    """

    def __init__(self, access: Access) -> None:
        session = boto3.session.Session(
            aws_access_key_id=access.access_key or None,
            aws_secret_access_key=access.secret_key or None,
            aws_session_token=access.session_token or None,
            region_name=access.region,
        )
        config = Config(
            signature_version="s3v4",
            # The SHA-256 of what is sent is part of the signature, over TLS too: every server checks it, and older ones
            # know no other checksum but the slower MD5.
            s3={"payload_signing_enabled": True} | ({"addressing_style": "path"} if access.endpoint_url else {}),
            retries={"mode": "standard", "total_max_attempts": 5},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=CALLS_MAX,
            # What is set counts, and not what stands in the environment.
            proxies={"http": access.proxy_url, "https": access.proxy_url} if access.proxy_url else {},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        verify = access.ca_file or True
        self._client = session.client("s3", endpoint_url=access.endpoint_url or None, config=config, verify=verify)
        self._signer = self._client
        if access.public_url:
            self._signer = session.client("s3", endpoint_url=access.public_url, config=config, verify=verify)

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Make one call by its name in boto3 and return the answer."""
        with _told(f"{arguments.get('Bucket', '')}/{arguments.get('Key', '')}"):
            found: dict[str, Any] = getattr(self._client, operation)(**arguments)
        return found

    def send(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Make a call that carries bytes; what was damaged on the way is sent once more."""
        try:
            return self.call(operation, **arguments)
        except Damaged:
            return self.call(operation, **arguments)

    def read(self, bucket: str, key: str) -> bytes:
        """Return the bytes of an object."""
        with _told(f"{bucket}/{key}"):
            found: bytes = self._client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return found

    def size(self, bucket: str, key: str) -> int:
        """Return the size of an object in bytes."""
        return int(self.call("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def link(self, bucket: str, key: str) -> Link:
        """Return the way to an object, without looking whether there is one."""

        def address() -> str:
            return self._sign("get_object", LINK_S, self._client, Bucket=bucket, Key=key)

        return Link(name=f"s3://{bucket}/{key}", address=address)

    def link_part(self, bucket: str, key: str, upload: str, number: int, size: int, keep_s: float) -> str:
        """Return the address to PUT exactly ``size`` bytes to; good for ``keep_s`` seconds."""
        return self._sign(
            "upload_part",
            int(keep_s),
            self._signer,
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            PartNumber=number,
            ContentLength=size,
        )

    def listed(self, operation: str, field: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Yield all that a listing call returns, page by page."""
        with _told(arguments["Bucket"]):
            for page in self._client.get_paginator(operation).paginate(**arguments):
                yield from page.get(field) or ()

    def _sign(self, operation: str, keep_s: int, client: Any, **arguments: Any) -> str:
        with _told(f"{arguments['Bucket']}/{arguments['Key']}"):
            signed: str = client.generate_presigned_url(operation, Params=arguments, ExpiresIn=keep_s)
        return signed


class Bucket:
    """The part of a bucket below a prefix. Methods block, and raise what ``Store`` raises."""

    def __init__(self, store: Store, name: str, prefix: str = "") -> None:
        self.store = store
        self.name = name
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def put(self, key: str, body: bytes) -> None:
        """Store a few bytes; the server checks their SHA-256."""
        self.store.send("put_object", **self._at(key), Body=body)

    def read(self, key: str) -> bytes:
        """Return the bytes of an object."""
        return self.store.read(self.name, self.prefix + key)

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, None where there is none."""
        try:
            return self.store.size(self.name, self.prefix + key)
        except NotFound:
            return None

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        self.store.call("delete_object", **self._at(key))

    def link(self, key: str) -> Link:
        """Return the way to an object."""
        return self.store.link(self.name, self.prefix + key)

    def send(self, key: str, handle: int, size: int) -> None:
        """Store an open file: in parts, several at a time, each checked by the server."""
        if size <= PART_BYTES:
            return self.put(key, os.pread(handle, size, 0))
        part_bytes = max(PART_BYTES, -(-size // PARTS_MAX // MIB) * MIB)
        upload = self.begin(key)

        def send_part(number: int) -> Found:
            body = os.pread(handle, part_bytes, (number - 1) * part_bytes)
            etag = self.store.send(
                "upload_part",
                **self._at(key),
                UploadId=upload,
                PartNumber=number,
                Body=body,
            )["ETag"]
            return Found(number=number, size=len(body), etag=etag)

        try:
            with ThreadPoolExecutor(SENDERS, thread_name_prefix="send") as threads:
                found = list(threads.map(send_part, range(1, -(-size // part_bytes) + 1)))
            if sum(part.size for part in found) != size:
                raise BadRequest("the file changed while it was stored", hint="Store it when it is complete.")
            self.finish(key, upload, found)
        except BaseException:
            self.abort(key, upload)
            raise

    # ------------------------------------------------------------ uploads that others send

    def begin(self, key: str) -> str:
        """Begin an upload in parts and return its id."""
        return str(self.store.call("create_multipart_upload", **self._at(key))["UploadId"])

    def link_part(self, key: str, upload: str, number: int, size: int, keep_s: float) -> str:
        """Return the address to PUT one part to."""
        return self.store.link_part(self.name, self.prefix + key, upload, number, size, keep_s)

    def parts(self, key: str, upload: str) -> list[Found]:
        """Return the parts that have arrived."""
        listed = self.store.listed("list_parts", "Parts", **self._at(key), UploadId=upload)
        return [Found(number=p["PartNumber"], size=p["Size"], etag=p["ETag"]) for p in listed]

    def finish(self, key: str, upload: str, found: list[Found]) -> None:
        """Make an object of the parts."""
        parts = [{"PartNumber": p.number, "ETag": p.etag} for p in sorted(found, key=lambda p: p.number)]
        self.store.call("complete_multipart_upload", **self._at(key), UploadId=upload, MultipartUpload={"Parts": parts})

    def abort(self, key: str, upload: str) -> None:
        """Throw away an upload and its parts; one that is gone is no error."""
        try:
            self.store.call("abort_multipart_upload", **self._at(key), UploadId=upload)
        except HeadraceError:  # it is swept later
            return

    def begun(self, prefix: str) -> list[tuple[str, str, float]]:
        """Return the uploads that are not finished: key, id, and when they began in epoch seconds."""
        listed = self.store.listed("list_multipart_uploads", "Uploads", Bucket=self.name, Prefix=self.prefix + prefix)
        return [(u["Key"].removeprefix(self.prefix), u["UploadId"], u["Initiated"].timestamp()) for u in listed]

    def keys(self, prefix: str) -> list[tuple[str, float]]:
        """Return the objects whose key begins so, and when they were stored in epoch seconds."""
        listed = self.store.listed("list_objects_v2", "Contents", Bucket=self.name, Prefix=self.prefix + prefix)
        return [(o["Key"].removeprefix(self.prefix), o["LastModified"].timestamp()) for o in listed]

    def _at(self, key: str) -> Mapping[str, str]:
        return {"Bucket": self.name, "Key": self.prefix + key}


class S3Blobs:
    """The store of bytes by content in a bucket. ``incoming`` is a local folder where files grow before ``adopt``."""

    def __init__(self, bucket: Bucket, incoming: Path) -> None:
        self.bucket = bucket
        self.incoming = incoming
        incoming.mkdir(parents=True, exist_ok=True)
        # Threads of its own: what waits for the bucket must not keep local files from being read.
        self._threads = ThreadPoolExecutor(CALLS_MAX, thread_name_prefix="s3")

    async def put(self, body: bytes) -> str:
        """Keep the bytes and return their SHA-256 in hex."""
        digest = hashlib.sha256(body).hexdigest()
        await self._in_thread(self._put, digest, body)
        return digest

    async def get(self, digest: str) -> bytes:
        """Return the bytes, checked; NotFound where there are none."""
        body: bytes = await self._in_thread(self.bucket.read, _key(digest))
        if hashlib.sha256(body).hexdigest() != digest:
            raise Unavailable(f"the content of {digest} is damaged in the bucket", hint="Store it again.")
        return body

    async def put_file(self, path: Path) -> str:
        """Keep a copy of a file and return its SHA-256 in hex."""
        digest: str = await self._in_thread(self._put_file, path)
        return digest

    async def where(self, name: str) -> Path | Link:
        """Return the way to the bytes of a digest, or of an upload's id; NotFound where there are none."""
        key = UPLOADS + name if ID.fullmatch(name) else _key(name)
        if await self._in_thread(self.bucket.size, key) is None:
            raise NotFound(f"no content named {name[:64]}", hint="Upload it again; it may have been cleaned up.")
        return self.bucket.link(key)

    def adopt(self, path: Path, digest: str) -> None:
        """Move a finished file from ``incoming`` into the bucket; its digest was checked by the caller. Blocks."""
        with path.open("rb") as file:
            self._send(digest, file.fileno(), os.fstat(file.fileno()).st_size)
        path.unlink()

    def _put(self, digest: str, body: bytes) -> None:
        if self.bucket.size(_key(digest)) != len(body):
            self.bucket.put(_key(digest), body)

    def _put_file(self, path: Path) -> str:
        with open_regular(path) as handle:
            before = os.fstat(handle)
            digest = measure(handle)
            sent = self._send(digest, handle, before.st_size)
            after = os.fstat(handle)
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                if sent:
                    self.bucket.delete(_key(digest))  # it may hold something else than its name says
                raise BadRequest(f"{path} changed while it was stored", hint="Store it when it is complete.")
        return digest

    def _send(self, digest: str, handle: int, size: int) -> bool:
        """Store an open file, unless it is there already, and say whether that was needed."""
        key = _key(digest)
        if self.bucket.size(key) == size:
            return False
        self.bucket.send(key, handle, size)
        return True

    async def _in_thread(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def _key(digest: str) -> str:
    check_digest(digest)
    return f"{digest[:2]}/{digest}"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn boto3's errors into ours; what they say holds neither keys nor signatures."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _GONE:
            raise NotFound(f"there is no s3://{what}", hint="Check the name; it may have been cleaned up.") from error
        kind = Damaged if code in _DAMAGED else Unavailable
        raise kind(f"s3://{what}: the server says {code}", hint="Check bucket, keys and rights.") from error
    except BotoCoreError as error:
        raise Unavailable(f"s3://{what}: {error}", hint="Check HEADRACE_S3_URL and the credentials.") from error
