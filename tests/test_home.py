"""Where bytes are kept is told by the log, and a process that keeps them elsewhere does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from infra import home, rights, siteusers
from infra.embedded import NatsServer
from infra.rgw import Rgw
from infra.services import setup
from infra.settings import BadSetting, Settings
from infra.site import LOCAL
from infra.stores import Stores
from infra.up import Servers
from streams import topology
from streams.link import Link
from tests.platforms import UpProcess
from tests.test_blobs import open_bucket


def settings(server: NatsServer, data: Path, **changes: object) -> Settings:
    """Return the settings of one who may set up the log, and keeps everything else in a folder."""
    options = {"nats_user": rights.ADMIN, "nats_password_file": server.password_file(rights.ADMIN), **changes}
    return msgspec.convert({"nats_url": server.url, "data_dir": data, **options}, Settings)


async def told(link: Link, found: Settings) -> str | None:
    """Return what a process of these settings would end with, None where it serves."""
    try:
        await home.check(link, Stores(found), "agent")
    except BadSetting as error:
        return f"{error} {error.hint}"
    return None


async def test_a_process_that_keeps_bytes_elsewhere_is_told_where_and_what_to_set(
    link: Link, nats_server: NatsServer, tmp_path: Path
) -> None:
    ours, theirs = settings(nats_server, tmp_path / "a"), settings(nats_server, tmp_path / "b")
    assert await told(link, theirs) is None  # a log that an older release has set up says nothing of it
    await setup(ours)
    assert await told(link, ours) is None
    said = await told(link, theirs)
    assert said is not None
    assert str(tmp_path / "a" / "blobs") in said
    assert str(tmp_path / "b" / "blobs") in said
    assert "HEADRACE_BLOBS_DIR" in said
    seen = settings(nats_server, tmp_path / "b", blobs_dir=tmp_path / "a" / "blobs")
    assert await told(link, seen) is None


async def test_the_same_folder_by_another_path_is_the_same_store(
    link: Link, nats_server: NatsServer, tmp_path: Path
) -> None:
    await setup(settings(nats_server, tmp_path / "a"))
    (tmp_path / "mounted").symlink_to(tmp_path / "a")
    assert await told(link, settings(nats_server, tmp_path / "mounted")) is None


async def test_a_store_that_was_emptied_where_it_is_stays_the_store(
    link: Link, nats_server: NatsServer, tmp_path: Path
) -> None:
    ours = settings(nats_server, tmp_path / "a")
    await setup(ours)
    (mark,) = [path for path in (tmp_path / "a" / "blobs").rglob("*") if path.is_file()]
    mark.unlink()
    assert await told(link, ours) is None
    assert mark.is_file()


async def test_setup_moves_the_store_only_where_it_is_told_to(
    link: Link, nats_server: NatsServer, tmp_path: Path
) -> None:
    ours = settings(nats_server, tmp_path / "a")
    await setup(ours)
    await setup(settings(nats_server, tmp_path / "b", log_keep_s=3600.0))  # of one who only changes the log
    await topology.ensure(link, topology.Limits())
    assert await told(link, ours) is None
    moved = settings(nats_server, tmp_path / "b", blobs_dir=tmp_path / "new")
    await setup(moved)
    assert await told(link, moved) is None
    assert str(tmp_path / "new") in (await told(link, ours) or "")


async def test_a_bucket_is_told_with_its_settings(
    link: Link, nats_server: NatsServer, rgw: Rgw, tmp_path: Path
) -> None:
    bucket = open_bucket(rgw)
    keys = rgw.credentials_file(tmp_path / "keys")
    shared = {"blobs_url": f"s3://{bucket.name}/{bucket.prefix}", "s3_url": rgw.url, "s3_credentials_file": keys}
    await setup(settings(nats_server, tmp_path / "a", **shared))
    assert await told(link, settings(nats_server, tmp_path / "b", **shared)) is None
    said = await told(link, settings(nats_server, tmp_path / "b"))
    assert said is not None
    assert f"bucket {shared['blobs_url']} at {rgw.url}" in said
    assert "HEADRACE_S3_CREDENTIALS_FILE" in said


async def test_a_store_that_is_away_keeps_nobody_from_starting(
    link: Link, nats_server: NatsServer, rgw: Rgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "LOOK_S", 0.2)
    keys = rgw.credentials_file(tmp_path / "keys")
    away = {"blobs_url": "s3://headrace/x", "s3_url": "http://127.0.0.1:9", "s3_credentials_file": keys}
    await setup(settings(nats_server, tmp_path / "a"))
    assert await told(link, settings(nats_server, tmp_path / "b", **away)) is None
    await setup(settings(nats_server, tmp_path / "b", **away))
    assert await told(link, settings(nats_server, tmp_path / "a")) is None


def test_an_agent_in_another_folder_ends_with_the_words(shared_platform: UpProcess, tmp_path: Path) -> None:
    run = shared_platform.data / "run"
    servers = msgspec.json.decode((run / "servers.json").read_bytes(), type=Servers)
    site = tmp_path / "local.toml"
    site.write_text(f'kind = "local"\nwork = "{tmp_path}/work"\n')
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "infra", "agent", "--site", LOCAL, "--config", str(site)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "HEADRACE_NATS_URL": servers.nats_url,
            "HEADRACE_NATS_PASSWORD_FILE": str(siteusers.kept(shared_platform.data, LOCAL)),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 2
    assert f"{tmp_path}/.headrace/blobs" in ran.stderr
    assert f"{shared_platform.data}/blobs" in ran.stderr
    assert "HEADRACE_BLOBS_DIR" in ran.stderr
    assert "Traceback" not in ran.stderr
