"""A whole platform on a bucket: data goes straight there and back, and functions never see the keys."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace import Client
from infra.rgw import Rgw
from tests.platforms import UpProcess
from tests.test_blobs import open_bucket

BODY = random.Random(9).randbytes(300_000)

FUNCTIONS = """
import os
from headrace import Context, function

@function
def turn(frames: dict, ctx: Context) -> dict:
    path = ctx.stage(frames["uri"])
    made = ctx.store(bytes(reversed(path.read_bytes())), "turned")
    keys = [name for name in os.environ if "AWS" in name and "KEY" in name]
    return {"uri": made, "size": path.stat().st_size, "keys": keys}

@function
def look(data: dict, ctx: Context) -> str:
    try:
        ctx.stage(data["uri"])
    except Exception as error:
        return str(error)
"""


@pytest.fixture(scope="module")
def lab(rgw: Rgw, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    folder = tmp_path_factory.mktemp("lab")
    bucket = open_bucket(rgw)
    process = UpProcess(
        folder / "headrace",
        env={
            "HEADRACE_BLOBS_URL": f"s3://{bucket.name}/{bucket.prefix}",
            "HEADRACE_S3_URL": rgw.url,
            "HEADRACE_S3_CREDENTIALS_FILE": str(rgw.credentials_file(folder / "keys")),
            "AWS_ACCESS_KEY_ID": "AKIAOFTHEOPERATOR",
        },
    )
    try:
        yield process.wait_ready()
    finally:
        process.end()


def test_data_goes_to_a_function_and_back_by_the_bucket(lab: UpProcess, tmp_path: Path) -> None:
    file = tmp_path / "functions_file.py"
    file.write_text(FUNCTIONS)
    data = tmp_path / "frames.h5"
    data.write_bytes(BODY)
    with Client(lab.url, lab.token) as client:
        subprocess.run(
            [str(Path(sys.executable).parent / "headrace"), "deploy", str(file)],
            env={**os.environ, "HEADRACE_URL": lab.url, "HEADRACE_TOKEN": lab.token},
            check=True,
            capture_output=True,
        )
        uri = client.upload(data)
        assert uri.startswith("blob:")
        client.route("turn", function="turn")
        client.route("look", function="look")
        result = client.trigger("turn", {"uri": uri}).result(timeout=60)
        assert result["size"] == len(BODY)
        assert result["keys"] == []
        again = client.trigger("turn", {"uri": result["uri"]}).result(timeout=60)
        assert again["uri"] != result["uri"]
        refused = client.trigger("look", {"uri": "http://169.254.169.254/latest/"}).result(timeout=60)
        assert "must not be fetched from" in refused
    assert not [p for p in (lab.data / "blobs").rglob("*") if p.is_file()]  # nothing of it stayed with the gateway


def test_no_key_is_seen_in_logs_or_process_lists(lab: UpProcess, rgw: Rgw) -> None:
    told = [path.read_bytes() for path in (lab.data / "logs").iterdir()] + [lab.output().encode()]
    told += [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert all(rgw.secret_key.encode() not in text for text in told)
