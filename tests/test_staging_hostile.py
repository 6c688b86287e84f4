"""What hostile and unlucky users have staged: every request is answered, nothing secret is told, nothing gets stuck."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import HeadraceError, Unavailable
from headrace.jobs import JobSpec
from headrace.wire import Ask, Granted, Said
from infra.rgw import Rgw
from streams.blobs import FolderBlobs
from tests.faulty import Faulty, serving
from workers import cache as caches
from workers import staging
from workers.cache import Cache
from workers.guard import Guard
from workers.jobfolders import JobFolders
from workers.staging import Errands, Stager

BODY = random.Random(17).randbytes(200_000)


def stager_of(folder: Path, **rules: Any) -> Stager:
    guard = Guard(hosts=["127.0.0.1"], folders=[folder / "data"], **rules)
    (folder / "data").mkdir(exist_ok=True)
    return Stager(FolderBlobs(folder / "blobs"), cache=Cache(folder / "cache", bytes_max=10**9, boot="b"), guard=guard)


async def asked(stager: Stager, uri: str, told: list[Said] | None = None) -> Granted:
    errands = Errands(stager)
    try:
        return await errands.grant(Ask(what="stage", uri=uri), None if told is None else told.append)
    finally:
        errands.close()


SECRETS = [
    "https://user:{}@data.example/x",
    "https://{}@data.example/x",
    "https://user:{}@127.0.0.1:99999/x",
    "https://user:{} @data.example/x",
    "https://user:a/{}@data.example/x",
    "https://user:{}@[::1/x",
    "https://us\u00e4r:{}@data.example/x",
    "http://user:{}@127.0.0.1/x",
    "ftp://user:{}@data.example/x",
    "s3://user:{}@bucket/key",
    "file://user:{}@host/etc/passwd",
    "file://[{}@/x",
    "https://127.0.0.1:9/x?token={}",
    "https://10.0.0.1/x?token={}",
    "ftp://data.example/x?token={}",
    "//user:{}@data.example/x",
    "https:/user:{}@data.example/x",
]


@pytest.mark.parametrize("uri", SECRETS)
async def test_a_secret_in_a_uri_is_told_nowhere(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.transfer.TRIES_MAX", 1)
    caplog.set_level(logging.DEBUG)
    told: list[Said] = []
    granted = await asked(stager_of(tmp_path), uri.format("hunter2"), told)
    assert granted.error
    assert "hunter2" not in f"{granted.error} {granted.hint} {told} {caplog.text}"
    assert all("hunter2" not in str(path) for path in tmp_path.rglob("*"))

    async def bring() -> None:
        job = JobSpec(executable="x", inputs={"data": uri.format("hunter2")})
        await JobFolders(tmp_path / "site", stager_of(tmp_path)).bring(job, tmp_path / "job")

    with pytest.raises(HeadraceError) as refused:
        await bring()
    assert "hunter2" not in f"{refused.value} {refused.value.hint}"


async def test_a_secret_in_a_query_is_neither_told_nor_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "TELL_EVERY_S", 0.0)
    told: list[Said] = []
    with serving(Faulty(body=BODY)) as server:
        granted = await asked(stager_of(tmp_path), f"{server.url}?token=hunter2", told)
        assert Path(granted.value).read_bytes() == BODY
        server.status, server.refusals = 403, 1
        refused = await asked(stager_of(tmp_path), f"{server.url}/b?token=hunter2", told)
    assert told
    assert "hunter2" not in f"{told} {refused.error} {refused.hint}"
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept
    assert all("hunter2" not in path.name and b"hunter2" not in path.read_bytes() for path in kept)


PIECES = [
    "https:",
    "http:",
    "s3:",
    "file:",
    "blob:",
    "//",
    "/",
    "@",
    ":",
    "[",
    "]",
    "%",
    "%00",
    "\\",
    "#",
    "?",
    "..",
    " ",
]
PIECES += [
    "#sha256=",
    "#size=1",
    "127.0.0.1",
    "localhost",
    "bucket",
    "\n",
    "\u00e4",
    "\u2100",
    "\udc80",
    "a" * 300,
    "0",
]


async def test_no_uri_is_left_without_an_answer(tmp_path: Path) -> None:
    stager, dice = stager_of(tmp_path, buckets=["bucket"]), random.Random(4)
    uris = ["".join(dice.choices(PIECES, k=dice.randint(1, 6))) for _ in range(600)]
    uris += [
        f"{scheme}{rest}" for scheme, rest in itertools.product(PIECES[:5], ("//[/x", "//%", "//\udc80", "//a:b/"))
    ]
    for uri in uris:
        granted = await asked(stager, uri)
        assert granted.error, ascii(uri)
        assert granted.hint, ascii(uri)
        assert "\n" not in granted.error
        granted.error.encode()


HEADS = [
    b"",
    b"\r\n\r\n",
    b"HTTP/1.1 412 Changed\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 999 What\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-9/999999999999999999\r\nContent-Length: 10\r\n\r\n",
    b"HTTP/1.1 206 Part\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-3/10\r\nContent-Length: 4\r\n\r\nabcd",
    b"HTTP/1.1 206 Part\r\nContent-Length: 4\r\n\r\nabcd",
    b"HTTP/1.1 302 There\r\nLocation: //[\r\n\r\n",
    b"HTTP/1.1 302 There\r\nLocation: \xff\xfe\r\n\r\n",
    b"HTTP/1.1 302 There\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\n\r\n\x1f\x8b",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nRepr-Digest: sha-256=:" + b"A" * 43 + b"=:\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x16\x03\x01\x00\x00",
]


@contextmanager
def answering(head: bytes) -> Iterator[str]:
    """Run a server that answers so, and hangs up."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                with line:
                    try:
                        line.recv(65536)
                        line.sendall(head)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/x"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
async def test_no_answer_of_a_server_is_left_without_an_answer(
    head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.transfer.TRIES_MAX", 2)
    stager = stager_of(tmp_path, bytes_max=400_000)
    with answering(head) as url:
        granted = await asked(stager, url)
        assert granted.error
        assert granted.hint
        known = caches.Known(etag='"x"', size=3, sha256="0" * 64)
        assert stager._cache is not None
        stager._cache.remember(url, known)  # asked first whether it is still the same
        assert (await asked(stager, url)).error
    with serving(Faulty(body=BODY)) as server:
        assert Path((await asked(stager, server.url)).value).read_bytes() == BODY


async def test_an_archive_stays_packed(tmp_path: Path) -> None:
    """Whatever it would become: nothing here looks into what it brings."""
    bomb = b"PK\x03\x04" + bytes(5000)
    with serving(Faulty(body=bomb)) as server:
        for name in ("bomb.zip", "bomb.tar.gz", "bomb.npz"):
            assert Path((await asked(stager_of(tmp_path), f"{server.url}/{name}")).value).read_bytes() == bomb


async def test_a_full_disk_is_told_and_nothing_half_there_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full where this says so; what a real one does is tried by the chaos trials."""
    stager = stager_of(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serving(Faulty(body=BODY)) as server:
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            refused = await asked(stager, server.url)
        assert "no room for 200,000 bytes: No space left" in refused.error
        assert refused.hint
        with monkeypatch.context() as patched:
            patched.setattr("workers.transfer.write_all", full)
            refused = await asked(stager, server.url)
        assert "No space left" in refused.error
        assert refused.hint
        with monkeypatch.context() as patched:
            patched.setattr(Cache, "remember", full)
            granted = await asked(stager, server.url)
        assert Path(granted.value).read_bytes() == BODY  # what is known of an address is no part of it
        assert server.asked[-1][1] != "bytes=0-0"


async def test_a_full_disk_at_a_job_is_a_matter_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serving(Faulty(body=BODY)) as server:
        job = JobSpec(executable="x", inputs={"data": server.url})
        monkeypatch.setattr("workers.transfer.write_all", full)
        (tmp_path / "job").mkdir()
        with pytest.raises(Unavailable, match="No space left"):
            await JobFolders(tmp_path / "site", stager_of(tmp_path)).bring(job, tmp_path / "job")


async def test_one_input_that_cannot_be_had_stops_the_others(tmp_path: Path) -> None:
    with serving(Faulty(body=BODY)) as server:
        inputs = {f"in/{n}": f"{server.url}/{n}" for n in range(200)} | {"in/50": "https://10.0.0.1/x"}
        folder = tmp_path / "job"
        folder.mkdir()
        with pytest.raises(HeadraceError, match="input 'in/50'"):
            await JobFolders(tmp_path / "site", stager_of(tmp_path)).bring(
                JobSpec(executable="x", inputs=inputs), folder
            )
        there = len(list((folder / "in").iterdir()))
        assert there < 200


async def test_many_small_inputs_arrive_under_their_names(tmp_path: Path) -> None:
    inside = tmp_path / "data"
    (tmp_path / "job").mkdir()
    stager = stager_of(tmp_path)
    names = [*(f"in/{n}" for n in range(150)), "\u00e4/\U0001f600.h5", "a b", "in/-rf", "in/$(x)"]
    with serving(Faulty(body=BODY[:1000])) as server:
        (inside / "local").write_bytes(b"local")
        inputs = {name: f"{server.url}/{number}" for number, name in enumerate(names)}
        job = JobSpec(executable="x", inputs=inputs | {"local": f"file://{inside}/local"})
        await JobFolders(tmp_path / "site", stager).bring(job, tmp_path / "job")
    assert all((tmp_path / "job" / name).read_bytes() == BODY[:1000] for name in names)
    assert (tmp_path / "job" / "local").read_bytes() == b"local"


async def test_objects_of_every_name_are_staged(rgw: Rgw, tmp_path: Path) -> None:
    from tests.test_blobs import open_bucket

    bucket = open_bucket(rgw)
    stager = Stager(
        FolderBlobs(tmp_path / "blobs"),
        cache=Cache(tmp_path / "cache", bytes_max=10**9),
        guard=Guard(buckets=[bucket.name]),
        objects=bucket.store.link,
    )
    for key in (
        "\u00e4 \U0001f600.h5",
        "a\nb",
        "a?b=c&d",
        "a#b",
        "a%2fb",
        "../up",
        "a//b",
        "-rf",
        "a" * 900,
        "nothing",
    ):
        body = b"" if key == "nothing" else key.encode()
        bucket.put(key, body)
        told: list[Said] = []
        granted = await asked(stager, f"s3://{bucket.name}/{bucket.prefix}{key}", told)
        assert Path(granted.value).read_bytes() == body, granted.error
        assert Path(granted.value).name == hashlib.sha256(body).hexdigest()
    refused = await asked(stager, f"s3://{bucket.name}/{bucket.prefix}a\nnone")
    assert "\n" not in refused.error


async def test_an_object_that_is_replaced_on_the_way_arrives_as_one_of_both(rgw: Rgw, tmp_path: Path) -> None:
    from tests.test_blobs import open_bucket
    from workers.lines import Source
    from workers.transfer import Checks, Transfer

    bucket, part = open_bucket(rgw), 5 * 1024 * 1024
    old, new = (random.Random(n).randbytes(3 * part) for n in range(2))
    bucket.put("data", old)
    path = tmp_path / "growing"
    path.touch()
    replaced = threading.Event()

    def moved(there: int, size: int) -> None:
        if there >= part and not replaced.is_set():
            replaced.set()
            bucket.put("data", new)

    fetched = Transfer(
        Source(name="data", address=bucket.link("data").address),
        path,
        checks=Checks(),
        room=lambda size: os.truncate(path, size),
        stopped=threading.Event(),
        on_moved=moved,
        part_bytes=part,
        lines_max=1,
        backoff_s=0.001,
    ).run()
    assert fetched.sha256 == hashlib.sha256(new).hexdigest()
    assert path.read_bytes() == new
