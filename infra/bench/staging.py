"""Staging beside the plain tools: one large object down from and up to an S3 server, each in a process of its own.

``python -P -m infra.bench.staging [--size-mib 2048] [--rounds 3]`` starts Ceph's RADOS Gateway, fetches the object in
turn by Headrace's engine (checked by its SHA-256), by a plain boto3 script and, where it is installed, by obstore (both
unchecked), and prints seconds, MiB/s, the growth of memory, and the ratio to the quicker of the plain ones.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from infra.rgw import Rgw

BUCKET = "bench"
KEY = "large"
CHUNK_BYTES = 4 * 1024 * 1024
COMMON = """
import json, os, resource, sys, time
url, access, secret = os.environ["URL"], os.environ["ACCESS"], os.environ["SECRET"]
path, digest, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
def peak():
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
def cpu(): return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
def measured(act):
    before, used, began = peak(), cpu(), time.perf_counter()
    act()
    print(json.dumps({"s": time.perf_counter() - began, "growth_mib": peak() - before, "cpu_s": cpu() - used}))
"""
HEADRACE = """
import threading
from pathlib import Path
from streams.s3 import Access, Bucket, S3Blobs, Store
store = Store(Access(endpoint_url=url, access_key=access, secret_key=secret))
store.size("bench", "large")
"""
ENGINE = {
    "headrace": HEADRACE
    + """
import asyncio
from workers.cache import Cache
from workers.guard import Guard
from workers.staging import Stager
stager = Stager(
    None, cache=Cache(Path(path + ".cache"), bytes_max=64 << 30), guard=Guard(buckets=["bench"]), objects=store.link
)
def down():
    held = asyncio.run(stager.stage(f"s3://bench/large#sha256={digest}"))
    assert held.path.stat().st_size == size
measured(down)
""",
    "boto3": """
import boto3
from botocore.config import Config
client = boto3.client(
    "s3", endpoint_url=url, aws_access_key_id=access, aws_secret_access_key=secret, region_name="us-east-1",
    config=Config(s3={"addressing_style": "path"}),
)
client.head_object(Bucket="bench", Key="large")
measured(lambda: client.download_file("bench", "large", path))
""",
    "obstore": """
import obstore
from obstore.store import S3Store
store = S3Store(
    "bench", endpoint=url, access_key_id=access, secret_access_key=secret, region="us-east-1",
    client_options={"allow_http": True},
)
obstore.head(store, "large")
def down():
    with open(path, "wb") as file:
        for chunk in obstore.get(store, "large").stream(min_chunk_size=4 << 20):
            file.write(chunk)
measured(down)
""",
}
UP = {
    "headrace": HEADRACE
    + """
import asyncio
blobs = S3Blobs(Bucket(store, "bench", f"up-{os.getpid()}"), Path(path + ".incoming"))
measured(lambda: asyncio.run(blobs.put_file(Path(path))))
""",
    "boto3": ENGINE["boto3"].replace(
        'client.download_file("bench", "large", path)', 'client.upload_file(path, "bench", f"up-{os.getpid()}")'
    ),
}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description="Staging beside boto3 and obstore.")
    options.add_argument("--size-mib", type=int, default=2048)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-staging-") as folder, Rgw(Path(folder)) as rgw:
        figures = measure(rgw, Path(folder), given.size_mib * 1024 * 1024, given.rounds)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(rgw: Rgw, folder: Path, size: int, rounds: int) -> dict[str, object]:
    """Return the figures of all tools, by direction and tool."""
    from streams.s3 import Access, Bucket, Store

    source = folder / "source"
    digest = _make(source, size)
    store = Store(Access(endpoint_url=rgw.url, access_key=rgw.access_key, secret_key=rgw.secret_key))
    store.call("create_bucket", Bucket=BUCKET)
    with source.open("rb") as file:
        Bucket(store, BUCKET).send(KEY, file.fileno(), size)
    tools = ["headrace", "boto3", *(["obstore"] if importlib.util.find_spec("obstore") else [])]
    down: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    up: dict[str, list[dict[str, float]]] = {name: [] for name in UP}
    for number in range(rounds):
        for name in (*tools[number % len(tools) :], *tools[: number % len(tools)]):  # nobody is always the first
            down[name].append(_run(ENGINE[name], rgw, folder / "down", digest, size))
    for _ in range(max(1, rounds - 1)):
        for name in UP:
            up[name].append(_run(UP[name], rgw, source, digest, size))
    return {"size_bytes": size, "down": _told("down", down, size), "up": _told("up", up, size)}


def _make(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, size, CHUNK_BYTES):
            chunk = os.urandom(min(CHUNK_BYTES, size - at))
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _run(text: str, rgw: Rgw, path: Path, digest: str, size: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMON + text, str(path), digest, str(size)],
        env={
            **os.environ,
            "URL": rgw.url,
            "ACCESS": rgw.access_key,
            "SECRET": rgw.secret_key,
            "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    if path.name == "down":
        path.unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", f"{path}.cache"], check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _told(direction: str, runs: dict[str, list[dict[str, float]]], size: int) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(r["s"] for r in found) for name, found in runs.items()}
    best = min(s for name, s in medians.items() if name != "headrace")
    told = {}
    for name, found in runs.items():
        told[name] = {
            "median_s": round(medians[name], 2),
            "mib_per_s": round(size / 2**20 / medians[name], 1),
            "growth_mib": round(max(r["growth_mib"] for r in found), 1),
            "cpu_s": round(statistics.median(r["cpu_s"] for r in found), 2),
            "to_boto3": round(medians["boto3"] / medians[name], 2),
            "to_quickest_plain": round(best / medians[name], 2),
        }
        print(f"{direction:5} {name:9}", json.dumps(told[name]), [round(r["s"], 2) for r in found], flush=True)
    return told


if __name__ == "__main__":
    main()
