"""The users that the agents of sites are on the log's server: each is a file with its password, kept under the data
folder, and serves those who are tenants.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import nats.errors
import structlog

from headrace.errors import HeadraceError
from headrace.names import check_name
from headrace.wire import TenantRecord
from infra.credentials import BadSecretFile, kept_secret, private_folder, read_secret
from infra.embedded import NatsServer
from infra.rights import ADMIN, EXPORTS, SiteUser, site_accounts
from infra.services import link_to, opened
from infra.settings import Settings, env_name
from streams.tables import Table
from streams.topology import DEFAULT_TENANT, lane_tenants

_log = structlog.get_logger(__name__)

FOLDER = "sites"
MOVES = ".moves"  # names hold no dot
SUFFIX = ".password"
LOOK_S = 1.0


def kept(data: Path, site: str, *, moves: bool | None = None) -> Path:
    """Return the file with the password of a site's user; the first call makes it.

    Args:
        data: the data folder.
        site: the name of the site.
        moves: as of ``SiteUser``; where it is not given, it stays what it is, and is not for a user that is made.

    Raises:
        BadName: the name does not follow the rule for names.
        BadSecretFile: the file cannot be used.
    """
    check_name(site, "name of a site")
    folder = private_folder(data.absolute() / FOLDER)
    plain, moving = (folder / f"{site}{mark}{SUFFIX}" for mark in ("", MOVES))
    if moves is None:
        moves = moving.exists()
    path, other = (moving, plain) if moves else (plain, moving)
    if other.exists():  # it keeps its password when it is given other rights
        other.replace(path)
    kept_secret(path, env_name("nats_password_file"))
    return path


def known(data: Path) -> list[SiteUser]:
    """Return the users of sites that were made on a data folder; one whose file cannot be used is left out."""
    found = []
    for path in sorted((data / FOLDER).glob(f"*{SUFFIX}")):
        try:
            found.append(user(path))
        except BadSecretFile as error:
            _log.warning("the user of a site is left out", reason=str(error))
    return found


def user(path: Path) -> SiteUser:
    """Return the user that a file of ``kept`` is of.

    Raises:
        BadSecretFile: the file cannot be used.
    """
    name = path.name.removesuffix(SUFFIX)
    password = read_secret(path, env_name("nats_password_file"))
    return SiteUser(name.removesuffix(MOVES), password, name.endswith(MOVES))


async def serve_for_ever(server: NatsServer, admin: Settings) -> None:
    """Let the embedded server know the users of sites, and whose jobs they may take, as both come and go."""
    while True:
        try:
            async with link_to(admin, ADMIN) as link, opened(Table(link, "tenants", TenantRecord)) as tenants:
                while True:
                    await server.serve_sites(known(server.data), {DEFAULT_TENANT, *tenants.items()})
                    await asyncio.sleep(LOOK_S)
        except (HeadraceError, nats.errors.Error, OSError) as error:
            _log.warning("the users of sites are looked at later", reason=str(error))
            await asyncio.sleep(LOOK_S)


async def account(settings: Settings, user: SiteUser) -> str:
    """Return the account of a site for the configuration of servers, with the rights for those who are tenants now.

    Raises:
        Unavailable: the log does not answer.
    """
    async with link_to(settings, ADMIN) as link:
        return _as_text(site_accounts([user], await lane_tenants(link)))


def exports() -> str:
    """Return what the account of the platform has to lend to those of sites, once for all."""
    return "exports: [\n" + "".join(f"  {_json(each)}\n" for each in EXPORTS) + "]\n"


def _as_text(accounts: dict[str, dict[str, list[object]]]) -> str:
    """Return accounts in the server's own format, an import a line."""
    lines = []
    for name, account in accounts.items():
        lines.append(f"{_json(name)}: {{")
        for key, values in account.items():
            lines += [f"  {key}: [", *(f"    {_json(value)}" for value in values), "  ]"]
        lines.append("}")
    return "\n".join(lines) + "\n"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
