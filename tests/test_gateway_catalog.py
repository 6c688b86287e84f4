"""Functions, routes and uploads over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.spool import Announced, Spool
from headrace.errors import NotFound
from headrace.model import Code
from headrace.wire import Expected, ForecastRow, decode
from streams.blobs import FolderBlobs
from tests.doors import CODE, Door, Doors


@pytest.fixture
async def door(doors: Doors) -> Door:
    return await doors.open(upload_part_bytes=100_000)


# ---------------------------------------------------------------- functions


async def test_the_same_code_is_the_same_version_and_other_code_another(door: Door) -> None:
    status, one, _ = await door.ask("PUT", "/v1/functions/f", json={"code": CODE, "doc": "Finds."})
    assert status == 201
    status, same, _ = await door.ask("PUT", "/v1/functions/f", json={"code": CODE})
    assert (status, same) == (200, one)
    status, other, _ = await door.ask("PUT", "/v1/functions/f", json={"code": CODE, "options": {"retries": 1}})
    assert status == 201
    assert other["version"] != one["version"]
    assert set(door.tables.versions.rows) == {f"f.{one['version']}", f"f.{other['version']}"}
    status, found, _ = await door.ask("GET", "/v1/functions/f")
    assert (found["version"], found["source"]) == (other["version"], "def f(x):\n    return x\n")
    status, listed, _ = await door.ask("GET", "/v1/functions")
    assert [(f["name"], f["source"]) for f in listed["functions"]] == [("f", "")]


async def test_code_is_kept_as_bytes_and_never_opened(door: Door, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    code = {"kind": "pickle", "name": "f", "blob": base64.b64encode(pickle.dumps(Touch())).decode()}
    status, said, _ = await door.ask("PUT", "/v1/functions/f", json={"code": code})
    assert status == 201, said
    assert (await door.ask("GET", "/v1/functions/f"))[0] == 200
    kept = decode(await door.blobs.get(door.tables.functions.rows["f"].code_blob), Code)
    assert kept.blob == pickle.dumps(Touch())
    assert not canary.exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "code"),
        ({"code": {"kind": "lambda", "name": "f"}}, "kind"),
        ({"code": {"kind": "source", "name": "f"}}, "empty"),
        ({"code": CODE, "options": {"timeut": "3s"}}, "timeut"),
        ({"code": CODE, "options": {"timeout": "never"}}, "timeout"),
        ({"code": CODE, "options": {"retries": -1}}, "retries"),
        ({"code": CODE, "owner": "me"}, "owner"),
        ({"code": {"kind": "pickle", "name": "f", "blob": "!"}}, "blob"),
        ([], "object"),
    ],
)
async def test_what_is_wrong_with_a_function_is_named(door: Door, body: Any, said: str) -> None:
    problem = await door.problem(400, "PUT", "/v1/functions/f", json=body)
    assert said in problem.detail
    assert not door.tables.functions.rows


async def test_code_over_the_limit_is_too_large(door: Door) -> None:
    code = {**CODE, "files": {"user.py": "#" * (4 * 1024 * 1024 + 1)}}
    body = io.BytesIO(json.dumps({"code": code}).encode())
    await door.problem(413, "PUT", "/v1/functions/f", data=body)


async def test_a_function_that_is_not_there_is_a_404(door: Door) -> None:
    await door.problem(404, "GET", "/v1/functions/nope")
    await door.problem(400, "PUT", "/v1/functions/a.b", json={"code": CODE})


# ---------------------------------------------------------------- routes


async def test_a_route_is_made_changed_read_and_removed(door: Door) -> None:
    await door.ask("PUT", "/v1/functions/f", json={"code": CODE})
    rule = {"function": "f", "filter": {"type": "prefix:org."}, "deadline": "60s"}
    assert (await door.ask("PUT", "/v1/routes/r", json=rule))[0] == 201
    status, said, _ = await door.ask("PUT", "/v1/routes/r", json={**rule, "deadline": "30s"})
    assert (status, said) == (200, {"name": "r", "route": {**rule, "deadline": "30s"}})
    assert (await door.ask("GET", "/v1/routes/r"))[1] == said
    assert (await door.ask("GET", "/v1/routes"))[1] == {"routes": [said]}
    assert (await door.ask("DELETE", "/v1/routes/r"))[0] == 204
    await door.problem(404, "DELETE", "/v1/routes/r")
    await door.problem(404, "GET", "/v1/routes/r")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"function": "f", "filtr": {}}, 400, "filtr"),
        ({"function": "f", "filter": {"kind": "x"}}, 400, "kind"),
        ({"function": "f", "filter": {}}, 400, "filter"),
        ({"function": "f", "deadline": "soon"}, 400, "deadline"),
        ({"function": "f", "max_in_flight": 0}, 400, "max_in_flight"),
        ({"function": "f", "on_late": "panic"}, 400, "on_late"),
        ({"function": "a.b"}, 400, "a.b"),
        ({"function": "nope"}, 404, "nope"),
        ({}, 400, "function"),
    ],
)
async def test_what_is_wrong_with_a_route_is_named(door: Door, body: Any, status: int, said: str) -> None:
    await door.ask("PUT", "/v1/functions/f", json={"code": CODE})
    problem = await door.problem(status, "PUT", "/v1/routes/r", json=body)
    assert said in problem.detail
    assert problem.hint
    assert not door.tables.routes.rows


# ---------------------------------------------------------------- uploads


async def begin(door: Door, body: bytes, **more: Any) -> dict[str, Any]:
    status, said, _ = await door.ask("POST", "/v1/uploads", json={"size": len(body), **more})
    assert status == 201, said
    found: dict[str, Any] = said
    return found


async def put(part: dict[str, Any], body: bytes) -> int:
    async with aiohttp.ClientSession() as stranger, stranger.put(part["url"], data=body) as answer:
        return answer.status


def pieces(upload: dict[str, Any], body: bytes) -> list[tuple[dict[str, Any], bytes]]:
    start, found = 0, []
    for part in upload["parts"]:
        found.append((part, body[start : start + part["size"]]))
        start += part["size"]
    assert start == len(body)
    return found


async def test_an_upload_in_parts_becomes_a_blob_of_its_digest(door: Door) -> None:
    body = os.urandom(250_001)
    digest = hashlib.sha256(body).hexdigest()
    upload = await begin(door, body, sha256=digest.upper(), content_type="application/x-hdf5")
    assert [p["size"] for p in upload["parts"]] == [100_000, 100_000, 50_001]
    assert await asyncio.gather(*(put(part, piece) for part, piece in pieces(upload, body))) == [204] * 3
    for _ in range(2):  # an answer that was lost can be asked for again
        async with door.http.post(upload["complete"]) as answer:
            assert await answer.json() == {"uri": f"blob:{digest}", "size": len(body), "sha256": digest}
    assert await door.blobs.get(digest) == body


async def test_nothing_at_all_can_be_uploaded(door: Door) -> None:
    upload = await begin(door, b"")
    assert upload["parts"] == []
    async with door.http.post(upload["complete"]) as answer:
        assert (await answer.json())["sha256"] == hashlib.sha256(b"").hexdigest()


async def test_an_upload_is_complete_only_with_all_parts_and_the_right_digest(door: Door) -> None:
    body = b"x" * 150_000
    upload = await begin(door, body, sha256="0" * 64)
    (one, first), (two, second) = pieces(upload, body)
    path = upload["complete"].removeprefix(door.url)
    assert "2 of 2 parts" in (await door.problem(409, "POST", path)).detail
    assert await put(one, first) == 204
    assert "the first is 2" in (await door.problem(409, "POST", path)).detail
    assert await put(two, second) == 204
    assert "announced was 000" in (await door.problem(409, "POST", path)).detail


@pytest.mark.parametrize("body", [b"x" * 49_999, b"x" * 50_001, b""])
async def test_a_part_of_another_length_is_refused_and_does_not_count(door: Door, body: bytes) -> None:
    upload = await begin(door, b"x" * 50_000)
    [part] = upload["parts"]

    async def chunked() -> AsyncIterator[bytes]:
        yield body

    assert await put(part, body) == 400
    async with door.http.put(part["url"], data=chunked()) as answer:
        assert answer.status == 400
    await door.problem(409, "POST", upload["complete"].removeprefix(door.url))


async def test_a_signed_address_is_good_for_one_part_of_one_upload(door: Door) -> None:
    body = b"x" * 150_000
    one, other = await begin(door, body), await begin(door, body)
    url = one["parts"][0]["url"]
    for bad in (
        url.replace("/parts/1?", "/parts/2?"),
        url.replace(one["upload_id"], other["upload_id"]),
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.partition("?")[0],
        url.replace("expires=", "expires=9"),
        url.replace("/parts/1?", "/parts/-1?"),
        url.replace("/parts/1?", "/parts/x?"),
    ):
        assert await put({"url": bad}, body[:100_000]) == 401, bad


async def test_an_address_expires_and_so_does_the_upload(doors: Doors) -> None:
    door = await doors.open(upload_keep_seconds=-1.0)
    upload = await begin(door, b"x")
    assert await put(upload["parts"][0], b"x") == 401


async def test_a_completed_upload_cannot_be_written_to_any_more(door: Door) -> None:
    body = b"x" * 1000
    upload = await begin(door, body)
    [part] = upload["parts"]
    assert await put(part, body) == 204
    assert (await door.http.post(upload["complete"])).status == 200
    assert await put(part, b"y" * 1000) == 409
    assert await door.blobs.get(hashlib.sha256(body).hexdigest()) == body


async def test_an_upload_is_not_completed_while_a_part_is_being_written(door: Door) -> None:
    body = b"x" * 1000
    upload = await begin(door, body)
    [part] = upload["parts"]
    assert await put(part, body) == 204
    go_on, begun = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield body[:500]
        begun.set()
        await go_on.wait()
        yield body[500:]

    writing = asyncio.create_task(door.http.put(part["url"], data=slow()))
    await begun.wait()
    path = upload["complete"].removeprefix(door.url)
    while (await door.ask("POST", path))[0] == 200:  # the first bytes may still be on their way
        pytest.fail("it was completed while a part was being written")
    go_on.set()
    assert (await writing).status == 204
    assert (await door.ask("POST", path))[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"size": -1}, 400),
        ({"size": 1.5}, 400),
        ({"size": 1, "sha256": "xyz"}, 400),
        ({"size": 1, "sha256": "0" * 64 + "\n"}, 400),
        ({"size": 1, "content_type": "nonsense"}, 400),
        ({"size": 1, "path": "/etc/passwd"}, 400),
        ({"size": 2**50}, 413),
    ],
)
async def test_an_impossible_upload_is_refused(door: Door, body: Any, status: int) -> None:
    await door.problem(status, "POST", "/v1/uploads", json=body)


async def test_too_many_open_uploads_are_refused(doors: Doors) -> None:
    door = await doors.open(uploads_open_max=2)
    await begin(door, b"x")
    await begin(door, b"x")
    await door.problem(503, "POST", "/v1/uploads", json={"size": 1})


@pytest.mark.parametrize("name", ["0", "..", "x" * 32, "0" * 32, "%2e%2e"])
async def test_an_upload_that_is_not_there_is_a_404(door: Door, name: str) -> None:
    await door.problem(404, "POST", f"/v1/uploads/{name}/complete")


def test_what_has_expired_is_swept_and_what_has_not_stays(tmp_path: Path) -> None:
    spool = Spool(FolderBlobs(tmp_path))
    for name, expires_at in (("a" * 32, 100.0), ("b" * 32, 300.0)):
        spool.begin(name, Announced(size=10, part_bytes=5, expires_at=expires_at), 100.0)
    assert spool.reserved() == (2, 20)
    assert spool.sweep(200.0) == 1
    assert spool.announced("b" * 32).parts == 2
    with pytest.raises(NotFound):
        spool.announced("a" * 32)


async def test_a_function_tells_what_is_expected_of_it(door: Door) -> None:
    _, made, _ = await door.ask("PUT", "/v1/functions/f", json={"code": CODE})
    assert (await door.ask("GET", "/v1/functions/f"))[1]["expected"] == {}
    kinds = {
        f"run|{made['version']}||": Expected(1.0, 2.0, 3.0, 7),
        "run|||": Expected(9.0, 9.0, 9.0, 9),
        "rest|||": Expected(0.1, 0.2, 0.3, 4),
    }
    await door.tables.forecasts.put("f", ForecastRow(function="f", kinds=kinds, at=0.0))
    expected = {
        "run": {"p50_s": 1.0, "p90_s": 2.0, "p99_s": 3.0, "observations": 7},
        "rest": {"p50_s": 0.1, "p90_s": 0.2, "p99_s": 0.3, "observations": 4},
    }
    assert (await door.ask("GET", "/v1/functions/f"))[1]["expected"] == expected
    assert (await door.ask("GET", "/v1/functions"))[1]["functions"][0]["expected"] == expected
