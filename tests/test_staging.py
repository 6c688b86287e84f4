"""``ctx.stage`` and ``ctx.store`` as a worker grants them: from every kind of URI, once, checked, and told of."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.errors import BadRequest, HeadraceError, NotFound
from headrace.wire import Ask, Said
from streams.blobs import FolderBlobs
from tests.faulty import Faulty, serving
from workers import staging
from workers.cache import Cache, Held
from workers.guard import Guard
from workers.staging import Errands, Stager, take_apart

BODY = random.Random(3).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[Faulty]:
    with serving(Faulty(body=BODY)) as faulty:
        yield faulty


def stager_of(folder: Path, name: str = "cache", bytes_max: int = 10**9) -> Stager:
    return Stager(
        FolderBlobs(folder / "blobs"),
        cache=Cache(folder / name, bytes_max=bytes_max, boot="b"),
        guard=Guard(hosts=["127.0.0.1"], folders=[folder / "data"], bytes_max=400_000),
    )


async def staged(stager: Stager, uri: str) -> bytes:
    found = await stager.stage(uri)
    if isinstance(found, Path):
        return found.read_bytes()
    with found:
        return found.path.read_bytes()


async def test_content_is_fetched_once_for_all_workers_of_a_machine(tmp_path: Path, server: Faulty) -> None:
    one, two = stager_of(tmp_path), stager_of(tmp_path)
    uri = f"{server.url}#sha256={SHA256}"
    found = await asyncio.gather(*(staged(s, uri) for s in (one, two, one, two)))
    assert found == [BODY] * 4
    assert server.sent == len(BODY)
    assert await staged(one, f"{server.url}/elsewhere#sha256={SHA256.upper()}") == BODY
    assert server.sent == len(BODY)  # the same content under another address


async def test_an_address_that_did_not_change_is_not_fetched_again(tmp_path: Path, server: Faulty) -> None:
    stager = stager_of(tmp_path)
    assert await staged(stager, server.url) == BODY
    assert await staged(stager, server.url) == BODY
    assert [asked for _, asked in server.asked[1:]] == ["bytes=0-0"]  # one byte, to hear that it is still the same
    server.body = bytes(reversed(BODY))
    assert await staged(stager, server.url) == server.body


async def test_what_is_staged_stays_until_the_attempt_has_ended(tmp_path: Path, server: Faulty) -> None:
    stager = stager_of(tmp_path, bytes_max=350_000)
    errands = Errands(stager)
    granted = await errands.grant(Ask(what="stage", uri=server.url))
    assert Path(granted.value).read_bytes() == BODY
    server.body = BODY[:100_000]
    again = await errands.grant(Ask(what="stage", uri=f"{server.url}2"))
    assert "are in use" in again.error
    assert again.hint
    assert Path(granted.value).read_bytes() == BODY
    errands.close()
    assert await staged(stager, f"{server.url}2") == BODY[:100_000]
    assert not Path(granted.value).exists()
    assert errands.stage_in_s > 0.0
    assert errands.stage_out_s == 0.0


async def test_the_time_that_storing_takes_is_counted_apart(tmp_path: Path) -> None:
    errands = Errands(stager_of(tmp_path))
    file = tmp_path / "figure.png"
    file.write_bytes(BODY)
    granted = await errands.grant(Ask(what="store", path=str(file), name="figure.png"))
    assert granted.value == f"blob:{SHA256}"
    assert await errands.grant(Ask(what="store", body=BODY, name="b")) == granted
    assert errands.stage_in_s == 0.0
    assert errands.stage_out_s > 0.0
    assert (await errands.grant(Ask(what="store", path=str(tmp_path / "none"), name="n"))).error
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in (await errands.grant(Ask(what="store", path=str(tmp_path / "pipe"), name="n"))).error


async def test_a_fault_is_told_and_the_next_request_is_served(tmp_path: Path, server: Faulty) -> None:
    errands = Errands(stager_of(tmp_path))
    server.flip_at, server.flips = 1000, 10_000
    for uri, what in {
        f"{server.url}#sha256={SHA256}": "is damaged: its SHA-256 is",
        f"{server.url}#size=5": "it has 300,000 bytes instead of 5",
        f"{server.url}#size=500000": "has 500,000 bytes, the limit is 400,000",
        "http://169.254.169.254/latest": "must not be fetched from",
        "s3://bucket/key": "does not read",
        "file:///etc/passwd": "outside the folders",
        "gopher://127.0.0.1/x": "cannot be staged",
        "blob:" + "0" * 64: "no content with the digest",
        "blob:../../etc/passwd": "is not a digest",
        "": "cannot be staged",
    }.items():
        granted = await errands.grant(Ask(what="stage", uri=uri))
        assert what in granted.error, uri
        assert granted.hint
    server.flips = 0
    assert Path((await errands.grant(Ask(what="stage", uri=server.url))).value).read_bytes() == BODY
    errands.close()


async def test_how_far_it_is_is_told_in_bytes_and_without_the_query(
    tmp_path: Path, server: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "TELL_EVERY_S", 0.0)
    told: list[Said] = []
    held = await stager_of(tmp_path).stage(f"{server.url}?signature=secret", told.append)
    assert isinstance(held, Held)
    held.close()
    moved = [said.moved for said in told if said.moved is not None]
    assert moved[-1].bytes_done == moved[-1].bytes_total == len(BODY)
    assert {m.uri for m in moved} == {server.url}


async def test_a_canceled_attempt_stops_what_is_fetched_for_it(tmp_path: Path, server: Faulty) -> None:
    server.cut_after, server.cuts = 10, 10_000
    stager = stager_of(tmp_path)
    task = asyncio.create_task(stager.stage(server.url))
    while not server.asked:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while any(t.name.startswith("transfer") for t in threading.enumerate()):
        await asyncio.sleep(0.01)
    server.cuts = 0
    assert await staged(stager, server.url) == BODY


async def test_files_are_read_where_they_are(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "frames.h5").write_bytes(BODY)
    stager, uri = stager_of(tmp_path), f"file://{data}/frames.h5"
    assert await stager.stage(f"{uri}#sha256={SHA256}&size=300000") == data / "frames.h5"
    for fragment in ("#size=1", "#sha256=" + "0" * 64, "#md5=" + "0" * 32):
        with pytest.raises(BadRequest):
            await stager.stage(uri + fragment)
    with pytest.raises(NotFound):
        await stager.stage(uri + "x")


@pytest.mark.parametrize(
    "fragment", ["sha256=xyz", "sha256=" + "0" * 63, "size=-1", "size=1&size=2", "size=1&sha1=0", "md5=", "size=1e9"]
)
def test_what_a_uri_says_of_its_content_has_to_be_understood(fragment: str) -> None:
    with pytest.raises(BadRequest, match="is not understood"):
        take_apart(f"https://a/b#{fragment}")


def test_a_uri_is_taken_apart() -> None:
    wanted = take_apart(f"s3://b/k#1#SHA256=x#sha256={SHA256}&size=7")
    assert wanted.uri == "s3://b/k#1#SHA256=x"
    assert (wanted.checks.sha256, wanted.checks.size, wanted.checks.md5) == (SHA256, 7, "")
    assert take_apart("https://a/b#page").uri == "https://a/b#page"


async def test_without_a_cache_nothing_is_fetched(tmp_path: Path, server: Faulty) -> None:
    stager = Stager(FolderBlobs(tmp_path), guard=Guard(hosts=["127.0.0.1"]))
    with pytest.raises(HeadraceError, match="nothing can be fetched here"):
        await stager.stage(server.url)
    assert server.asked == []
