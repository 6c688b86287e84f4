"""What a running function asks for at once: bytes brought to a local path, and bytes kept under a URI.

The worker fetches and stores, so keys and signed addresses never reach a function. A URI may say what its content is:
``...#sha256=HEX&size=BYTES`` (also ``md5``); that is checked, and so is whatever the server tells of it.
"""

from __future__ import annotations

import asyncio
import functools
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from headrace.errors import BadRequest, HeadraceError
from headrace.wire import Ask, Granted, Moved, Said
from streams.blobs import DIGEST, Blobs, Link, measure, open_regular
from workers.cache import Cache, Held, Known
from workers.egress import STRAIGHT, Cut, Egress, Stopped
from workers.guard import Guard, shown
from workers.lines import Changed, Line, Source
from workers.transfer import Checks, Transfer

SCHEME = "blob:"
TELL_EVERY_S = 0.5
TRANSFERS_MAX = 8
THREADS_MAX = 4 * TRANSFERS_MAX  # most of them wait: for a turn, or for another that fetches the same
_CHECKED = re.compile("#((?:sha256|md5|size)=[^#]*)$")
_FORMS = {"sha256": "[0-9a-f]{64}", "md5": "[0-9a-f]{32}", "size": "[0-9]{1,15}"}

Tell = Callable[[Said], None]
Objects = Callable[[str, str], Link]
T = TypeVar("T")


class Wanted(NamedTuple):
    """A URI taken apart: what to fetch, and what is known of its content."""

    uri: str
    checks: Checks


class Stager:
    """Brings content to this machine and keeps what functions make. One for a worker; safe for many at a time."""

    def __init__(
        self,
        blobs: Blobs,
        *,
        cache: Cache | None = None,
        guard: Guard | None = None,
        objects: Objects | None = None,
        egress: Egress = STRAIGHT,
        to_store: Egress = STRAIGHT,
    ) -> None:
        """Describe what it may do.

        Args:
            blobs: the platform's own store.
            cache: where what is fetched lies; without it, only what is on this machine already can be staged.
            guard: what may be fetched; the strictest if not given.
            objects: returns the way to an object of a bucket, where the platform has access to an S3 server.
            egress: leads to the servers of https: and http: addresses; ``guard`` has to know if there is a proxy.
            to_store: leads to the platform's own S3 server.
        """
        self._blobs = blobs
        self._cache = cache
        self._guard = guard or Guard()
        self._objects = objects
        self._egress = egress
        self._to_store = to_store
        self._turns = threading.BoundedSemaphore(TRANSFERS_MAX)
        # Threads of its own: a server that lets us wait must not keep others from reading their payloads.
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="stage")

    async def stage(self, uri: str, tell: Tell | None = None) -> Held | Path:
        """Return a local file that holds the bytes of ``uri``; one from the cache stays there until it is let go.

        Raises:
            BadRequest: the URI cannot be fetched, must not be, or its content is not what it should be.
            NotFound: there is nothing under it.
            Unavailable: the server does not answer, or there is no room.
        """
        wanted = take_apart(uri)
        scheme = wanted.uri.partition(":")[0]
        if scheme == "blob":
            return await self._blob(wanted, tell)
        if scheme == "file":
            return await self._in_thread(self._file, wanted)
        if scheme == "s3":
            bucket, key = self._guard.object(wanted.uri)
            if self._objects is None:
                raise BadRequest(
                    "this platform has no access to an S3 server", hint="An operator gives it one with HEADRACE_S3_URL."
                )
            return await self._fetch_link(self._objects(bucket, key), wanted.checks, tell)
        if scheme in ("https", "http"):
            address = wanted.uri.partition("#")[0]
            await self._in_thread(self._guard.endpoint, address)
            source = Source(name=shown(address), address=lambda: address, guard=self._guard, egress=self._egress)
            return await self._fetch(source, wanted.checks, tell, known_as=address)
        raise BadRequest(
            f"{shown(uri) or 'nothing'} cannot be staged",
            hint='Use "blob:..." (what `Client.upload` returns), s3://, https:// or file:///.',
        )

    async def store(self, content: Path | bytes) -> str:
        """Keep a file or bytes and return the URI."""
        if isinstance(content, bytes):
            return SCHEME + await self._blobs.put(content)
        return SCHEME + await self._blobs.put_file(content)

    async def _blob(self, wanted: Wanted, tell: Tell | None) -> Held | Path:
        name = wanted.uri.removeprefix(SCHEME)
        checks = wanted.checks
        if DIGEST.fullmatch(name):
            if checks.sha256 not in ("", name):
                raise BadRequest("the SHA-256 in the URI is not that of the blob", hint="Take one of them out.")
            checks = Checks(size=checks.size, sha256=name)
            if (held := await self._held(name)) is not None:
                return held
        place = await self._blobs.where(name)
        if isinstance(place, Path):
            return place
        return await self._fetch_link(place, checks, tell)

    def _file(self, wanted: Wanted) -> Path:
        path = self._guard.file(wanted.uri)
        with open_regular(path) as handle:
            size = path.stat().st_size
            if wanted.checks.size not in (None, size):
                raise BadRequest(f"{path} has {size:,} bytes instead of {wanted.checks.size:,}", hint="Mend the URI.")
            if wanted.checks.md5:
                raise BadRequest("files are checked by their SHA-256", hint="Write #sha256=... into the URI.")
            if wanted.checks.sha256 and measure(handle) != wanted.checks.sha256:
                raise BadRequest(f"{path} does not have the SHA-256 of the URI", hint="Mend the file or the URI.")
        return path

    async def _held(self, digest: str) -> Held | None:
        return None if self._cache is None else await self._in_thread(self._cache.hold, digest)

    async def _fetch_link(self, link: Link, checks: Checks, tell: Tell | None) -> Held:
        source = Source(name=shown(link.name), address=link.address, egress=self._to_store)
        return await self._fetch(source, checks, tell, known_as=link.name)

    async def _fetch(self, source: Source, checks: Checks, tell: Tell | None, known_as: str) -> Held:
        cache = self._cache
        if cache is None:
            raise BadRequest("nothing can be fetched here", hint="This worker has no cache.")
        if checks.size is not None:
            self._guard.size(checks.size, source.name)
        stopped = threading.Event()
        moving = _Moving(source.name, tell, asyncio.get_running_loop())
        fetch = functools.partial(self._fetch_into, cache, source, checks, stopped, moving, known_as)
        task = asyncio.ensure_future(self._in_thread(fetch))
        try:
            held = await asyncio.shield(task)
        except asyncio.CancelledError:
            stopped.set()  # the thread ends by itself, and lets go of what it has got
            task.add_done_callback(_let_go)
            raise
        moving.end()
        return held

    def _fetch_into(
        self, cache: Cache, source: Source, checks: Checks, stopped: threading.Event, moving: _Moving, known_as: str
    ) -> Held:
        """Return the content from the cache, or fetch it into it. Blocks."""
        while True:
            if checks.sha256 and (held := cache.hold(checks.sha256)) is not None:
                return held
            # Under its digest where that is known: two addresses of one content wait for each other.
            with cache.growing(checks.sha256 or known_as, stopped) as path:
                if checks.sha256 and (held := cache.hold(checks.sha256)) is not None:
                    return held
                if (
                    not checks.sha256
                    and (held := self._as_before(cache, source, checks, known_as, stopped)) is not None
                ):
                    return held

                def room(size: int, path: Path = path) -> None:
                    self._guard.size(size, source.name)
                    cache.room(size, path)

                transfer = Transfer(
                    source, path, checks=checks, room=room, stopped=stopped, on_moved=moving.moved, boot=cache.boot
                )
                while not self._turns.acquire(timeout=TELL_EVERY_S):
                    if stopped.is_set():
                        raise Stopped
                try:
                    found = transfer.run()
                finally:
                    self._turns.release()
                cache.adopt(path, found.sha256)
                transfer.forget()
                if found.etag.startswith('"'):
                    with suppress(OSError):  # on a full disk it is fetched anew the next time
                        cache.remember(known_as, Known(etag=found.etag, size=found.size, sha256=found.sha256))
            # Only now, for growing is locked as a whole. If it was evicted in the same instant, all begins anew.
            if (held := cache.hold(found.sha256)) is not None:
                return held

    def _as_before(
        self, cache: Cache, source: Source, checks: Checks, known_as: str, stopped: threading.Event
    ) -> Held | None:
        """Return what this address held before, if the server says that it still does."""
        known = cache.recall(known_as)
        if known is None or checks.md5 or checks.size not in (None, known.size):
            return None
        line = Line(stopped)
        try:
            reply = line.get(source, 0, 1)
            same = reply.etag == known.etag and reply.size == known.size
        except (Cut, Changed):
            return None
        finally:
            line.close()
        return cache.hold(known.sha256) if same else None

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(call, *arguments))


class Errands:
    """What one attempt asks for: holds what it was given until it ends, and counts where its time went, in seconds."""

    def __init__(self, stager: Stager, clock: Callable[[], float] = time.monotonic) -> None:
        self._stager = stager
        self._clock = clock
        self._held: list[Held] = []
        self.stage_in_s = 0.0
        self.stage_out_s = 0.0

    async def grant(self, ask: Ask, tell: Tell | None = None) -> Granted:
        """Answer one request of a child. Its fault is told to it; the worker goes on."""
        began = self._clock()
        try:
            if ask.what == "stage":
                staged = await self._stager.stage(ask.uri, tell)
                if isinstance(staged, Path):
                    return Granted(value=str(staged))
                self._held.append(staged)
                return Granted(value=str(staged.path))
            return Granted(value=await self._stager.store(ask.body if ask.body is not None else Path(ask.path)))
        except HeadraceError as error:
            return Granted(error=str(error), hint=error.hint)
        except OSError as error:
            return Granted(error=f"{ask.path or ask.uri}: {error.strerror or error}", hint="Check the path.")
        finally:
            spent_s = max(0.0, self._clock() - began)
            if ask.what == "stage":
                self.stage_in_s += spent_s
            else:
                self.stage_out_s += spent_s

    def close(self) -> None:
        """Let go of everything: the attempt has ended."""
        for held in self._held:
            held.close()
        self._held.clear()


class _Moving:
    """Tells how far a transfer is, from any thread, now and then."""

    def __init__(self, name: str, tell: Tell | None, loop: asyncio.AbstractEventLoop) -> None:
        self._name = name
        self._tell = tell
        self._loop = loop
        self._next = time.monotonic() + TELL_EVERY_S
        self._last = (0, 0)
        self._told = False
        self._turn = threading.Lock()

    def moved(self, there: int, size: int) -> None:
        """Take the bytes that are there, and those that there will be."""
        now = time.monotonic()
        with self._turn:
            self._last = there, size
            if now < self._next:
                return
            self._next = now + TELL_EVERY_S
            self._told = True
        self._loop.call_soon_threadsafe(self._say, there, size)

    def end(self) -> None:
        """Tell the last state, if anything was told before."""
        if self._told:
            self._say(*self._last)

    def _say(self, there: int, size: int) -> None:
        if self._tell is not None:
            self._tell(Said(moved=Moved(uri=self._name, bytes_done=there, bytes_total=size)))


def take_apart(uri: str) -> Wanted:
    """Return a URI without what it says of its content, and that.

    Raises:
        BadRequest: it says something of its content that cannot be true or understood.
    """
    if not uri.isprintable() and any(0xD800 <= ord(c) <= 0xDFFF for c in uri):
        raise BadRequest(f"{shown(uri)} is no text", hint="Write the URI in Unicode.")
    match = _CHECKED.search(uri)
    if match is None:
        return Wanted(uri, Checks())
    said: dict[str, str] = {}
    for pair in match[1].split("&"):
        name, _, value = pair.partition("=")
        if name in said or not re.fullmatch(_FORMS.get(name, "(?!)"), value.lower()):
            raise BadRequest(
                f"{ascii(pair)[:100]} in the URI is not understood", hint="It takes #sha256=HEX&md5=HEX&size=BYTES."
            )
        said[name] = value.lower()
    size = int(said["size"]) if "size" in said else None
    return Wanted(uri[: match.start()], Checks(size=size, sha256=said.get("sha256", ""), md5=said.get("md5", "")))


def _let_go(task: asyncio.Future[Held]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
