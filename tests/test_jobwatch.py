"""Looks at all jobs of a site: one thing that goes wrong hides nothing else, and none is taken without need.

A list stands in for the batch system, which here fails in ways that a real one does not on demand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.joblog import Submitted
from headrace.jobs import JobSpec
from headrace.wire import Invocation, Payload
from workers.jobwatch import CANCEL_AGAIN_S, LOOK_S_MAX, Attached, JobWatch
from workers.sites.base import JobStatus, Known, SiteConfig, SiteUnreachable


class Deaf:
    """A batch system that tells how jobs are, and cancels none."""

    config = SiteConfig(name="deaf", kind="local", work="/nowhere")

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.cancels = 0
        self.looks = 0

    async def cancel(self, jobs: Sequence[Known]) -> None:
        self.cancels += 1
        raise SiteUnreachable("it does not answer")

    async def status(self, jobs: Sequence[Known]) -> dict[str, JobStatus]:
        self.looks += 1
        return {
            job.job_id: JobStatus(native_id="7", state="completed" if job.job_id in self.ended else "active")
            for job in jobs
        }


class Keeper:
    """Notes what is to be done."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    async def began(self, job: Attached, status: JobStatus) -> None:
        """See ``workers.jobwatch.Keeper``, here and below."""

    async def finish(self, job: Attached, status: JobStatus) -> None:
        self.finished.append(job.name)

    async def give_up(self, job: Attached) -> None:
        raise AssertionError("it is not canceled")

    async def let_go(self, job: Attached, status: JobStatus) -> None:
        raise AssertionError("it has not ended")


class Watched:
    """A watch of jobs, and a clock that stands."""

    def __init__(self, canceled: frozenset[str] = frozenset()) -> None:
        self.now = 1000.0
        self.system = Deaf()
        self.keeper = Keeper()
        self.tasks: list[asyncio.Task[None]] = []
        self.watch = JobWatch(self.system, self.keeper, canceled, self._sure, lambda: self.now, self._spawn)  # type: ignore[arg-type] # has what is asked for

    async def _sure(self) -> None:
        return

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    def attach(self, name: str, run: str = "run", deadline: float | None = None) -> Attached:
        invocation = Invocation(
            run_id=run,
            invocation_id=name,
            function="job",
            version="",
            route="route",
            tenant="default",
            payload=Payload(body=b"", size=0),
            accepted_at=900.0,
            sent_at=900.0,
            deadline=deadline,
            on_late="cancel" if deadline else "continue",
        )
        job = Attached(
            invocation=invocation,
            spec=JobSpec(executable="/bin/true"),
            name=name,
            folder=Path("/nowhere"),
            attempt=1,
            fence=1,
            queued_at=900.0,
            submitted=Submitted(
                run_id=run, invocation_id=name, site="deaf", attempt=1, native_id="7", at=900.0, agent="agent/deaf/x"
            ),
        )
        self.watch.attach(job)
        return job


@pytest.mark.parametrize("late", [False, True])
async def test_that_a_job_cannot_be_canceled_hides_the_end_of_no_other(late: bool) -> None:
    watched = Watched(frozenset() if late else frozenset({"unwanted"}))
    watched.attach("stays", run="unwanted", deadline=999.0 if late else None)
    watched.attach("done")
    watched.system.ended = {"done"}
    await watched.watch.look()
    await asyncio.gather(*watched.tasks)
    assert watched.keeper.finished == ["done"]


async def test_what_cannot_be_canceled_is_not_canceled_at_each_look() -> None:
    watched = Watched(frozenset({"unwanted"}))
    watched.attach("stays", run="unwanted")
    for _ in range(3):
        await watched.watch.look()
    assert (watched.system.cancels, watched.system.looks) == (1, 3)
    watched.now += CANCEL_AGAIN_S + 1.0
    await watched.watch.look()
    assert watched.system.cancels == 2


async def test_a_job_that_is_being_ended_after_its_deadline_is_no_reason_to_look() -> None:
    watched = Watched()
    watched.attach("ends", deadline=999.0).ending = True
    watched.attach("runs")
    watched.watch._soon.clear()
    watched.watch._round_s = LOOK_S_MAX
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(watched.watch._until_time(loop))
    await asyncio.wait({waiting}, timeout=0.2)
    assert not waiting.done()
    waiting.cancel()
