"""Where the bytes of a platform are kept: told by the log, and looked at by every process that keeps or fetches some.

A process whose settings name another store keeps bytes that no other finds, and finds none of theirs, hours after its
start. So the log names a blob, the *mark*, which lies in the store of the platform and in no other.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Mapping

import structlog
from msgspec import Struct

from headrace.errors import NotFound, Unavailable
from infra.settings import BadSetting, env_name
from infra.stores import Stores
from streams.link import Link
from streams.topology import notes_of

_log = structlog.get_logger(__name__)

MARK, PLACE = "headrace.blobs.mark", "headrace.blobs.place"
_IN_BUCKET = f"Set {env_name('blobs_url')}, {env_name('s3_url')} and {env_name('s3_credentials_file')} to that bucket."
_IN_FOLDER = (
    f"Set {env_name('blobs_dir')} to that folder. A process on a machine that does not have it needs a bucket: give "
    f"{env_name('blobs_url')} to all processes, and run `headrace setup` with it."
)
LOOK_S = 5.0  # a store that is away keeps no process from its start


class Home(Struct, frozen=True, kw_only=True):
    """A store: the mark that lies in it, and where it is, in words."""

    mark: str
    place: str

    @property
    def content(self) -> bytes:
        """The mark as it is kept."""
        return f"Here a Headrace platform keeps its bytes: {self.mark}\n".encode()

    @property
    def digest(self) -> str:
        """The name of the mark in the store."""
        return hashlib.sha256(self.content).hexdigest()

    def notes(self) -> dict[str, str]:
        """Return what the log is to tell."""
        return {MARK: self.mark, PLACE: self.place}


async def settle(link: Link, stores: Stores) -> Mapping[str, str]:
    """Return what the log is to tell of where bytes are kept from now on: in the store of these settings.

    Settings that name no store leave it as it was, as they may be those of somebody who only changes the log.
    """
    known = _home(await notes_of(link))
    try:
        async with asyncio.timeout(LOOK_S):
            if known is not None and await _is_marked(stores, known):
                return Home(mark=known.mark, place=stores.place).notes()
            if known is not None and not stores.named:
                return known.notes()
            made = Home(mark=secrets.token_hex(16), place=stores.place)
            await stores.blobs.put(made.content)
    except (TimeoutError, Unavailable, OSError) as error:
        _log.warning("the store of bytes does not answer: which one it is, is not told now", reason=str(error))
        return {} if known is None else known.notes()
    if known is not None:
        _log.warning(
            "bytes are kept elsewhere from now on; those of before have to be copied", to=made.place, by=known.place
        )
    return made.notes()


async def check(link: Link, stores: Stores, role: str) -> None:
    """Return if this process keeps its bytes where the platform does, or if that cannot be told.

    Raises:
        BadSetting: it keeps them elsewhere; the message says where, and which setting to mend.
    """
    known = _home(await notes_of(link))
    if known is None:
        return  # a log that an older release has set up
    try:
        async with asyncio.timeout(LOOK_S):
            if await _is_marked(stores, known):
                return
    except (TimeoutError, Unavailable, OSError) as error:
        _log.warning("the store of bytes does not answer: whether it is the right one is not known", reason=str(error))
        return
    raise BadSetting(
        f"this {role} keeps bytes in the {stores.place}, the platform in the {known.place}: neither finds the other's",
        hint=_IN_BUCKET if known.place.startswith("bucket") else _IN_FOLDER,
    )


async def _is_marked(stores: Stores, home: Home) -> bool:
    """Say whether this is that store. One at the same place that lost its mark is given it again."""
    try:
        await stores.blobs.where(home.digest)
    except NotFound:
        if home.place != stores.place:
            return False
        await stores.blobs.put(home.content)
    return True


def _home(notes: Mapping[str, str]) -> Home | None:
    return Home(mark=notes[MARK], place=notes.get(PLACE, "")) if MARK in notes else None
