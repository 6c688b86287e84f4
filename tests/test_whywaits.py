"""Why jobs wait: told so that it is seen for as long as it is so, and does not fill the log."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

from msgspec import Struct

from headrace.errors import HeadraceError
from headrace.joblog import Held
from headrace.wire import decode
from streams.log import HINT_KEEP_S, Log
from streams.topology import held_subject
from tests.doubles import MemoryLog
from workers.jobhand import Waiting
from workers.sites.base import SiteUnreachable, SubmitBusy
from workers.whywaits import TELL_S, WhyWaits


class Named(Struct, frozen=True):
    """What is asked of an invocation."""

    run_id: str = "run"
    invocation_id: str = "job"


class Again(Struct, frozen=True):
    """A job in the hand that was tried before."""

    seq: int = 1
    tries: int = 1
    invocation: Named = Named()


class Teller:
    """Tells of one site, at a time of its own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.log = MemoryLog()
        self._tasks: list[asyncio.Task[None]] = []
        self._why = WhyWaits(cast(Log, self.log), "lab", self._spawn, lambda: self.now)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(coroutine))

    async def told(self, error: HeadraceError, seq: int = 1) -> list[str]:
        """Tell of a job, and return what was told by now of all."""
        self._why.tell(cast(Waiting, Again(seq=seq)), error)
        await asyncio.gather(*self._tasks)
        return [decode(stored.body, Held).why for stored in self.log.stored]


async def test_a_reason_whose_numbers_change_is_told_once_a_minute_for_each_job() -> None:
    teller = Teller()
    for number in range(20):
        told = await teller.told(SubmitBusy(f"{number} jobs run"))
        teller.now += 1.0
    assert told == ["0 jobs run"]
    assert await teller.told(SubmitBusy("9 jobs run"), seq=2) == ["0 jobs run", "9 jobs run"]
    teller.now += TELL_S
    assert (await teller.told(SubmitBusy("4 jobs run")))[2:] == ["4 jobs run"]


async def test_another_kind_of_reason_is_told_at_once() -> None:
    teller = Teller()
    await teller.told(SubmitBusy("all is taken"))
    assert await teller.told(SiteUnreachable("it is away")) == ["all is taken", "it is away"]


async def test_why_jobs_wait_leaves_the_log_and_is_told_again_before_it_does() -> None:
    teller = Teller()
    until = teller.now + HINT_KEEP_S
    while teller.now < until - 30.0:
        told = await teller.told(SubmitBusy("all is taken"))
        teller.now += 30.0
    assert told == 2 * ["all is taken"]
    assert teller.log.hints == 2 * [held_subject("run", "job", "lab")]
