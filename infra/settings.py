"""What an operator can set: one struct, read once from a TOML file and the environment.

``HEADRACE_CONFIG`` names the file; its keys are the names below. An environment variable is the same name in capitals
behind ``HEADRACE_`` and wins over the file; a command-line option wins over both. A name that is not known is an error:
a misspelt limit must not be a limit that silently does not hold.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.clock import parse_duration
from headrace.errors import BadRequest, HeadraceError
from infra.credentials import read_secret

PREFIX = "HEADRACE_"
CONFIG = "HEADRACE_CONFIG"
OPTIONS = {
    "port": "--port",
    "data_dir": "--data",
    "worker_slots": "--workers",
    "site": "--site",
    "site_config": "--config",
}
FOR_CLIENTS = frozenset({"HEADRACE_URL", "HEADRACE_TOKEN"})

KIB, MIB, GIB = 1024, 1024**2, 1024**3
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1024**4,
}


class BadSetting(HeadraceError):
    """A setting is unknown, or its value cannot be used; the message names it."""

    title = "A setting cannot be used"


Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=3660 * 86400.0)]
Bytes = Annotated[int, Meta(ge=1)]


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. Passwords and tokens are never here, only the files that hold them."""

    data_dir: Annotated[
        Path, Meta(description="Folder of everything that is kept: log, blobs, token, server logs.")
    ] = Path(".headrace")
    host: Annotated[str, Meta(description="Address the gateway listens on.")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port the gateway listens on; 0 takes a free one.")] = 8080
    public_url: Annotated[
        str,
        Meta(
            description="Where callers and the jobs of sites reach the gateway, if that is not HOST and PORT. Without "
            "it jobs on other machines report nothing, and their ends are found by asking the batch system."
        ),
    ] = ""
    token_file: Annotated[
        Path | None,
        Meta(description="File with the bearer token that callers need (mode 0600). Default: DATA_DIR/token."),
    ] = None
    nats_url: Annotated[str, Meta(description="Servers that hold the log; several are parted by commas.")] = (
        "nats://127.0.0.1:4222"
    )
    nats_user: Annotated[
        str, Meta(description="User on the log's servers. Default: the role of the process; of an agent `agent-SITE`.")
    ] = ""
    nats_password_file: Annotated[Path | None, Meta(description="File with that user's password (mode 0600).")] = None
    nats_monitor_url: Annotated[
        str, Meta(description="Monitoring address of the log's server, asked by `headrace doctor`; may be empty.")
    ] = ""
    redis_url: Annotated[str, Meta(description="The server of the read model.")] = "redis://127.0.0.1:6379/0"
    redis_password_file: Annotated[Path | None, Meta(description="File with its password (mode 0600).")] = None
    blobs_dir: Annotated[
        Path | None,
        Meta(description="Folder of payloads over 64 KiB and of code; shared by all. Default: DATA_DIR/blobs."),
    ] = None
    blobs_url: Annotated[
        str,
        Meta(description="Bucket for them instead: s3://BUCKET/PREFIX. Uploads go straight to it, past the gateway."),
    ] = ""
    s3_url: Annotated[str, Meta(description="Address of the S3 server; empty: AWS.")] = ""
    s3_public_url: Annotated[
        str, Meta(description="Where callers reach the same server, if that is another address.")
    ] = ""
    s3_region: Annotated[str, Meta(description="Region of the S3 server.")] = "us-east-1"
    s3_credentials_file: Annotated[
        Path | None,
        Meta(
            description="File with its keys, in the form of the AWS command line (mode 0600). Default: the standard "
            "chain of the AWS SDK."
        ),
    ] = None
    s3_ca_file: Annotated[
        Path | None,
        Meta(description="Certificates (PEM) that its own must lead to, instead of the public ones."),
    ] = None
    s3_proxy_url: Annotated[
        str, Meta(description="HTTP proxy, http://HOST:PORT, that leads to it by https. Default: straight.")
    ] = ""
    cache_dir: Annotated[
        Path | None, Meta(description="Folder of what was fetched for functions. Default: DATA_DIR/cache.")
    ] = None
    cache_bytes_max: Annotated[
        Bytes, Meta(description="What may lie in it; what was used longest ago leaves first.")
    ] = 32 * GIB
    stage_bytes_max: Annotated[Bytes, Meta(description="Size of the largest thing that is fetched.")] = 16 * GIB
    stage_hosts: Annotated[
        str,
        Meta(
            description="Own hosts, addresses and networks, parted by commas, that functions may have fetched from "
            "although they are private, by plain http too."
        ),
    ] = ""
    stage_ca_file: Annotated[
        Path | None,
        Meta(description="Certificates (PEM) that are trusted besides the public ones when something is fetched."),
    ] = None
    stage_proxy_url: Annotated[
        str,
        Meta(
            description="HTTP proxy, http://HOST:PORT, by which all but STAGE_HOSTS is fetched. Default: straight; "
            "variables such as HTTPS_PROXY do not count."
        ),
    ] = ""
    stage_buckets: Annotated[
        str,
        Meta(
            description="Buckets (BUCKET or BUCKET/PREFIX, parted by commas) whose objects functions may have staged."
        ),
    ] = ""
    stage_folders: Annotated[
        str, Meta(description="Folders, parted by commas, from which functions may have files staged by file: URIs.")
    ] = ""
    log_keep_s: Annotated[
        Seconds, Meta(description="How long the log, and with it every run, is kept; also the memory for duplicates.")
    ] = 7 * 86400.0
    work_age_max_s: Annotated[
        Seconds,
        Meta(description="How long work may wait for a worker before it is `dead`; at most half of LOG_KEEP_S."),
    ] = 86400.0
    log_bytes_max: Annotated[
        Bytes, Meta(description="Size of the log at which triggers are refused with 503 until old ones have left.")
    ] = 8 * GIB
    log_share_max: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Meta(
            description="Share of log_bytes_max, up to 1, from which on triggers are refused with 503; the rest is for "
            "the ends of what was accepted."
        ),
    ] = 0.9
    log_replicas: Annotated[
        Annotated[int, Meta(ge=1, le=5)], Meta(description="Copies of the log: 1 on one server, 3 in a cluster.")
    ] = 1
    ledger_runs_max: Annotated[
        Count, Meta(description="Runs that the read model holds; older ones are read no more.")
    ] = 200_000
    audit_every_s: Annotated[
        Seconds,
        Meta(description="How often the auditor looks for accepted runs that neither ended nor are on their way."),
    ] = 10.0
    audit_grace_s: Annotated[Seconds, Meta(description="How old a run has to be before the auditor looks at it.")] = (
        30.0
    )
    redis_bytes_max: Annotated[Bytes, Meta(description="Memory that the embedded redis-server may take.")] = GIB
    worker_slots: Annotated[
        Annotated[int, Meta(ge=0, le=1024)],
        Meta(description="Functions that one worker runs at a time, each in a process of its own; 0: one per core."),
    ] = 0
    order: Annotated[
        Literal["headrace", "edf", "fifo", "priority"],
        Meta(
            description="In which order workers start what waits: `headrace` keeps deadlines, the others are there to "
            "compare."
        ),
    ] = "headrace"
    worker_preload: Annotated[
        str, Meta(description="Modules, parted by commas, that running functions find imported, where installed.")
    ] = "numpy"
    site: Annotated[
        str, Meta(description="Site that an agent serves. Default: the one in SITE_CONFIG, or `local`.")
    ] = ""
    site_config: Annotated[
        Path | None,
        Meta(
            description="File (TOML) that describes the site of an agent, that of `headrace up` included. Default: "
            "this machine, with the jobs in DATA_DIR/jobs."
        ),
    ] = None
    scratch_dir: Annotated[
        Path | None, Meta(description="Folder in which running functions get folders. Default: DATA_DIR/scratch.")
    ] = None
    child_bytes_max: Annotated[Bytes, Meta(description="Memory that one running function may take.")] = 2 * GIB
    child_tasks_max: Annotated[
        Count, Meta(description="Processes and threads that one running function may have at a time, its own included.")
    ] = 512
    child_cpu_max_s: Annotated[
        Seconds, Meta(description="CPU time that one invocation may take, all its processes and threads together.")
    ] = 86400.0
    scratch_bytes_max: Annotated[
        Bytes,
        Meta(description="What one invocation may have in its folders; also the size of any single file it writes."),
    ] = 16 * GIB
    scratch_files_max: Annotated[Count, Meta(description="Files that one invocation may have in its folders.")] = (
        100_000
    )
    output_bytes_max: Annotated[
        Bytes, Meta(description="Printed and logged text of one invocation that is kept; then a note says it was cut.")
    ] = MIB
    output_lines_max: Annotated[Count, Meta(description="Lines of such text that are kept.")] = 10_000
    result_bytes_max: Annotated[
        Bytes, Meta(description="Size of what a function may return, its answer and effects included.")
    ] = 16 * MIB
    fan_out_max: Annotated[Annotated[int, Meta(ge=1, le=100_000)], Meta(description="Members of one `ctx.map`.")] = (
        10_000
    )
    chain_depth_max: Annotated[Count, Meta(description="Invocations of one run that follow one another.")] = 1000
    run_invocations_max: Annotated[
        Count, Meta(description="Invocations of one run; one that would start more of them fails.")
    ] = 1_000_000
    payload_bytes_max: Annotated[
        Annotated[int, Meta(ge=1, le=256 * MIB)],
        Meta(description="Size of the body of a request: of a trigger, or of the code of a function."),
    ] = 16 * MIB
    backlog_max: Annotated[
        Count, Meta(description="Pieces of work that may wait for a worker; past that, triggers are refused with 503.")
    ] = 100_000
    disk_bytes_min: Annotated[
        Bytes,
        Meta(
            description="Free space in DATA_DIR below which triggers are refused with 503, before the log stalls; "
            "below a quarter of it in SCRATCH_DIR no function is begun."
        ),
    ] = 256 * MIB
    drain_s: Annotated[
        Seconds, Meta(description="How long a stopping process lets what it is doing come to an end.")
    ] = 10.0
    ends_at: Annotated[
        float | None,
        Meta(description="Epoch second at which a worker or agent in an allocation has to be through; see --pilot."),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level of the servers' own log lines.")
    ] = "info"
    listen_fd: Annotated[
        int | None,
        Meta(description="An open listening socket to serve on instead of host and port; set by `headrace up`."),
    ] = None
    ready_fd: Annotated[
        int | None, Meta(description="Where a process says that it is ready; set by `headrace up`.")
    ] = None

    def token_path(self) -> Path:
        """Return the file of the bearer token."""
        return self.token_file or self.data_dir / "token"

    def work_age_s(self) -> float:
        """Return how long work may wait: whatever was asked for, it ends well before the log forgets it."""
        return min(self.work_age_max_s, self.log_keep_s / 2)

    def blobs_path(self) -> Path:
        """Return the folder of the blobs."""
        return self.blobs_dir or self.data_dir / "blobs"

    def cache_path(self) -> Path:
        """Return the folder of what was fetched for functions."""
        return self.cache_dir or self.data_dir / "cache"

    def scratch_path(self) -> Path:
        """Return the folder of the folders of running functions."""
        return self.scratch_dir or self.data_dir / "scratch"

    def nats_password(self) -> str:
        """Read the password of this process on the log's servers; empty where no file is set."""
        return read_secret(self.nats_password_file, env_name("nats_password_file")) if self.nats_password_file else ""

    def redis_password(self) -> str | None:
        """Read the password of the read model's server; None where no file is set."""
        return (
            read_secret(self.redis_password_file, env_name("redis_password_file")) if self.redis_password_file else None
        )

    def token(self) -> str:
        """Read the bearer token that callers need."""
        return read_secret(self.token_path(), env_name("token_file"))


_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}


def env_name(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def load(environ: Mapping[str, str], **options: object) -> Settings:
    """Return the settings of this process.

    Args:
        environ: the environment; names that do not begin with ``HEADRACE_`` are left alone.
        options: what the command line said; None means it said nothing.

    Raises:
        BadSetting: the file cannot be read, a name is unknown, or a value cannot be used.
    """
    values: dict[str, Any] = {}
    if named := environ.get(CONFIG):
        for key, raw in _read_file(Path(named)).items():
            if key not in _FIELDS:
                raise _unknown(key, f"{named}: ", list(_FIELDS))
            values[key] = _cast(key, raw, f"{named}: {key}")
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG or variable in FOR_CLIENTS:
            continue
        key = variable.removeprefix(PREFIX).lower()
        if key not in _FIELDS or variable != env_name(key):
            raise _unknown(variable, "", [env_name(f) for f in _FIELDS] + [CONFIG, *FOR_CLIENTS])
        values[key] = _cast(key, text, variable)
    for key, given in options.items():
        if given is not None:
            values[key] = _cast(key, given, OPTIONS.get(key, key))
    return Settings(**values)


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the environment variables that make ``load`` in a child process see these settings."""
    return {env_name(key): str(value) for key, value in settings.items() if value is not None}


def table() -> str:
    """Return the settings as a Markdown table for the README."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in _FIELDS.items():
        rows.append(f"| `{env_name(name)}` | {_shown(name, field.default)} | {_description(field.type)} |")
    return "\n".join(rows)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise BadSetting(
            f"{CONFIG}: {path} cannot be read: {error.strerror}", hint=f"Mend {CONFIG}, or unset it to use defaults."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(
            f"{path} is not TOML: {error}", hint='Lines look like: port = 8080, log_keep_s = "7d".'
        ) from error


def _unknown(name: str, where: str, known: list[str]) -> BadSetting:
    # The prefix, which all share, would make all look alike.
    bare = {other.removeprefix(PREFIX).lower(): other for other in known}
    near = difflib.get_close_matches(name.removeprefix(PREFIX).lower(), bare, n=1, cutoff=0.6)
    return BadSetting(
        f"{where}{name} is not a setting",
        hint=f"Did you mean {bare[near[0]]}?" if near else "The settings are listed in the README.",
    )


def _cast(key: str, raw: object, where: str) -> Any:
    """Turn what somebody wrote into the type of the setting: "7d" into seconds, "2GiB" into bytes."""
    value = raw
    try:
        if isinstance(raw, str):
            value = text = raw.strip()
            if key.endswith("_s") and text[-1:].isalpha():
                value = parse_duration(text)
            elif "_bytes_" in key and (match := _SIZE.fullmatch(text)):
                value = int(float(match[1]) * _UNIT[match[2]])
        if isinstance(value, Path):
            value = str(value)
        if key.endswith("_url") and isinstance(value, str) and "@" in value:
            raise BadRequest("the address holds a user or a password")
        return msgspec.convert(value, _FIELDS[key].type, strict=False, dec_hook=_path)
    except (msgspec.ValidationError, BadRequest) as error:
        # An address may hold a password, so it is never repeated.
        seen = "" if key.endswith("_url") else f" (it is {ascii(raw)[:80]})"
        raise BadSetting(f"{where}: {error}{seen}", hint=_cure(key)) from error


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    raise msgspec.ValidationError("Expected the path of a file or folder")


def _cure(key: str) -> str:
    form = ""
    if key.endswith("_s"):
        form = ' Write seconds, or a duration such as "90s" or "7d".'
    elif "_bytes_" in key:
        form = ' Write bytes, or a size such as "512MiB" or "2GiB".'
    elif key.endswith("_url"):
        form = " Passwords go into the file that the setting ..._password_file names."
    return f"{_description(_FIELDS[key].type)}{form}"


def _description(kind: Any) -> str:
    """Return the text beside a setting, which stands in its type."""
    for meta in reversed(getattr(kind, "__metadata__", ())):
        if isinstance(meta, Meta) and meta.description:
            return meta.description
    return ""


def _shown(name: str, default: object) -> str:
    if default is None or default == "":
        return ""
    if isinstance(default, int) and "_bytes_" in name:
        unit, size = next((u, s) for u, s in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1)) if default % s == 0)
        return f"`{default // size}{unit}`"
    if isinstance(default, float) and name.endswith("_s"):
        return f"`{default / 86400:g}d`" if default % 86400 == 0 else f"`{default:g}s`"
    return f"`{default}`"
