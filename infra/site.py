"""The file in which an operator describes a site, and the site that this machine is where there is no file."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from headrace.clock import parse_duration
from headrace.errors import HeadraceError
from headrace.jobs import LAUNCHERS
from headrace.names import check_name
from infra.settings import BadSetting, Settings, env_name
from workers.sites import KINDS
from workers.sites.base import SiteConfig

LOCAL = "local"
FOLDER = "jobs"
_FIELDS = {field.name: field for field in msgspec.structs.fields(SiteConfig)}
_NEEDED = tuple(name for name, field in _FIELDS.items() if field.required)


def site_of(settings: Settings) -> SiteConfig:
    """Return the site that the agent of these settings serves: that of its file, else this machine.

    Raises:
        BadSetting: the file, or something in it, cannot be used; the message says what.
    """
    if settings.site_config is not None:
        return read_site(settings.site_config, settings.site)
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
    try:
        site = msgspec.convert({key: _value(key, value) for key, value in found.items()}, SiteConfig)
    except (msgspec.ValidationError, HeadraceError) as error:
        raise BadSetting(f"{path}: {error}", hint="`work` and `kind` are texts, tables hold texts.") from error
    return _checked(site, path, name)


def _value(key: str, value: Any) -> Any:
    return parse_duration(value, key) if key.endswith("_s") and isinstance(value, str) else value


def _checked(site: SiteConfig, path: Path, name: str) -> SiteConfig:
    _name(site.name, str(path))
    if name and name != site.name:
        raise BadSetting(f"{path} describes site {site.name}, not {name}", hint="Name that one, or another file.")
    if site.kind not in KINDS:
        raise BadSetting(f"{path}: kind {ascii(site.kind)[:80]} is not known", hint=f"One of {', '.join(KINDS)}.")
    if not Path(site.work).is_absolute():
        raise BadSetting(
            f"{path}: work is {ascii(site.work)[:80]}, which is not absolute",
            hint="Give the full path of a folder that the compute nodes see, too.",
        )
    if site.launcher is not None and site.launcher not in LAUNCHERS:
        raise BadSetting(f"{path}: launcher {ascii(site.launcher)[:80]} is not known", hint=", ".join(LAUNCHERS))
    if site.jobs_max is not None and site.jobs_max < 1:
        raise BadSetting(f"{path}: jobs_max is {site.jobs_max}", hint="Leave it out, or allow at least 1.")
    for key in _FIELDS:
        if key.endswith("_s") and not getattr(site, key) > 0:
            raise BadSetting(f"{path}: {key} is {getattr(site, key)}", hint='Seconds above 0, or such as "15s".')
    return site


def _name(name: str, where: str) -> str:
    try:
        return check_name(name, "site")
    except HeadraceError as error:
        raise BadSetting(f"{where}: {error}", hint=error.hint) from error
