"""What is wrong here, and how to mend it: ``headrace doctor``. It looks and changes nothing but a file of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec
from msgspec import Struct

from functions.sites import ENDED, SILENT, UNHEARD, WORK_FOLDER
from headrace import groups
from headrace.clock import parse_instant
from headrace.errors import HeadraceError
from headrace.model import Audit, SiteView
from headrace.render import seconds
from infra.embedded import monitor
from infra.programs import nats_program, redis_program
from infra.settings import MIB, Settings
from infra.staging import FREE_BYTES_MIN, SHARED_MEMORY
from infra.up import Servers
from streams.topology import DEFAULT_TENANT, LANES, STREAM, jobs_of, lane_of
from workers.watch import LOOK_S

T = TypeVar("T")

PYTHON_MIN = (3, 11)
NATS_MIN = (2, 15)
REDIS_MIN = (6, 2)
PACKAGES = ("aiohttp", "msgspec", "nats-py", "redis", "uvloop", "structlog", "prometheus-client")
FILES_MIN = 1024
SYNC_TRIES = 20
SYNC_SLOW_S = 0.02
CLOCK_OFF_MAX_S = 1.0
ANSWER_S = 3.0
AUDIT_ROUNDS_MISSED_MAX = 6
NOT_UP_S_MAX = 3600.0


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing looked at. ``failed`` has to be mended, ``warning`` may be lived with; ``cure`` says how."""

    check: str
    state: Literal["ok", "warning", "failed"]
    detail: str
    cure: str = ""


class _Sites(Struct):
    sites: list[SiteView]


class _Incident(Struct):
    resource_uris: list[str]
    start: str
    end: str | None


Check = Callable[[Settings], Awaitable[Iterable[Finding]]]


def _ok(check: str, detail: str) -> Finding:
    return Finding(check=check, state="ok", detail=detail)


def _warning(check: str, detail: str, cure: str) -> Finding:
    return Finding(check=check, state="warning", detail=detail, cure=cure)


def _failed(check: str, detail: str, cure: str) -> Finding:
    return Finding(check=check, state="failed", detail=detail, cure=cure)


async def examine(settings: Settings) -> list[Finding]:
    """Look at everything and return what was found, in the order of the checks."""
    found: list[Finding] = []
    for check in CHECKS:
        found += await check(settings)
    return found


def as_json(findings: list[Finding]) -> str:
    """Return the findings as JSON."""
    return msgspec.json.format(msgspec.json.encode({"findings": findings}), indent=2).decode()


def as_text(findings: list[Finding]) -> str:
    """Return the findings for a person: a line each, and the cure below it where there is one."""
    marks = {"ok": "ok      ", "warning": "warning ", "failed": "FAILED  "}
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{marks[finding.state]}{finding.check}: {finding.detail}")
        if finding.cure:
            lines.append(f"        cure: {finding.cure}")
    return "\n".join(lines)


# ---------------------------------------------------------------- this machine


async def _versions(settings: Settings) -> Iterable[Finding]:
    python = _ok("python", platform.python_version())
    if sys.version_info[:2] < PYTHON_MIN:
        python = _failed("python", python.detail, "Make a new environment with Python 3.11 or newer.")
    return [
        python,
        await _program("nats-server", nats_program, "-v", NATS_MIN, "pip install 'headrace[platform]' brings it."),
        await _program("redis-server", redis_program, "--version", REDIS_MIN, "apt-get install redis-server"),
        _packages(),
    ]


def _packages() -> Finding:
    missing = []
    for name in PACKAGES:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return _failed("packages", f"missing: {', '.join(missing)}", "pip install 'headrace[platform]'")
    return _ok("packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))


async def _program(check: str, find: Callable[[], Path], option: str, least: tuple[int, int], cure: str) -> Finding:
    try:
        path = find()
        process = await asyncio.create_subprocess_exec(
            str(path), option, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said = (await process.communicate())[0].decode("utf-8", "replace")
    except HeadraceError as error:
        return _failed(check, str(error), error.hint)
    except OSError as error:
        return _failed(check, f"cannot be run: {error.strerror}", cure)
    match = re.search(r"v=?(\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        return _warning(check, f"{path} does not say its version", cure)
    version = ".".join(match.groups())
    if (int(match[1]), int(match[2])) < least:
        return _failed(check, f"{path} is {version}; {least[0]}.{least[1]} is the oldest that will do", cure)
    return _ok(check, f"{version} ({path})")


async def _process_limits(settings: Settings) -> Iterable[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at most")
    if soft != resource.RLIM_INFINITY and soft < FILES_MIN:
        files = _warning("open files", f"{soft} at most", f"ulimit -n {4 * FILES_MIN} before `headrace up`")
    return [files, await _tasks(settings)]


async def _tasks(settings: Settings) -> Finding:
    """Say what holds a function to its number of processes, should one start them without end."""
    most = f"{settings.child_tasks_max:,} processes and threads"
    base = await asyncio.to_thread(groups.find)
    if base is not None:
        return _ok("processes", f"the kernel holds each function to {most}, by control groups in {base}")
    return _warning(
        "processes",
        f"a worker counts every {LOOK_S:g} s and ends a function that has more than {most}",
        "For the kernel to refuse them: run it as a service of systemd with Delegate=pids and DelegateSubgroup=main.",
    )


async def _port(settings: Settings) -> Iterable[Finding]:
    if _read_url(settings) or settings.port == 0:
        return []
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            cure = "Stop what listens there, or use --port 0."
            if error.errno == errno.EACCES:
                cure = "Use a port above 1023."
            return [_failed("port", f"{settings.port} on {settings.host}: {error.strerror}", cure)]
    return [_ok("port", f"{settings.port} on {settings.host} is free")]


async def _disk(settings: Settings) -> Iterable[Finding]:
    folder = _nearest(settings.data_dir.absolute())
    free = shutil.disk_usage(folder).free
    where = f"{free // MIB:,} MiB free on the disk of {folder}"
    wanted = settings.disk_bytes_min + settings.log_bytes_max
    if free < settings.disk_bytes_min:
        cure = "Free some space, or name another folder with --data or HEADRACE_DATA_DIR."
        found = [_failed("disk", f"{where}; triggers are refused", cure)]
    elif free < wanted:
        cure = f"The log may grow to {settings.log_bytes_max // MIB:,} MiB: free some space, or lower log_bytes_max."
        found = [_warning("disk", where, cure)]
    else:
        found = [_ok("disk", where)]
    return [*found, await asyncio.to_thread(_syncs, folder)]


def _syncs(folder: Path) -> Finding:
    """Time what each acceptance waits for: a small write that has reached the disk."""
    took: list[float] = []
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for _ in range(SYNC_TRIES):
                began = time.perf_counter()
                file.write(b"x" * 256)
                file.flush()
                os.fsync(file.fileno())
                took.append(time.perf_counter() - began)
    except OSError as error:
        return _failed("disk sync", f"{folder}: {error.strerror}", "Use a folder that this user can write to.")
    middle = sorted(took)[SYNC_TRIES // 2]
    detail = f"a write reaches the disk in {middle * 1000:.1f} ms (median of {SYNC_TRIES})"
    if middle > SYNC_SLOW_S:
        return _warning("disk sync", detail, "Each acceptance waits for it: use a local SSD, not a network disk.")
    return _ok("disk sync", detail)


async def _memory(settings: Settings) -> Iterable[Finding]:
    cure = f"Batches are staged on disk, which is slower: mount a tmpfs of {2 * FREE_BYTES_MIN // MIB} MiB at /dev/shm."
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return [_warning("staging memory", f"there is no {SHARED_MEMORY}", cure)]
    if free < FREE_BYTES_MIN:
        return [_warning("staging memory", f"{free // MIB} MiB free in {SHARED_MEMORY}", cure)]
    return [_ok("staging memory", f"{free // MIB:,} MiB free in {SHARED_MEMORY}")]


async def _rights(settings: Settings) -> Iterable[Finding]:
    found = []
    data = settings.data_dir
    private = [settings.token_path(), *(data / "run").glob("*.password"), *(data / "run").glob("*.json")]
    private += [file for file in (settings.nats_password_file, settings.redis_password_file) if file is not None]
    for path in dict.fromkeys([data, data / "run", data / "nats", *private]):
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            mode = stat.S_IMODE(state.st_mode)
            if state.st_uid not in (os.geteuid(), 0):
                found.append(
                    _failed("rights", f"{path} belongs to user {state.st_uid}", f"chown {os.geteuid()} {path}")
                )
            elif mode & 0o077 and path in private:
                found.append(_failed("rights", f"{path} is open to others (mode {mode:04o})", f"chmod 600 {path}"))
            elif mode & 0o077:
                found.append(_warning("rights", f"{path} is open to others (mode {mode:04o})", f"chmod 700 {path}"))
    return found or [_ok("rights", f"what is in {data} is closed to others" if data.is_dir() else f"no {data} yet")]


# ---------------------------------------------------------------- the platform that runs


async def _gateway(settings: Settings) -> Iterable[Finding]:
    url = _read_url(settings)
    if not url:
        return [_warning("platform", f"none runs on {settings.data_dir}", "Start it with `headrace up`.")]
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session,
            session.get(f"{url}/readyz") as response,
        ):
            said = await response.text()
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return [_failed("platform", f"{url} does not answer", "Start it again with `headrace up`.")]
    if response.status != 200:
        return [_failed("platform", f"{url} takes no triggers: {ascii(said)[:300]}", "See the other findings.")]
    return [_ok("platform", f"{url} takes triggers")]


async def _asked(settings: Settings, path: str, kind: type[T]) -> T | None:
    """Return what the platform tells of itself, None where it does not."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session,
            session.get(
                _read_url(settings) + path, headers={"Authorization": f"Bearer {settings.token()}"}
            ) as response,
        ):
            said = await response.read()
        return msgspec.json.decode(said, type=kind) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError, HeadraceError):
        return None


async def _sites(settings: Settings) -> Iterable[Finding]:
    if not _read_url(settings):
        return []
    found = await _asked(settings, "/v1/sites", _Sites)
    if found is None or not found.sites:
        return []
    incidents = await _asked(settings, "/status/incidents", list[_Incident]) or []
    began = {uri: parse_instant(each.start) for each in incidents if each.end is None for uri in each.resource_uris}
    now = time.time()
    since = {s.name: parse_instant(s.since) if s.since and s.status != "up" else now for s in found.sites}
    return [site_finding(s, now - began.get(f"/status/resources/{s.name}", since[s.name])) for s in found.sites]


def site_finding(site: SiteView, lasts_s: float = 0.0) -> Finding:
    """Return how a site is, and what to do where it is not up; ``lasts_s``: for how long it has not been."""
    free, total = site.gpus.get("free"), site.gpus.get("total")
    gpus = f", {free} of {total} GPUs free" if total and free is not None else ""
    kind = f" ({site.kind})" if site.kind else ""
    lasts = f", for {seconds(lasts_s)}" if lasts_s >= 1.0 else ""
    detail = f"{site.name}{kind} is {site.status}{lasts}{f': {site.detail}' if site.detail else ''}{gpus}"
    if site.status == "up" or site.detail == ENDED:  # its jobs go elsewhere, and it is forgotten by itself
        return _ok("site", detail)
    if site.status != "degraded" and lasts_s >= NOT_UP_S_MAX:
        return _failed("site", detail, f"{_cure_of_site(site)} Is it no more: `headrace site remove {site.name}`.")
    return _warning("site", detail, _cure_of_site(site))


def _cure_of_site(site: SiteView) -> str:
    if site.detail == UNHEARD:
        return f"Start `headrace agent --site {site.name}`; or cancel the runs, if its name is a slip of the pen."
    if site.detail == SILENT:
        return f"Is `headrace agent --site {site.name}` running, and does it reach the log?"
    if site.detail.startswith(WORK_FOLDER):
        return "Free some space there, or mount it again: jobs wait for that. `keep_s` of its file says what is kept."
    return "Its batch system says more: its nodes, its queue, its controller."


async def _audit(settings: Settings) -> Iterable[Finding]:
    if not _read_url(settings):
        return []
    found = await _asked(settings, "/v1/audit", Audit)
    if found is None:
        return [
            _warning("runs", "nobody audited them yet", "Wait a moment; if it stays so, look into logs/ledger.log.")
        ]
    counts = f"{found.accepted:,} accepted, {found.ended:,} ended, {found.running:,} on their way ({found.at})"
    age_s = time.time() - parse_instant(found.at)
    if age_s > AUDIT_ROUNDS_MISSED_MAX * settings.audit_every_s:
        return [_warning("runs", f"{counts}: last audited {age_s:.0f} s ago", "Is a `headrace ledger` running?")]
    if found.difference == 0:
        return [_ok("runs", counts)]
    named = [*found.lost_runs, *found.stuck_runs, *found.missed_runs]
    detail = f"{counts}; lost {found.lost}, stuck {found.stuck}, missed {found.missed}: {', '.join(named)}"
    return [_failed("runs", detail, _cure_of(found))]


def _cure_of(found: Audit) -> str:
    """Say what to do about runs that will not end by themselves."""
    if found.lost or found.stuck:
        return (
            "`headrace run ID` shows how far each came; `headrace cancel ID` ends it, and its event sent again with an "
            "id of its own makes a new run. Please report it: this must not happen."
        )
    if found.missed:
        return "Empty the database of the read model (FLUSHDB): it is built anew from the log."
    return "Empty the database of the read model (FLUSHDB): its counts do not add up, and are made anew from the log."


async def _log(settings: Settings) -> Iterable[Finding]:
    address = settings.nats_monitor_url
    with contextlib.suppress(OSError, msgspec.ValidationError, msgspec.DecodeError):
        raw = (settings.data_dir / "run" / "servers.json").read_bytes()
        address = address or msgspec.json.decode(raw, type=Servers).nats_monitor_url
    if not address or (not settings.nats_monitor_url and not _read_url(settings)):
        return []
    state = await monitor(address, "/jsz?config=1&streams=1&consumers=1")
    config = state.get("config")
    if not config:
        cure = "Start the platform, or set HEADRACE_NATS_MONITOR_URL to its http address."
        return [_failed("log", f"the log's server does not answer at {address}", cure)]
    return [
        _synced(config, settings),
        await _clock(address),
        _tenants(state),
        *_jobs(state),
    ]


def _consumers(state: dict[str, Any]) -> Iterable[dict[str, Any]]:
    streams = [s for account in state.get("account_details", []) for s in account.get("stream_detail", [])]
    return (c for s in streams if s.get("name") == STREAM for c in s.get("consumer_detail", []))


def _jobs(state: dict[str, Any]) -> Iterable[Finding]:
    """Yield the sites for which jobs wait and whose agents ask for none."""
    waiting: Counter[str] = Counter()
    asked: set[str] = set()
    for consumer in _consumers(state):
        found = jobs_of(str(consumer.get("name", "")))
        if found is not None:
            waiting[found.site] += int(consumer.get("num_pending", 0)) + int(consumer.get("num_ack_pending", 0))
            if consumer.get("num_waiting"):
                asked.add(found.site)
    for site, number in sorted(waiting.items()):
        if number and site not in asked:
            told = f"{number:,} wait for {site}, and no agent asks for them"
            yield _warning("jobs", told, f"Start `headrace agent --site {site}`, or `headrace site remove {site}`.")


def _tenants(state: dict[str, Any]) -> Finding:
    """Say who shares the platform, and whose work waits or runs: told by the lanes of the log."""
    found: dict[str, int] = {}
    lanes: Counter[str] = Counter()
    for consumer in _consumers(state):
        lane = lane_of(str(consumer.get("name", "")))
        if lane is not None:
            work = int(consumer.get("num_pending", 0)) + int(consumer.get("num_ack_pending", 0))
            found[lane.tenant] = found.get(lane.tenant, 0) + work
            lanes[lane.tenant] += 1
    detail = ", ".join(f"{name} ({work:,} waiting or running)" for name, work in sorted(found.items()))
    broken = sorted(name for name, number in lanes.items() if number < LANES)
    if broken or DEFAULT_TENANT not in found:
        missing = ", ".join(broken or [DEFAULT_TENANT])
        return _failed(
            "tenants", f"lanes are missing of {missing}", "`headrace setup` makes them again; then nothing is lost."
        )
    return _ok("tenants", detail)


def _synced(config: dict[str, object], settings: Settings) -> Finding:
    if config.get("sync_always"):
        return _ok("sync_interval", "always: what is acknowledged is on disk")
    cure = "Set `sync_interval: always` in the jetstream block of nats-server's configuration and restart it."
    seconds = config.get("sync_interval")
    every = f"every {seconds / 1e9:g} s" if isinstance(seconds, int | float) else "now and then"
    detail = f"{every}: a power cut loses what was acknowledged since"
    if settings.log_replicas >= 3:
        return _warning("sync_interval", f"{detail}, unless the copies are on separate power", cure)
    return _failed("sync_interval", detail, cure)


async def _clock(address: str) -> Finding:
    """Compare with the clock that stamps the log: deadlines are counted by one and kept by the other."""
    before = time.time()
    now = (await monitor(address, "/varz")).get("now", "")
    after = time.time()
    try:
        theirs = datetime.fromisoformat(str(now)).timestamp()
    except ValueError:
        return _warning("clock", "the log's server does not tell its time", "Is it nats-server 2.15 or newer?")
    off_s = max(before - theirs, theirs - after, 0.0)
    if off_s > CLOCK_OFF_MAX_S:
        cure = "Deadlines are off by as much: run an NTP service on both machines."
        return _failed("clock", f"{off_s:.1f} s away from the log's", cure)
    return _ok("clock", "agrees with the log's")


def _read_url(settings: Settings) -> str:
    try:
        return (settings.data_dir / "url").read_text("utf-8").strip()
    except OSError:
        return ""


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


CHECKS: tuple[Check, ...] = (
    _versions,
    _process_limits,
    _port,
    _disk,
    _memory,
    _rights,
    _gateway,
    _audit,
    _sites,
    _log,
)
