"""What jobs report of themselves: checked against the log by a secret of each job, bounded, and appended as a hint.

The only ones who come in here are jobs. A job proves itself by the secret in its folder, of which the log holds the
digest; no token of a tenant is good for it, and the secret is good for nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import cast, get_args

from aiohttp import web
from msgspec import Struct

from gateway.needs import Log
from gateway.problems import Over
from headrace.errors import BadRequest, NotFound, Overloaded, TooLarge, Unauthorized, Unavailable
from headrace.joblog import Report, ReportEvent, Submitted
from headrace.names import check_name
from headrace.wire import decode, encode
from streams.log import Record
from streams.topology import done_subject, report_subject, submit_subject

TEXT_BYTES_MAX = 1024
READ_S_MAX = 5.0
BURST = 5  # what one job may say at once, its end aside
EVERY_S = 2.0  # and then this often
HEARTBEAT_S_MIN = 30.0  # a heartbeat sooner than this after another word tells nothing new
JOBS_MAX = 20_000  # jobs that one gateway remembers
STRANGE_BURST, STRANGE_EVERY_S = 1000, 0.001  # looks into the log for those who have proved nothing
LOOK_AGAIN_S = 1.0  # a secret that is wrong may be that of a newer attempt: the log is asked again, this often
EXIT_CODE_MAX = 255
EVENTS: tuple[str, ...] = get_args(ReportEvent)
LAST_WORDS = ("stopping", "end")  # said once for each attempt

_HINT = "Only the wrapper of the job itself can report, with the secret in the job's own folder."


class Bucket:
    """So many at once, and one more in every so many seconds."""

    __slots__ = ("_at", "_every_s", "_left", "_most")

    def __init__(self, most: int, every_s: float, now: float) -> None:
        self._most = most
        self._every_s = every_s
        self._left = float(most)
        self._at = now

    def take(self, now: float) -> float:
        """Take one and return 0; where none is left, return in how many seconds there is."""
        self._left = min(self._most, self._left + max(0.0, now - self._at) / self._every_s)
        self._at = now
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) * self._every_s


class Known(Struct):
    """What this gateway remembers of one job: its newest attempt, and what that has said here."""

    submitted: Submitted
    looked_at: float
    bucket: Bucket
    said_at: float = -math.inf
    last: ReportEvent | None = None
    over: bool = False


class Reports:
    """``POST /v1/jobs/{run_id}/{job_id}/report``."""

    def __init__(
        self, log: Log, clock: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        """Use a log.

        Args:
            log: where jobs are looked up and reports are appended.
            clock: the time in epoch seconds.
            steady: seconds that only grow.
        """
        self._log = log
        self._clock = clock
        self._steady = steady
        self._known: OrderedDict[tuple[str, str], Known] = OrderedDict()
        self._strangers = Bucket(STRANGE_BURST, STRANGE_EVERY_S, steady())

    async def take(self, request: web.Request) -> web.Response:
        """Answer a report: 204 once it is in the log, or tells nothing that is not there."""
        run = check_name(request.match_info["run_id"], "run id")
        job = check_name(request.match_info["job_id"], "job id")
        secret = _secret(request)
        event, exit_code = _event(request)
        text = await _text(request)
        known = await self._prove(run, job, secret)
        if known.over or (known.last == "end" and event not in LAST_WORDS):
            raise _over(job)
        if known.last in LAST_WORDS and event in LAST_WORDS[: LAST_WORDS.index(known.last) + 1]:
            return web.Response(status=204)  # said before: its answer was lost, or came too late
        now = self._steady()
        if event == "heartbeat" and now - known.said_at < HEARTBEAT_S_MIN:
            return web.Response(status=204)
        wait_s = 0.0 if event in LAST_WORDS else known.bucket.take(now)
        if wait_s:
            raise Overloaded(
                f"job {job} reports too often",
                hint=f"Report at most every {EVERY_S:g} s; the last word is the one that counts.",
                retry_after_s=wait_s,
            )
        before, known.last = known.last, event  # at once: whoever says it a thousand times at a time is heard once
        try:
            await self._append(known, event, text, exit_code)
        except Unavailable:
            known.last = before
            raise
        known.said_at = now
        return web.Response(status=204)

    async def _append(self, known: Known, event: ReportEvent, text: str, exit_code: int | None) -> None:
        run, job, site = known.submitted.run_id, known.submitted.invocation_id, known.submitted.site
        if await self._log.last(done_subject(run, job)) is not None:
            known.over = True
            raise _over(job)
        fraction, words = progress(text)
        report = Report(
            run_id=run,
            invocation_id=job,
            site=site,
            event=event,
            at=self._clock(),
            attempt=known.submitted.attempt,
            exit_code=exit_code,
            fraction=fraction,
            text=words,
        )
        await self._log.append([Record(report_subject(run, job, site), encode(report), hint=True)])

    async def _prove(self, run: str, job: str, secret: str) -> Known:
        """Return what is known of the job if this is the secret of its newest attempt.

        Raises:
            NotFound: there is no such job (yet).
            Unauthorized: it is not its secret.
            Overloaded: too many ask who are not known.
        """
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        known = self._known.get((run, job))
        if known is None or (not _is(known, digest) and self._steady() - known.looked_at >= LOOK_AGAIN_S):
            known = await self._look(run, job, known)
        if not _is(known, digest):
            raise Unauthorized("this is not the secret of this job", hint=_HINT)
        self._known[run, job] = known  # only who has proved something is remembered, and stays longest
        self._known.move_to_end((run, job))
        if len(self._known) > JOBS_MAX:
            self._known.popitem(last=False)
        return known

    async def _look(self, run: str, job: str, before: Known | None) -> Known:
        now = self._steady()
        if wait_s := self._strangers.take(now):
            raise Overloaded(
                "too many reports of jobs that are not known here", hint="Report again.", retry_after_s=wait_s
            )
        stored = await self._log.last(submit_subject(run, job, "*", "*"))
        if stored is None:
            raise NotFound(f"job {job} of run {run} is not known", hint="If it was just submitted, report again.")
        submitted = decode(stored.body, Submitted)
        if before is not None and before.submitted == submitted:
            before.looked_at = now
            return before
        return Known(submitted, now, Bucket(BURST, EVERY_S, now))


def progress(text: str) -> tuple[float | None, str]:
    """Return what a job says of how far it is: a share of the whole, if it begins with one, and the words after it.

    "0.4 relaxing" and "40% relaxing" are both two fifths.
    """
    first, _, words = text.strip().partition(" ")
    try:
        share = float(first[:-1]) / 100.0 if first.endswith("%") else float(first)
    except ValueError:
        return None, text.strip()
    if not 0.0 <= share <= 1.0:
        return None, text.strip()
    return share, words.strip()


def _is(known: Known, digest: str) -> bool:
    """Say whether this is the digest that stands in the log, in a time that does not depend on where they differ."""
    wanted = known.submitted.secret_digest
    return bool(wanted) and hmac.compare_digest(wanted, digest)


def _secret(request: web.Request) -> str:
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized("the header Authorization does not carry the secret of a job", hint=_HINT)
    return secret.strip()


def _event(request: web.Request) -> tuple[ReportEvent, int | None]:
    event, code = request.query.get("event", ""), request.query.get("exit_code", "")
    if event not in EVENTS:
        raise BadRequest(f"event: {ascii(event)[:40]} is not one of {', '.join(EVENTS)}", hint="Such as ?event=start.")
    if code and not (code.isascii() and code.isdigit() and len(code) <= 3 and int(code) <= EXIT_CODE_MAX):
        raise BadRequest(f"exit_code: {ascii(code)[:40]} is not one", hint=f"0 to {EXIT_CODE_MAX}.")
    return cast(ReportEvent, event), int(code) if code else None


async def _text(request: web.Request) -> str:
    """Return the body, which is not longer than a line of progress."""
    too_large = TooLarge(f"a report has at most {TEXT_BYTES_MAX:,} bytes", hint="Send one short line.")
    if (request.content_length or 0) > TEXT_BYTES_MAX:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(READ_S_MAX):
            while chunk := await request.content.readany():
                found += chunk
                if len(found) > TEXT_BYTES_MAX:
                    raise too_large
    except TimeoutError as error:
        raise BadRequest("the report did not arrive in time", hint="Send it again.") from error
    text = found.decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def _over(job: str) -> Over:
    return Over(f"job {job} has ended", hint="Nothing more is heard of it.")
