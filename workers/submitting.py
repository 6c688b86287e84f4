"""From jobs that are ready to native ids: one by one, or as an array where they differ in little.

Which jobs make up an array is written down before it is submitted: into the folder of each that it belongs to one, then
the list of all, and from there on they are one submission. Whoever comes after a crash finds the list and makes the
very same call again; what has no list was never submitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4
from weakref import WeakValueDictionary

import msgspec
from msgspec import Struct

from functions.ensembles import alike
from headrace.errors import BadRequest, HeadraceError, TooLarge
from headrace.jobs import RECORDS, JobSpec
from workers.jobfolders import is_of_site
from workers.jobhand import Waiting
from workers.jobpast import JobPast
from workers.sites.base import ARRAY_JOBS_MAX, ARRAY_KINDS, BatchSystem, Submission, SubmitBusy, SubmitRejected
from workers.sites.records import Records

_LIST = "members"

Told = str | HeadraceError


class Ready(Struct, frozen=True):
    """A job that has its lease, its folder and its inputs (which took ``stage_in_s``), and can be submitted.

    ``digest`` is that of the secret with which it reports.
    """

    waiting: Waiting
    past: JobPast
    spec: JobSpec
    submission: Submission
    digest: str
    stage_in_s: float


class _Member(Struct, frozen=True):
    """One job of an array, as it was submitted."""

    job_id: str
    folder: str
    spec: JobSpec
    before: str
    after: str


class _List(Struct, frozen=True):
    """All jobs of an array, in order."""

    array_id: str
    members: list[_Member]


class Submitter:
    """Submits the jobs of one site."""

    def __init__(self, system: BatchSystem, root: Path) -> None:
        """Use a batch system; ``root`` is the folder of all jobs' folders."""
        self._system = system
        self._root = root
        # One submission of an array at a time; who waits for its turn holds the lock, and nobody else does.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.together_max = ARRAY_JOBS_MAX if system.config.kind in ARRAY_KINDS else 1

    async def submit(self, jobs: Sequence[Submission]) -> dict[str, Told]:
        """Submit jobs and return the native id of each, or why it has none, by job id."""
        fresh: list[Submission] = []
        begun: dict[str, list[str]] = {}
        for job in jobs:
            array_id = await asyncio.to_thread(self.array_of, job.folder)
            if array_id is None:
                fresh.append(job)
            else:
                begun.setdefault(array_id, []).append(job.job_id)
        told: dict[str, Told] = {}
        for array_id, names in begun.items():
            told |= await self._array(array_id, [job for job in jobs if job.job_id in names])
        for places in alike([job.spec for job in fresh], self.together_max):
            together = [fresh[place] for place in places]
            if len(together) == 1:
                told |= await self._alone(together[0])
            else:
                array_id = await asyncio.to_thread(self._write, together)
                told |= await self._array(array_id, together)
        return told

    async def find(self, job_id: str, folder: Path) -> str | None:
        """Return the native id of a job if it was ever submitted.

        Raises:
            SiteUnreachable: it cannot be looked up now.
        """
        found = await self._system.find(job_id, folder)
        array_id = None if found is not None else await asyncio.to_thread(self.array_of, folder)
        if array_id is None:
            return found
        known = await asyncio.to_thread(self._read, array_id)
        names = [] if known is None else [member.job_id for member in known.members]
        if job_id not in names:
            return None
        return await self._system.find(array_id, self._folder(array_id), names.index(job_id))

    async def begun(self, past: JobPast, job_id: str, folder: Path, now: float) -> tuple[str | None, float]:
        """Return the native id of a job that the batch system has, else for how many seconds more it may come up.

        Raises:
            SiteUnreachable: it cannot be looked up now.
        """
        if past.submitted is not None:
            return past.submitted.native_id, 0.0
        if not past.fence:
            return None, 0.0  # nobody ever began to submit it
        native_id = await self.find(job_id, folder)
        if native_id is not None:
            return native_id, 0.0
        attempted_at = await asyncio.to_thread(self.attempted_at, folder)
        return None, 0.0 if attempted_at is None else max(0.0, attempted_at + self._system.config.settle_s - now)

    def attempted_at(self, folder: Path) -> float | None:
        """Return when a submission of a job began of which nobody knows how it went. Blocks."""
        array_id = self.array_of(folder)
        return Records(folder if array_id is None else self._folder(array_id)).attempted_at()

    def array_of(self, folder: Path) -> str | None:
        """Return the array that a job was submitted with, or is about to be, by the job's folder. Blocks.

        Raises:
            OSError: the disk does not tell it now.
        """
        array_id = Records(folder).array_id()
        try:
            return array_id if array_id and (self._folder(array_id) / RECORDS / _LIST).exists() else None
        except OSError as error:
            if is_of_site(error):  # of a member it must not be said that it is none: it would be submitted alone
                raise
            return None  # the job names a folder that is none of ours

    def folder_name(self, array_id: str) -> str:
        """Return the name of an array's own folder, which is beside those of its jobs."""
        return self._folder(array_id).name

    # ------------------------------------------------------------ inside

    async def _alone(self, job: Submission) -> dict[str, Told]:
        try:
            return {job.job_id: await self._system.submit(job)}
        except HeadraceError as error:
            return {job.job_id: error}

    async def _array(self, array_id: str, wanted: Sequence[Submission]) -> Mapping[str, Told]:
        """Submit an array, or find it, and return what came of these members."""
        turn = self._turns.setdefault(array_id, asyncio.Lock())
        async with turn:
            known = await asyncio.to_thread(self._read, array_id)
            if known is not None:
                try:
                    native = await self._system.submit_array(array_id, [_submission(m) for m in known.members])
                    self.together_max = min(ARRAY_JOBS_MAX, max(self.together_max, 2 * len(native)))
                    return {job.job_id: native[job.job_id] for job in wanted}
                except (SubmitBusy, SubmitRejected, BadRequest, TooLarge) as error:
                    # It was surely not submitted. Fewer at once may do, and what is wrong with one shows when it is
                    # alone.
                    await asyncio.to_thread(self._dissolve, known)
                    self.together_max = max(1, len(known.members) // 2)
                    if isinstance(error, SubmitBusy):
                        return {job.job_id: error for job in wanted}
                except HeadraceError as error:
                    return {job.job_id: error for job in wanted}
        return await self.submit(wanted)

    def _folder(self, array_id: str) -> Path:
        return self._root / f"hr-{array_id}"

    def _write(self, jobs: Sequence[Submission]) -> str:
        """Write down what an array is made of, and return its id."""
        array_id = f"{jobs[0].job_id}-x{uuid4().hex[:8]}"
        for job in jobs:
            records = Records(job.folder)
            records.make()
            records.note_array(array_id)
        members = [
            _Member(job_id=job.job_id, folder=str(job.folder), spec=job.spec, before=job.before, after=job.after)
            for job in jobs
        ]
        records = Records(self._folder(array_id))
        records.make()
        aside = records.path / f"{_LIST}.new"
        aside.write_bytes(msgspec.json.encode(_List(array_id, members)))
        aside.replace(records.path / _LIST)
        return array_id

    def _read(self, array_id: str) -> _List | None:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((self._folder(array_id) / RECORDS / _LIST).read_bytes(), type=_List)
        return None

    def _dissolve(self, known: _List) -> None:
        """Forget an array that was never submitted."""
        (self._folder(known.array_id) / RECORDS / _LIST).unlink(missing_ok=True)
        shutil.rmtree(self._folder(known.array_id), ignore_errors=True)


def _submission(member: _Member) -> Submission:
    return Submission(
        job_id=member.job_id,
        spec=member.spec,
        folder=Path(member.folder),
        before=member.before,
        after=member.after,
    )
