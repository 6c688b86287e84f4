"""Bringing what a server holds to a file: several stretches at a time, checked, and taken up again after a cut.

The file has its full size from the start. Threads fill stretches of it; one more follows behind and computes the
checksums from what lies in the file, so what is verified is what will be read. A journal beside it says which stretches
are there: whoever comes after a crash goes on from it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from headrace.errors import BadRequest, Unavailable
from workers.egress import Cut, Stopped
from workers.lines import Changed, Line, Reply, Source

# More than a few connections to each core are not quicker, and the network alone is rarely worth more than eight.
LINES_MAX = min(8, 2 * (os.cpu_count() or 1))
PART_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
TRIES_MAX = 6
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
FETCHES_MAX = 2  # what is damaged is fetched once more as a whole

JOURNAL = ".parts"

OnMoved = Callable[[int, int], None]


class Damaged(Exception):
    """What came is not what was promised; the message says what differs."""


class Checks(Struct, frozen=True, kw_only=True):
    """What is known of the content beforehand: its size in bytes, and digests in hex; empty for what is not known."""

    size: int | None = None
    sha256: str = ""
    md5: str = ""


class Begun(Struct, frozen=True, kw_only=True):
    """The first line of a journal: which content is being fetched, in what parts."""

    boot: str
    etag: str
    size: int
    part_bytes: int

    @property
    def parts(self) -> int:
        """How many parts there are; none of nothing."""
        return -(-self.size // self.part_bytes)

    def bounds(self, number: int) -> tuple[int, int]:
        """Return where a part, counted from 0, begins and where the next one would."""
        start = number * self.part_bytes
        return start, min(self.size, start + self.part_bytes)


class Fetched(Struct, frozen=True, kw_only=True):
    """What lies in the file now. ``moved`` is how many bytes came over the line, repeats included."""

    size: int
    sha256: str
    etag: str
    moved: int


class Transfer:
    """One thing on its way into one file. Blocks; to be used in a thread of its own."""

    def __init__(
        self,
        source: Source,
        path: Path,
        *,
        checks: Checks,
        room: Callable[[int], None],
        stopped: threading.Event,
        on_moved: OnMoved,
        boot: str = "",
        part_bytes: int = PART_BYTES,
        lines_max: int = LINES_MAX,
        backoff_s: float = BACKOFF_FIRST_S,
    ) -> None:
        """Describe it.

        Args:
            source: what to fetch.
            path: an existing file that only we write to; its journal lies beside it.
            checks: what is known of the content.
            room: called with the size once it is known; it gives the file that size, or raises where there is no room.
            stopped: set when nobody waits any more.
            on_moved: called with the bytes there are and the bytes there will be, now and then, from any thread.
            boot: names the time since the machine started; a journal of another one is worth nothing, for what it says
                is there may not have reached the disk.
            part_bytes: size of a stretch.
            lines_max: connections at a time.
            backoff_s: the first wait after a cut, in seconds; it doubles.
        """
        self._source = source
        self._path = path
        self._journal = journal_of(path)
        self._checks = checks
        self._room = room
        self._stopped = stopped
        self._on_moved = on_moved
        self._boot = boot
        self._part_bytes = part_bytes
        self._lines_max = lines_max
        self._backoff_s = backoff_s
        self._moved = 0

    def run(self) -> Fetched:
        """Fetch it and return what came.

        Raises:
            NotFound, BadRequest: it cannot be fetched, or is not what was promised.
            Unavailable: the server does not answer well enough.
            Stopped: nobody waits any more.
        """
        problem: Exception = Damaged()
        for _ in range(FETCHES_MAX):
            try:
                return self._fetch()
            except (Damaged, Changed) as error:
                problem = error
                self._journal.unlink(missing_ok=True)
        if isinstance(problem, Changed):
            raise Unavailable(f"{self._source.name} changes while it is fetched", hint="Stage it when it is complete.")
        raise BadRequest(
            f"{self._source.name} is damaged: {problem}", hint="It was fetched twice. Store it again, or mend the URI."
        )

    def forget(self) -> None:
        """Remove the journal: the file is complete, or of no use."""
        self._journal.unlink(missing_ok=True)

    def _fetch(self) -> Fetched:
        line = Line(self._stopped)
        try:
            first = self._first(line)
            size = first.size
            if size is None:
                raise BadRequest(f"{self._source.name}: the server does not tell its size", hint="Offer it otherwise.")
            if self._checks.size is not None and size != self._checks.size:
                raise Damaged(f"it has {size:,} bytes instead of {self._checks.size:,}")
            self._room(size)
            # A server that knows no stretches sends one: all of it.
            part_bytes = self._part_bytes if first.ranged else max(1, size)
            begun = Begun(boot=self._boot, etag=first.etag, size=size, part_bytes=part_bytes)
            done = self._take_up(begun) if first.ranged else self._begin(begun)
            with self._path.open("r+b", buffering=0) as file:
                return self._fill(_Filling(begun, done, file.fileno()), line, first)
        finally:
            line.close()

    def _first(self, line: Line) -> Reply:
        """Ask for the first stretch, whose answer tells all that is to be known."""
        tries = 0
        while True:
            try:
                return line.get(self._source, 0, self._part_bytes)
            except Cut as cut:
                tries += 1
                self._wait(tries, cut)

    def _fill(self, filling: _Filling, line: Line, first: Reply) -> Fetched:
        checks = _promised(self._checks, first, is_own=self._source.guard is None)
        sha256, md5 = self._filled(filling, line, first, with_md5=bool(checks.md5))
        if checks.sha256 and sha256 != checks.sha256:
            raise Damaged(f"its SHA-256 is {sha256} instead of {checks.sha256}")
        if checks.md5 and md5 != checks.md5:
            raise Damaged(f"its MD5 is {md5} instead of {checks.md5}")
        return Fetched(size=filling.begun.size, sha256=sha256, etag=filling.begun.etag, moved=self._moved)

    def _filled(self, filling: _Filling, line: Line, first: Reply, *, with_md5: bool) -> tuple[str, str]:
        """Fill what is missing and return SHA-256 and MD5 of all of it."""
        if filling.begun.parts <= 1:  # threads would take longer than the transfer
            self._work(filling, line, first)
            return filling.hash(with_md5)
        lanes = max(1, min(self._lines_max, len(filling.missing)))
        with ThreadPoolExecutor(lanes + 1, thread_name_prefix="transfer") as threads:
            tasks: list[Future[Any]] = [threads.submit(self._work, filling, line, first)]
            tasks += [threads.submit(self._work, filling, Line(self._stopped), None) for _ in range(lanes - 1)]
            hashing = threads.submit(filling.hash, with_md5)
            tasks.append(hashing)
            wait(tasks)
        causes = [error for task in tasks if (error := task.exception()) is not None]
        if causes:  # one that failed stops the others: what they say of it is not the cause
            raise next((c for c in causes if not isinstance(c, Stopped)), causes[0])
        return hashing.result()

    # ------------------------------------------------------------ one connection's work

    def _work(self, filling: _Filling, line: Line, first: Reply | None) -> None:
        """Fill parts until there are none left. The first answer is used where its part is still missing."""
        begun = filling.begun
        buffer = memoryview(bytearray(min(CHUNK_BYTES, begun.size)))
        try:
            if first is not None and not filling.take_first():
                line.close()
                first = None
            number: int | None = 0 if first is not None else filling.take()
            while number is not None:
                self._part(filling, line, buffer, number, first)
                if begun.parts > 1:
                    with filling.turn, self._journal.open("ab") as journal:
                        journal.write(b"%d\n" % number)
                filling.finish(number)
                number, first = filling.take(), None
        except BaseException:
            filling.fail()
            raise
        finally:
            line.close()

    def _part(self, filling: _Filling, line: Line, buffer: memoryview, number: int, reply: Reply | None) -> None:
        """Fill one part; after a cut, go on where it stopped."""
        begun, tries = filling.begun, 0
        at, end = begun.bounds(number)
        while at < end:
            before = at
            try:
                if reply is None:
                    reply = line.get(self._source, at, end, begun.etag)
                    if reply.size != begun.size or reply.etag != begun.etag:
                        raise Changed
                    at = before = reply.start  # a server that knows no stretches begins again
                for count in self._read(filling, reply.response, buffer, at, end):
                    at += count
                if at < end:
                    raise Cut("the connection ended early")
            except (Cut, OSError, http.client.HTTPException) as cut:
                line.close()
                reply = None
                tries = 1 if at > before else tries + 1
                self._wait(tries, cut)

    def _read(
        self, filling: _Filling, response: http.client.HTTPResponse, buffer: memoryview, at: int, end: int
    ) -> Iterator[int]:
        """Move bytes from the line to the file; yield how many at a time."""
        while at < end:
            if self._stopped.is_set() or filling.failed:
                raise Stopped
            count = response.readinto(buffer[: min(len(buffer), end - at)])
            if not count:
                return
            try:
                write_all(filling.handle, buffer[:count], at)
            except OSError as error:  # no fault of the line, so nothing to try again
                raise Unavailable(
                    f"{self._source.name} cannot be written to the cache: {error.strerror}",
                    hint="Free some space on the disk of the cache, or move it with HEADRACE_CACHE_DIR.",
                ) from error
            at += count
            with filling.turn:
                self._moved += count
                filling.there = min(filling.there + count, filling.begun.size)
                there = filling.there
            self._on_moved(there, filling.begun.size)
            yield count

    def _wait(self, tries: int, cut: BaseException) -> None:
        """Wait before the next try, or give up."""
        if tries >= TRIES_MAX:
            raise Unavailable(
                f"{self._source.name} cannot be fetched: {cut}", hint="It was tried again and again; try later."
            ) from cut
        if self._stopped.wait(min(BACKOFF_MAX_S, self._backoff_s * 2 ** (tries - 1))):
            raise Stopped

    # ------------------------------------------------------------ the journal

    def _take_up(self, begun: Begun) -> set[int]:
        """Return the parts that are there, if the journal is of the same content; else begin a new one."""
        try:
            head, *lines = self._journal.read_bytes().splitlines()
            same = msgspec.json.decode(head, type=Begun) == begun and begun.etag.startswith('"')
            if same and self._path.stat().st_size == begun.size:
                return {int(line) for line in lines if line.isdigit() and int(line) < begun.parts}
        except (OSError, ValueError, msgspec.MsgspecError):
            pass
        return self._begin(begun)

    def _begin(self, begun: Begun) -> set[int]:
        if begun.parts <= 1:  # of one part, nothing is there until all of it is
            self._journal.unlink(missing_ok=True)
            return set()
        self._journal.write_bytes(msgspec.json.encode(begun) + b"\n")
        return set()


class _Filling:
    """What the threads of one transfer share."""

    def __init__(self, begun: Begun, done: set[int], handle: int) -> None:
        self.begun = begun
        self.handle = handle
        self.turn = threading.Condition()
        self.failed = False
        self._done = done
        self.missing = [n for n in reversed(range(begun.parts)) if n not in done]  # the next one stands at the end
        self.there = sum(end - start for start, end in map(begun.bounds, done))

    def take(self) -> int | None:
        """Take the next missing part, if there is one."""
        with self.turn:
            return self.missing.pop() if self.missing and not self.failed else None

    def take_first(self) -> bool:
        """Take the first part, and say whether it was missing."""
        with self.turn:
            if self.missing[-1:] != [0]:
                return False
            self.missing.pop()
            return True

    def finish(self, number: int) -> None:
        with self.turn:
            self._done.add(number)
            self.turn.notify_all()

    def fail(self) -> None:
        with self.turn:
            self.failed = True
            self.turn.notify_all()

    def hash(self, with_md5: bool) -> tuple[str, str]:
        """Follow behind the parts and return SHA-256 and MD5 of what lies in the file."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.begun.size)))
        for number in range(self.begun.parts):
            with self.turn:
                while number not in self._done:
                    if self.failed:
                        raise Stopped
                    self.turn.wait()
            at, end = self.begun.bounds(number)
            while at < end:
                count = os.preadv(self.handle, [buffer[: min(len(buffer), end - at)]], at)
                if not count:
                    raise Damaged("its file was cut while it was being checked")
                sha256.update(buffer[:count])
                if with_md5:
                    md5.update(buffer[:count])
                at += count
        return sha256.hexdigest(), md5.hexdigest() if with_md5 else ""


def journal_of(path: Path) -> Path:
    """Return where it is said which parts of a file are there."""
    return path.with_name(path.name + JOURNAL)


def write_all(handle: int, content: memoryview, at: int) -> None:
    """Write all of it to its place in a file."""
    while content:
        written = os.pwrite(handle, content, at)
        content, at = content[written:], at + written


def _promised(checks: Checks, first: Reply, *, is_own: bool) -> Checks:
    """Return what is known of the content by now: what the URI says, else what the server says of the whole."""
    if checks.sha256 or checks.md5:
        return checks
    told = first.response.getheader
    for name in ("Repr-Digest", "Digest", "x-amz-checksum-sha256"):
        match = re.search(r"(?:^|sha-256=:?)([A-Za-z0-9+/]{43}=)(?:[:,]|$)", told(name) or "", re.IGNORECASE)
        if match:
            return structs.replace(checks, sha256=base64.b64decode(match[1]).hex())
    # An object that was stored in one piece, and not under a key of its own, has its MD5 for an ETag.
    etag = first.etag.strip('"')
    if is_own and re.fullmatch("[0-9a-f]{32}", etag) and told("x-amz-server-side-encryption") in (None, "AES256"):
        return structs.replace(checks, md5=etag)
    return checks
