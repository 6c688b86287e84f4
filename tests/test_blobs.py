"""The store of bytes by content: one behaviour, in a folder and in a bucket of a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from gateway.direct import Direct
from headrace.errors import BadRequest, NotFound, Unavailable
from headrace.wire import Payload
from infra.rgw import Rgw
from streams.blobs import Blobs, FolderBlobs, check_in, check_out
from tests.doors import Door, Doors
from tests.tunnels import closing, join
from workers.cache import Cache
from workers.guard import Guard
from workers.staging import Stager

MIB = 1024 * 1024
SMALL = b"frames"
LARGE = random.Random(5).randbytes(36 * MIB + 17)  # three parts
SHA256 = hashlib.sha256(LARGE).hexdigest()


class Place(NamedTuple):
    """A store, and what brings its content to this machine."""

    blobs: Any
    stager: Stager
    direct: Direct | None
    bucket: Any

    async def read(self, uri: str) -> bytes:
        found = await self.stager.stage(uri)
        if isinstance(found, Path):
            return found.read_bytes()
        with found:
            return found.path.read_bytes()


def open_bucket(rgw: Rgw, **changes: str) -> Any:
    from streams.s3 import Access, Bucket, Store

    access: dict[str, Any] = {"endpoint_url": rgw.url, "access_key": rgw.access_key, "secret_key": rgw.secret_key}
    store = Store(Access(**(access | changes)))
    if not changes:
        store.call("create_bucket", Bucket="headrace")
    return Bucket(store, "headrace", secrets.token_hex(4))


def place_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> Place:
    cache = Cache(folder / "cache", bytes_max=10**9, boot="b")
    if kind == "folder":
        blobs: Blobs = FolderBlobs(folder / "blobs")
        return Place(blobs, Stager(blobs, cache=cache), None, None)
    from streams.s3 import S3Blobs

    bucket = open_bucket(request.getfixturevalue("rgw"))
    blobs = S3Blobs(bucket, folder / "incoming")
    guard = Guard(buckets=["headrace"])
    return Place(blobs, Stager(blobs, cache=cache, guard=guard, objects=bucket.store.link), Direct(bucket), bucket)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(request.param, tmp_path, request)


@pytest.fixture
def s3(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of("s3", tmp_path, request)


@pytest.fixture
async def door(place: Place, tmp_path: Path) -> AsyncIterator[Door]:
    async with Doors(tmp_path / "door") as doors:
        opened = await doors.open(direct=place.direct, upload_part_bytes=16 * MIB)
        yield opened


# ---------------------------------------------------------------- content


@pytest.mark.parametrize("body", [b"", SMALL, LARGE], ids=["nothing", "small", "large"])
async def test_what_is_kept_is_found_by_its_digest(place: Place, tmp_path: Path, body: bytes) -> None:
    digest = await place.blobs.put(body)
    assert digest == hashlib.sha256(body).hexdigest()
    assert await place.blobs.get(digest) == body
    file = tmp_path / "file"
    file.write_bytes(body)
    assert await place.blobs.put_file(file) == digest
    assert await place.read(f"blob:{digest}") == body


async def test_a_large_file_goes_in_parts_and_comes_back(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(LARGE)
    uri = await place.stager.store(file)
    assert uri == f"blob:{SHA256}"
    assert await place.stager.store(file) == uri
    assert await place.read(uri) == LARGE
    assert await place.read(f"{uri}#size={len(LARGE)}") == LARGE
    file.unlink()
    assert await place.read(uri) == LARGE


@pytest.mark.parametrize("name", ["0" * 64, "0" * 63, "", "..", "../" * 3 + "etc/passwd", "A" * 64, "f" * 32])
async def test_what_is_not_there_is_told(place: Place, name: str) -> None:
    with pytest.raises(NotFound):
        await place.blobs.where(name)
    with pytest.raises(NotFound):
        await place.stager.stage(f"blob:{name}")


async def test_what_is_no_file_is_not_kept(place: Place, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(BadRequest, match="no regular file"):
            await place.blobs.put_file(path)
    with pytest.raises(FileNotFoundError):
        await place.blobs.put_file(tmp_path / "none")


async def test_a_large_payload_travels_by_claim_check(place: Place) -> None:
    body = LARGE[: 200 * 1024]
    payload = await check_in(Payload(body=body, size=len(body)), place.blobs)
    assert payload.blob is not None
    assert payload.body == b""
    assert await check_out(payload, place.blobs) == body


async def test_what_grew_in_a_file_is_adopted(place: Place) -> None:
    grown = place.blobs.incoming / "grown"
    grown.write_bytes(LARGE)
    await asyncio.to_thread(place.blobs.adopt, grown, SHA256)
    assert not grown.exists()
    assert await place.read(f"blob:{SHA256}") == LARGE


# ---------------------------------------------------------------- the handshake


async def begin(door: Door, body: bytes, **more: Any) -> dict[str, Any]:
    status, said, _ = await door.ask("POST", "/v1/uploads", json={"size": len(body), **more})
    assert status == 201, said
    found: dict[str, Any] = said
    return found


async def put(url: str, body: bytes) -> int:
    """PUT without any token, as `curl -T` does."""
    async with aiohttp.ClientSession() as stranger, stranger.put(url, data=io.BytesIO(body)) as answer:
        return answer.status


async def put_all(upload: dict[str, Any], body: bytes) -> None:
    start = 0
    for part in upload["parts"]:
        assert await put(part["url"], body[start : start + part["size"]]) in (200, 204)
        start += part["size"]
    assert start == len(body)


def path_of(upload: dict[str, Any]) -> str:
    return f"/v1/uploads/{upload['upload_id']}/complete"


@pytest.mark.parametrize("body", [b"", SMALL, LARGE], ids=["nothing", "small", "large"])
@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_becomes_a_uri_that_can_be_staged(
    place: Place, door: Door, body: bytes, announced: bool
) -> None:
    if place.direct is None:
        place = place._replace(blobs=door.blobs, stager=Stager(door.blobs))
    upload = await begin(door, body, **({"sha256": hashlib.sha256(body).hexdigest()} if announced else {}))
    assert [p["number"] for p in upload["parts"]] == list(range(1, len(upload["parts"]) + 1))
    await put_all(upload, body)
    said = [(await door.ask("POST", path_of(upload)))[1] for _ in range(2)]
    assert said[0] == said[1]  # an answer that was lost can be asked for again
    assert said[0]["size"] == len(body)
    assert await place.read(said[0]["uri"]) == body


async def test_an_upload_is_complete_only_with_all_parts_of_their_size(place: Place, door: Door) -> None:
    upload = await begin(door, LARGE)
    assert len(upload["parts"]) == 3
    first = upload["parts"][0]
    assert await put(first["url"], LARGE[: first["size"] - 1]) in (400, 403)
    assert "3 of 3 parts are missing" in (await door.problem(409, "POST", path_of(upload))).detail
    assert await put(first["url"], LARGE[: first["size"]]) in (200, 204)
    assert "the first is 2" in (await door.problem(409, "POST", path_of(upload))).detail


async def test_an_address_with_a_changed_signature_is_refused(place: Place, door: Door) -> None:
    upload = await begin(door, SMALL)
    url = upload["parts"][0]["url"]
    changed = re.sub("([Ss]ignature=)([0-9a-f])", lambda m: m[1] + ("0" if m[2] != "0" else "1"), url)
    assert changed != url
    assert await put(changed, SMALL) in (401, 403)
    assert await put(url.partition("?")[0], SMALL) in (401, 403, 405, 411)
    assert await put(url, SMALL) in (200, 204)


async def test_what_is_complete_cannot_be_changed(place: Place, door: Door) -> None:
    upload = await begin(door, SMALL)
    await put_all(upload, SMALL)
    status, said, _ = await door.ask("POST", path_of(upload))
    assert status == 200
    assert await put(upload["parts"][0]["url"], b"FRAMES") in (404, 409)
    if place.direct is None:
        place = place._replace(blobs=door.blobs, stager=Stager(door.blobs))
    assert await place.read(said["uri"]) == SMALL


async def test_an_upload_that_is_not_there_is_a_404(place: Place, door: Door) -> None:
    for name in ("0" * 32, "0", "x" * 32):
        await door.problem(404, "POST", f"/v1/uploads/{name}/complete")


# ---------------------------------------------------------------- what only a bucket can get wrong


async def test_an_address_expires(s3: Place) -> None:
    key = "uploads/late"
    native = s3.bucket.begin(key)
    url = s3.bucket.link_part(key, native, 1, len(SMALL), 1.0)
    assert await put(url, SMALL) == 200
    give_up_at = time.monotonic() + 20
    while (status := await put(url, SMALL)) == 200 and time.monotonic() < give_up_at:
        await asyncio.sleep(0.3)
    assert status == 403


async def test_the_addresses_of_a_large_upload_are_good_for_longer(s3: Place, tmp_path: Path) -> None:
    async with Doors(tmp_path / "door") as doors:
        door = await doors.open(direct=s3.direct)
        small = await begin(door, SMALL)
        status, large, _ = await door.ask("POST", "/v1/uploads", json={"size": 7200 * MIB})
    assert status == 201
    assert large["expires_in_s"] - small["expires_in_s"] == pytest.approx(7200, abs=1)
    lasts = [int(re.findall("X-Amz-Expires=([0-9]+)", u["parts"][-1]["url"])[0]) for u in (small, large)]
    assert lasts[1] - lasts[0] == pytest.approx(7200, abs=1)


async def test_a_byte_that_flips_on_the_way_up_is_sent_again(s3: Place, rgw: Rgw, tmp_path: Path) -> None:
    from streams.s3 import S3Blobs

    flips = [1, 1]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reading, writing = await asyncio.open_connection("127.0.0.1", int(rgw.url.rpartition(":")[2]))
        passed = 0

        def damage(chunk: bytes) -> bytes:
            nonlocal passed
            passed += len(chunk)
            if flips and passed > MIB:  # in the midst of a body
                flips.pop()
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            return chunk

        async with closing(writer), closing(writing):
            await join((reader, writing), (reading, writer), change=damage)

    file = tmp_path / "file"
    file.write_bytes(LARGE)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        bucket = open_bucket(rgw, endpoint_url=f"http://{host}:{port}")
        assert await S3Blobs(bucket, tmp_path / "other").put_file(file) == SHA256
        assert flips == []
        assert await asyncio.to_thread(bucket.read, f"{SHA256[:2]}/{SHA256}") == LARGE


async def test_unfinished_uploads_are_swept(s3: Place, tmp_path: Path) -> None:
    assert s3.direct is not None
    async with Doors(tmp_path / "door") as doors:
        door = await doors.open(direct=s3.direct, upload_keep_seconds=1000.0)
        left, done = await begin(door, SMALL), await begin(door, SMALL)
        await put_all(done, SMALL)
        assert await put(left["parts"][0]["url"], SMALL) == 200
        status, said, _ = await door.ask("POST", path_of(done))
        assert status == 200
        assert s3.direct.reserved() == (1, 0)
        assert s3.direct.sweep(time.time()) == 0
        assert s3.direct.sweep(time.time() + 2000.0) == 1
        assert s3.direct.reserved() == (0, 0)
        await door.problem(404, "POST", path_of(left))
        assert await s3.read(said["uri"]) == SMALL  # what was completed stays


async def test_a_wrong_digest_is_found_when_the_upload_is_staged(s3: Place, tmp_path: Path) -> None:
    async with Doors(tmp_path / "door") as doors:
        door = await doors.open(direct=s3.direct)
        upload = await begin(door, SMALL, sha256="0" * 64)
        await put_all(upload, SMALL)
        status, said, _ = await door.ask("POST", path_of(upload))
    assert status == 200
    assert "sha256=" + "0" * 64 in said["uri"]
    with pytest.raises(BadRequest, match="is damaged: its SHA-256 is"):
        await s3.stager.stage(said["uri"])


async def test_a_byte_that_flips_in_the_bucket_is_found(s3: Place) -> None:
    digest = await s3.blobs.put(LARGE)
    damaged = bytearray(LARGE)
    damaged[20 * MIB] ^= 1
    s3.bucket.put(f"{digest[:2]}/{digest}", bytes(damaged))
    with pytest.raises(BadRequest, match=f"instead of {digest}"):
        await s3.stager.stage(f"blob:{digest}")
    with pytest.raises(Unavailable, match="is damaged in the bucket"):
        await s3.blobs.get(digest)


async def test_an_object_of_a_bucket_that_may_be_read_is_staged(s3: Place) -> None:
    s3.bucket.put("raw data/run 7#1.h5", LARGE)
    uri = f"s3://headrace/{s3.bucket.prefix}raw data/run 7#1.h5"
    assert await s3.read(uri) == LARGE
    assert await s3.read(f"{uri}#sha256={SHA256}&size={len(LARGE)}") == LARGE
    with pytest.raises(BadRequest, match=r"MD5|SHA-256"):
        await s3.stager.stage(f"{uri}#sha256={'1' * 64}")
    with pytest.raises(NotFound):
        await s3.stager.stage(uri + "x")


async def test_wrong_keys_are_told_without_the_keys(s3: Place, rgw: Rgw, tmp_path: Path) -> None:
    from streams.s3 import S3Blobs

    blobs = S3Blobs(open_bucket(rgw, secret_key="wrong-secret"), tmp_path / "other")
    with pytest.raises(Unavailable) as refused:
        await blobs.put(SMALL)
    told = f"{refused.value!r} {refused.value.hint} {refused.value.__cause__!r}"
    assert "wrong-secret" not in told
    assert rgw.access_key not in told
    assert "wrong-secret" not in repr(blobs.bucket.store)


async def test_a_server_that_is_away_is_told(tmp_path: Path, rgw: Rgw) -> None:
    from streams.s3 import S3Blobs

    blobs = S3Blobs(open_bucket(rgw, endpoint_url="http://127.0.0.1:9"), tmp_path / "other")
    with pytest.raises(Unavailable, match="s3://headrace/"):
        await blobs.get("0" * 64)
