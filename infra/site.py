"""The file in which an operator describes a site, and the site that this machine is where there is no file."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from headrace.clock import DURATION_S_MAX, parse_duration
from headrace.errors import HeadraceError
from headrace.jobs import LAUNCHERS, check_variables, plain
from headrace.names import check_name
from infra.settings import BadSetting, Settings, env_name
from workers.sites import KINDS
from workers.sites.base import SiteConfig

LOCAL = "local"
FOLDER = "jobs"
# What scripts of batch systems, shells and the mounts of containers all read as it is written.
_FOLDER = re.compile(r"/[\w./+@=-]*")
_FIELDS = {field.name: field for field in msgspec.structs.fields(SiteConfig)}
_NEEDED = tuple(name for name, field in _FIELDS.items() if field.required)
_SECONDS = 'A number of seconds, or a text with a unit, such as "15s", "10m", "2h" or "7d".'
_TABLE = 'A table of texts: a line [{name}], and below it lines such as PATH = "/opt/bin:/usr/bin:/bin".'
_HINTS = {
    "name": "A text, such as the name of the machine.",
    "kind": f"One of {', '.join(KINDS)}.",
    "work": "The full path of a folder that the compute nodes see, too.",
    "queue": "The name of a queue or partition, as a text.",
    "account": "The name of an account, as a text.",
    "launcher": f"One of {', '.join(LAUNCHERS)}.",
    "container": "apptainer or podman; leave it out where there is none.",
    "jobs_max": "A whole number above 0; leave it out for as many as there are.",
}


def site_of(settings: Settings) -> SiteConfig:
    """Return the site that the agent of these settings serves: that of its file, else this machine.

    Raises:
        BadSetting: the file, or something in it, cannot be used; the message says what.
    """
    if settings.site_config is not None:
        site = read_site(settings.site_config, settings.site)
        # The folder of a job says that it was submitted, also to an agent that comes back after a long time.
        waits_s = settings.work_age_s()
        if site.keep_s < waits_s:
            raise BadSetting(
                f"{settings.site_config}: keep_s is {site.keep_s:g} s, and jobs may wait for {waits_s:g} s",
                hint=f"Keep their folders at least that long, or lower {env_name('work_age_max_s')}.",
            )
        return site
    name = settings.site or LOCAL
    # The interpreter that runs the platform is the one whose packages jobs may expect.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    work = settings.data_dir.absolute() / FOLDER
    return SiteConfig(name=_name(name, env_name("site")), kind="local", work=str(work), job_environment={"PATH": path})


def read_site(path: Path, name: str = "") -> SiteConfig:
    """Return the site that a file describes.

    Args:
        path: a TOML file with the fields of ``workers.sites.base.SiteConfig``; durations may be "15s" or seconds.
        name: the site that is asked for; empty takes the one in the file.

    Raises:
        BadSetting: the file, or something in it, cannot be used; the message says what.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"{path} cannot be read: {error}", hint="Name a TOML file that describes a site.") from error
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"{path} is not TOML: {error}", hint='Such as: kind = "slurm"') from error
    found.setdefault("name", name)
    unknown = sorted(found.keys() - _FIELDS.keys())
    if unknown:
        raise BadSetting(f"{path}: {', '.join(unknown)} cannot be set", hint=f"Known are: {', '.join(_FIELDS)}.")
    missing = [field for field in _NEEDED if not found.get(field)]
    if missing:
        raise BadSetting(
            f"{path}: {', '.join(missing)} is missing", hint="A site has a name, a kind and a work folder."
        )
    site = SiteConfig(**{key: _value(path, key, value) for key, value in found.items()})
    _name(site.name, str(path))
    if name and name != site.name:
        raise BadSetting(f"{path} describes site {site.name}, not {name}", hint="Name that one, or another file.")
    return site


def _value(path: Path, key: str, value: Any) -> Any:
    """Return what a field of the file says, as its type; a name of a variable is looked at with its table."""
    try:
        if key.endswith("_s") and isinstance(value, str):
            value = parse_duration(value, key)
        value = msgspec.convert(value, _FIELDS[key].type)
        _check(key, value)
    except msgspec.ValidationError as error:
        raise BadSetting(f"{path}: {key}: {error} (it is {ascii(value)[:80]})", hint=_hint(key)) from error
    except HeadraceError as error:
        raise BadSetting(f"{path}: {error}", hint=error.hint or _hint(key)) from error
    return value


def _check(key: str, value: Any) -> None:
    """Raise HeadraceError for what has the right type and makes no sense."""
    if isinstance(value, str):
        plain(value, key)
    if isinstance(value, dict):
        check_variables(value, key)
    if key == "work" and not Path(value).is_absolute():
        raise BadSetting(f"work is {ascii(value)[:80]}, which is not absolute", hint=_hint(key))
    if key == "work" and not _FOLDER.fullmatch(value):
        raise BadSetting(
            f"work is {ascii(value)[:80]}, which the scripts of jobs would read as another folder",
            hint="Write it out: no ~, no $VARIABLES, no spaces, and of signs only . _ - + @ = /",
        )
    if (key == "kind" and value not in KINDS) or (key == "launcher" and value not in LAUNCHERS):
        raise BadSetting(f"{key} {ascii(value)[:80]} is not known", hint=_hint(key))
    if key == "jobs_max" and value < 1:
        raise BadSetting(f"jobs_max is {value}", hint=_hint(key))
    if key.endswith("_s") and not 0 < value <= DURATION_S_MAX:
        raise BadSetting(f"{key} is {value:g}, which is not above 0 and at most 366 days", hint=_hint(key))


def _hint(key: str) -> str:
    return _HINTS.get(key) or (_SECONDS if key.endswith("_s") else _TABLE.format(name=key))


def _name(name: str, where: str) -> str:
    try:
        return check_name(name, "site")
    except HeadraceError as error:
        raise BadSetting(f"{where}: {error}", hint=error.hint) from error
