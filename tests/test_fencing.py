"""Only the newest attempt commits: what a worker does that was paused past its lease comes to nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from functions.retries import LOST_ATTEMPTS_MAX, NO_PAST, look_back
from headrace.model import ErrorInfo
from headrace.names import invocation_id
from headrace.wire import Attempt, Cancel, Lease, Outcome, Started, decode, encode
from streams import intake
from streams.link import Link
from streams.log import AlreadyThere, Log, Record
from streams.stored import Stored
from streams.topology import (
    attempt_subject,
    cancel_subject,
    done_subject,
    fence_subject,
    lease_subject,
    start_subject,
    work_subject,
)
from tests.test_worker import Platform, working


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path) as running:
        yield running


SLOW = """
    import time
    def slow(x):
        time.sleep(x)
        return "done"
"""


def lease(run: str, attempt: int) -> Record:
    identity = invocation_id(run, 0)
    body = Lease(run_id=run, invocation_id=identity, attempt=attempt, worker="other", at=time.time())
    return Record(lease_subject(run, identity), encode(body), fence_subject(run, identity))


async def begun(platform: Platform, run: str) -> None:
    """Wait until the first attempt has told that it runs."""
    async with asyncio.timeout(20):
        while await platform.log.last(start_subject(run, invocation_id(run, 0), 1)) is None:
            await asyncio.sleep(0.02)


# ---------------------------------------------------------------- looking back, without a server


def stored(seq: int, record: Record) -> Stored:
    return Stored(seq, record.subject, record.body, 1.0)


def tried(attempt: int, retry_at: float) -> Record:
    failed = Attempt(
        run_id="r",
        invocation_id="i",
        function="f",
        version="v",
        worker="w",
        attempt=attempt,
        started_at=0.0,
        ended_at=0.0,
        retry_at=retry_at,
        error=ErrorInfo(kind="user", message="no"),
    )
    return Record(attempt_subject("r", "i", attempt), encode(failed))


def started(attempt: int) -> Record:
    fact = Started(
        run_id="r", invocation_id="i", function="f", version="v", worker="w", attempt=attempt, queued_at=0, started_at=0
    )
    return Record(start_subject("r", "i", attempt), encode(fact))


def test_a_delivery_that_nobody_started_is_still_the_first_attempt() -> None:
    assert look_back([]) == NO_PAST
    assert (NO_PAST.attempt, NO_PAST.fence, NO_PAST.lost) == (1, 0, 0)


def test_failed_and_lost_attempts_are_told_apart() -> None:
    leased = Record(lease_subject("r", "i"), encode(Lease(run_id="r", invocation_id="i", attempt=4, worker="w", at=0)))
    past = look_back([stored(3, tried(1, 7.0)), stored(5, started(2)), stored(9, leased), stored(11, tried(4, 9.0))])
    assert (past.attempt, past.failures, past.lost, past.fence, past.retry_at) == (5, 2, 2, 9, 9.0)


# ---------------------------------------------------------------- with a worker


async def test_an_attempt_that_was_replaced_cannot_commit(platform: Platform) -> None:
    await platform.deploy(SLOW)
    run = await platform.trigger("slow", 0.6)
    identity = invocation_id(run, 0)
    await begun(platform, run)
    await platform.log.append([lease(run, 2)])  # as another worker does when the first one has been silent too long
    await asyncio.sleep(1.0)
    assert await platform.log.last(done_subject(run, identity)) is None

    # Nobody acknowledged it, so it comes again; the other worker never ended, and a third attempt commits.
    record = await platform.ended(run)
    assert record.state == "succeeded"
    outcome = await platform.log.last(done_subject(run, identity))
    assert outcome is not None
    assert decode(outcome.body, Outcome).attempts == 3


async def test_a_failure_of_an_attempt_that_was_replaced_counts_for_nothing(platform: Platform) -> None:
    await platform.deploy(
        """
        import time
        def fails(x, ctx):
            time.sleep(0.5)
            if ctx.attempt == 1:
                raise ValueError("the first attempt")
            return ctx.attempt
        """
    )
    run = await platform.trigger("fails", 0)
    await begun(platform, run)
    await platform.log.append([lease(run, 2)])
    assert await platform.answer(run) == 3
    assert await platform.log.last(attempt_subject(run, invocation_id(run, 0), "*")) is None


async def test_an_event_emitted_after_the_cancel_starts_nothing(log: Log) -> None:
    canceled = cancel_subject("r")
    await log.append([Record(canceled, b"", canceled)])
    unit = [
        Record(work_subject(3, "t", "other", "i"), b"", canceled),
        Record(done_subject("r", "i"), b"", fence_subject("r", "i")),
    ]
    with pytest.raises(AlreadyThere):
        await log.append(unit)
    assert await log.last(work_subject("*", "t", "other", "i")) is None


async def test_only_one_of_two_workers_takes_an_invocation_over(log: Log) -> None:
    first, second = lease("r", 2), lease("r", 3)
    took = await asyncio.gather(log.append([first]), log.append([second]), return_exceptions=True)
    assert sorted(isinstance(t, AlreadyThere) for t in took) == [False, True]


async def test_an_invocation_that_loses_its_worker_every_time_is_dead(platform: Platform) -> None:
    await platform.deploy(SLOW)
    run = await platform.trigger("slow", 0.5)
    await begun(platform, run)
    await platform.log.append([lease(run, LOST_ATTEMPTS_MAX + 2)])
    record = await platform.ended(run)
    assert record.state == "failed"
    assert record.error is not None
    assert record.error.kind == "lost"


async def test_work_that_waited_too_long_is_dead_and_says_so(log: Log, link: Link, tmp_path: Path) -> None:
    async with working(log, link, tmp_path, work_age_max_s=0.0) as platform:
        await platform.deploy("def late(x):\n    return x")
        record = await platform.ended(await platform.trigger("late", 1))
    assert record.state == "failed"
    assert record.error is not None
    assert record.error.kind == "expired"


async def test_work_that_nobody_can_read_ends_dead(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "UNREADABLE_DELIVERIES_MAX", 1)
    await platform.log.append([Record(work_subject(0, "default", "r", "i"), b"\xc1 not a message")])
    async with asyncio.timeout(20):
        while (done := await platform.log.last(done_subject("r", "i"))) is None:
            await asyncio.sleep(0.02)
    outcome = decode(done.body, Outcome)
    assert outcome.state == "dead"
    assert outcome.error is not None
    assert outcome.error.kind == "unreadable"


async def test_work_of_a_canceled_run_is_not_begun_by_a_worker_that_starts_later(
    log: Log, link: Link, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    async with working(log, link, tmp_path) as first:
        await first.deploy(f"def mark(x):\n    open({str(ran)!r}, 'a').write(x)")
        await first.answer(await first.trigger("mark", "a"))
    canceled = await first.trigger("mark", "b")
    wish = Cancel(run_id=canceled, at=time.time())
    await log.append([Record(cancel_subject(canceled), encode(wish))])
    async with working(log, link, tmp_path) as second:
        await second.answer(await first.trigger("mark", "c"))
    assert ran.read_text() == "ac"
