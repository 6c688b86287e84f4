"""Jobs of which nobody can read what the log says: what the batch system has of them is canceled, and they end."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from functions.moves import is_elsewhere, may_have_begun
from headrace.errors import Unavailable
from headrace.wire import Lease, decode
from streams.stored import Stored
from streams.topology import fence_subject, kind_of, submit_subject
from workers.burial import Burial
from workers.commits import Commits
from workers.jobfolders import JobFolders
from workers.jobpast import JobPast
from workers.jobtools import Tools
from workers.sites.base import Known
from workers.submitting import Submitter


class JobBurial(Burial):
    """Ends such jobs of one site, and none that is another site's by now."""

    def __init__(
        self,
        tools: Tools,
        folders: JobFolders,
        submitter: Submitter,
        commits: Commits,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Describe it; ``spawn`` runs something beside."""
        super().__init__(tools.name, tools.log, commits, spawn, tools.clock)
        self._site = tools.site.name
        self._system = tools.system
        self._folders = folders
        self._submitter = submitter

    async def bury(self, subject: str, at: float) -> None:
        """See ``Burial.bury``: a message that was moved or repeated has a lease beside it, and counts under that."""
        *_, run, identity = subject.split(".")
        newest, fence = await self._log.last(fence_subject(run, identity)), 0
        if newest is None or kind_of(newest.subject) != "done":
            lease = None if newest is None else _lease(newest)
            if lease is not None and is_elsewhere(lease.worker, self._site):
                return
            fence = 0 if newest is None else newest.seq
            await self._clear(run, identity, fence, lease)
        await self._end(subject, at, fence)

    async def _clear(self, run: str, identity: str, fence: int, lease: Lease | None) -> None:
        """Cancel what the batch system has of a job."""
        submitted = await self._log.last_of_each([submit_subject(run, identity, "*", self._site)])
        attempts = {stored.subject.split(".")[4] for stored in submitted}
        if lease is not None and may_have_begun(lease.worker):
            attempts.add(str(lease.attempt))
        for attempt in sorted(attempts):
            name = f"{identity}-{attempt}"
            folder = self._folders.of(name)
            native_id, left_s = await self._submitter.begun(JobPast(fence=fence), name, folder, self._clock())
            if native_id is not None:
                await self._system.cancel([Known(job_id=name, native_id=native_id, folder=folder)])
            elif left_s > 0:
                raise Unavailable(f"{name} may have been submitted", hint="It is looked for again.")


def _lease(stored: Stored) -> Lease | None:
    """Return a lease; one that cannot be read is taken for none."""
    try:
        return decode(stored.body, Lease)
    except msgspec.MsgspecError:
        return None
