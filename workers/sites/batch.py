"""Any batch system with a queue: submit once, look once for all, and conclude nothing from silence."""

from __future__ import annotations

import logging
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import psij

from headrace.errors import BadRequest
from headrace.jobs import Reason
from headrace.model import JobState
from workers.sites.base import (
    FINAL,
    Capacity,
    JobStatus,
    Known,
    SiteConfig,
    SiteUnreachable,
    Submission,
    SubmitBusy,
    SubmitRejected,
    SubmitUnsure,
    is_signal,
)
from workers.sites.blocking import Blocking
from workers.sites.executors import (
    NAME_PREFIX,
    Failed,
    Job,
    Mended,
    executor,
    inherit,
    native_name,
    psij_job,
    run_command,
)
from workers.sites.records import NOT_BEGUN, Claim, Ended, Records

_log = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.5
ASK_MANY_MAX = 500
NOT_BEGUN_DETAIL = "its program was not begun: its node could not read or write the job's folder"

# What the commands say when the controller was too slow or away. It may have taken the job all the same.
UNSURE = re.compile(
    r"timed? ?out|unable to contact|connect(ion)? (failure|refused|reset)|zero bytes|not responding"
    r"|temporarily unable|transport endpoint|unexpected message|communication|network|slow down|try again"
    r"|(cannot|unable to|failed to) connect|is down\b",
    re.IGNORECASE,
)
# What they say when a limit on jobs is reached that goes away as others end, or when an operator closed the queue.
BUSY = re.compile(
    r"MaxSubmit|SubmitJobsLimit|too many jobs|maximum number of (user )?jobs|exceeds queue job limit|inactive or drain"
    r"|would exceed .* limit|threshold reached|queue (is not enabled|has been closed)|submission is disabled",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"^\d+(\[\d*\]|_\d+)?")


class Batch(Blocking):
    """A batch system of which PSI/J has an executor. What PSI/J cannot do, a subclass does."""

    def __init__(self, config: SiteConfig, of: type[Mended], now: Callable[[], float] = time.time) -> None:
        self.config = config
        self._now = now
        self._executor = executor(of, config.kind, config)
        self._missing_since: dict[str, float] = {}

    async def submit(self, job: Submission) -> str:
        """See ``BatchSystem.submit``."""
        self.check(job)
        return await super().submit(job)

    async def capacity(self) -> Capacity | None:
        """See ``BatchSystem.capacity``."""
        return None

    # ------------------------------------------------------------ what a subclass knows

    @abstractmethod
    def check(self, job: Submission) -> None:
        """Refuse what no job at this batch system may ask for.

        Raises:
            BadRequest: the message says what.
        """

    @abstractmethod
    def look_up(self, name: str, *, ever: bool) -> list[str]:
        """Return the native ids of all jobs of ours with this name, the first submitted first, ended ones too.

        Args:
            name: the name.
            ever: look for it also among those that the queue has forgotten, where that is another question.

        Raises:
            Failed, SiteUnreachable: nobody knows.
        """

    @abstractmethod
    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Return how the jobs are that the batch system knows, by native id.

        Raises:
            Failed, SiteUnreachable: nobody knows.
        """

    def after_purge(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Return how jobs ended that the queue no longer knows, by native id, where the batch system keeps accounts.

        Raises:
            SiteUnreachable: it does, and they cannot be asked for now.
        """
        return {}

    def explain(self, job: Known, status: JobStatus) -> JobStatus:
        """Return the status of a job with what the batch system says of it elsewhere than in the queue."""
        return status

    def ask(self, command: list[str], native_ids: Sequence[str], unknown: re.Pattern[str]) -> str:
        """Ask for jobs by their ids, and return what was told of those that are known.

        Args:
            command: what the ids are put behind.
            native_ids: the jobs.
            unknown: what is said of one that is not known any more, and fails the command.

        Raises:
            Failed: something else was said.
            SiteUnreachable: nothing was.
        """
        told = []
        for begin in range(0, len(native_ids), ASK_MANY_MAX):
            try:
                told.append(run_command(self.config, [*command, *native_ids[begin : begin + ASK_MANY_MAX]]))
            except Failed as error:
                said = [line for line in error.stderr.splitlines() if line.strip()]
                if not said or not all(unknown.search(line) for line in said):
                    raise
                told.append(error.printed)
        return "\n".join(told)

    # ------------------------------------------------------------ submitting

    def _submit(self, job: Submission) -> str:
        def write(records: Records) -> Job:
            records.prepare(job.before, job.after)
            made = psij_job(self.config, job, self.config.kind)
            Path(job.spec.directory or job.folder).mkdir(parents=True, exist_ok=True)
            return made

        return self._once(native_name(job.job_id), Records(job.folder), write)

    def _once(self, name: str, records: Records, write: Callable[[Records], Job]) -> str:
        """Submit under a lock, after a look; the look is long where an earlier submission is of unknown fate.

        ``write`` writes what is submitted. It does so only then: of what was submitted already, jobs may be reading.
        """
        records.make()
        with records.submitting() as lock:
            attempted = records.attempted()
            found = self._find_by_name(name, records, ever=attempted)
            if found is None and attempted:
                found = self._settle(name, records)
            if found is not None:
                records.note_native_id(found, name)
                return found
            made = write(records)
            records.note_attempt()
            inherit(lock)
            try:
                self._executor.submit(made)
            except SiteUnreachable as error:
                found = self._unsure(name, records, str(error))
            except psij.SubmitException as error:
                found = self._refused(name, records, str(error))
            else:
                found = str(made.native_id)
            finally:
                inherit()
            records.note_native_id(found, name)
            return found

    def _refused(self, name: str, records: Records, said: str) -> str:
        """Return the native id if the job was submitted after all; else tell what went wrong."""
        where = f"{self.config.name} did not take {name}: {said.strip().rstrip('.')}."
        if BUSY.search(said):
            records.forget_attempt()
            raise SubmitBusy(where, hint="Try again as other jobs end, or when the queue is open.")
        if not UNSURE.search(said):
            records.forget_attempt()
            raise SubmitRejected(where, hint="Change what the job asks for, or send it to another site.")
        return self._unsure(name, records, where)

    def _unsure(self, name: str, records: Records, said: str) -> str:
        found = self._settle(name, records)
        if found is None:
            raise SubmitUnsure(said, hint=f"No job of this name came up within {self.config.settle_s:g} s.")
        return found

    def _settle(self, name: str, records: Records) -> str | None:
        """Look for a job whose submission is of unknown fate until it is there, or can no longer come.

        Raises:
            SubmitUnsure: the batch system could not be asked; the attempt stays noted.
        """
        give_up_at = time.monotonic() + self.config.settle_s
        while True:
            try:
                found = self._find_by_name(name, records, ever=True)
            except SiteUnreachable as error:
                raise SubmitUnsure(
                    f"{name} may have been submitted: {error}", hint="It is looked for again."
                ) from error
            if found is not None:
                return found
            if time.monotonic() >= give_up_at:
                records.forget_attempt()
                return None
            time.sleep(min(LOOK_AGAIN_S, self.config.settle_s))

    def _find(self, job_id: str, records: Records) -> str | None:
        return self._find_by_name(native_name(job_id), records, ever=True)

    def _find_by_name(self, name: str, records: Records, *, ever: bool) -> str | None:
        noted = records.native_id()
        if noted is not None:
            return noted
        try:
            found = self.look_up(name, ever=ever)
        except Failed as error:
            raise away(self.config, error) from error
        if len(found) > 1:  # only the first keeps its place; the program would run once in any case
            with suppress(SiteUnreachable):
                self.end(found[1:])
        return found[0] if found else None

    # ------------------------------------------------------------ looking

    def _status(self, jobs: Sequence[Known]) -> dict[str, JobStatus]:
        found = ((job, Records(job.folder).claim()) for job in jobs)
        claimed = [(job, claim) for job, claim in found if claim is not None and alike(claim.native_id, job.native_id)]
        seen = self._seen([*(job.native_id for job in jobs), *(claim.native_id for _, claim in claimed)])
        claims = {job.job_id: claim for job, claim in claimed if is_own(job, claim, seen)}
        native = {job.job_id: claims[job.job_id].native_id if job.job_id in claims else job.native_id for job in jobs}
        now = self._now()
        since = {native_id: self._missing_since.get(native_id, now) for native_id in native.values()}
        self._missing_since = {native_id: at for native_id, at in since.items() if native_id not in seen}
        silent = self._ask_accounts([native_id for native_id, at in self._missing_since.items() if at < now], seen)
        self._missing_since |= dict.fromkeys(silent, now)
        told = {}
        for job in jobs:
            native_id = native[job.job_id]
            missing_s = now - self._missing_since.get(native_id, now)
            try:
                told[job.job_id] = self._one(job, native_id, seen.get(native_id), claims.get(job.job_id), missing_s)
            except Exception:  # whatever is wrong with one job is its own; the others are told of
                _log.exception("site %s: job %s cannot be judged", self.config.name, job.job_id)
        return told

    def _seen(self, native_ids: Collection[str]) -> dict[str, JobStatus]:
        try:
            return self.queue(sorted(set(native_ids)))
        except Failed as error:
            raise away(self.config, error) from error

    def _ask_accounts(self, native_ids: Sequence[str], seen: dict[str, JobStatus]) -> Sequence[str]:
        """Add what the accounts tell of jobs that the queue has forgotten to ``seen``.

        Returns:
            Those of which nobody knows now. Their own records may tell; else nothing is concluded from the silence.
        """
        try:
            seen |= self.after_purge(native_ids) if native_ids else {}
        except SiteUnreachable as error:
            _log.warning("of %d jobs nobody knows now how they ended: %s", len(native_ids), error)
            return native_ids
        return ()

    def _one(
        self, job: Known, native_id: str, found: JobStatus | None, claim: Claim | None, missing_s: float
    ) -> JobStatus:
        records = Records(job.folder)
        ended = records.ended()
        if claim is None and ended is not None:  # it began after we looked for that, and has ended since
            claim = records.claim()
        status = judge(native_id, found, claim, ended, job.limit_s, missing_s, self.config.unseen_s)
        return self.explain(job, status)

    # ------------------------------------------------------------ ending

    def _cancel(self, jobs: Sequence[Known]) -> None:
        """End jobs, but not what has got their numbers meanwhile: a batch system may begin to count anew."""
        seen = self._seen([job.native_id for job in jobs])
        those = [job.native_id for job in jobs if may_end(job, seen.get(job.native_id))]
        if those:
            self.end(those)

    def end(self, native_ids: Sequence[str]) -> None:
        """End jobs by their ids, whatever they are; those that have ended already are left as they are.

        Raises:
            SiteUnreachable: it cannot be done now.
        """
        for native_id in native_ids:
            try:
                run_command(self.config, self._executor.get_cancel_command(native_id))
            except Failed as error:
                if UNSURE.search(error.output):
                    raise away(self.config, error) from error
                # it has ended, or was never there: what the next look at the queue tells stands


def away(config: SiteConfig, error: Failed) -> SiteUnreachable:
    """Return what a command's failure means that tells nothing of any job."""
    return SiteUnreachable(f"{config.name}: {error.output}", hint="Is the controller up?")


def alike(native_id: str, other: str) -> bool:
    """Say whether ids differ in their numbers only. Of others a batch system may say nothing, or ask another one."""
    return _NUMBER.sub("", native_id, count=1) == _NUMBER.sub("", other, count=1)


def names_of(job: Known) -> set[str]:
    """Return the names that a job may have in the queue: its own, or that of the array that it belongs to."""
    return {native_name(job.job_id), Records(job.folder).native_name()}


def is_own(job: Known, claim: Claim, seen: Mapping[str, JobStatus]) -> bool:
    """Say whether a claim may be believed: the job wrote it, and may have put in the id of another one."""
    found = seen.get(claim.native_id)
    return claim.native_id == job.native_id or found is None or not found.name or found.name in names_of(job)


def may_end(job: Known, found: JobStatus | None) -> bool:
    """Say whether a job is to be ended by its id, from what the queue shows under that."""
    if found is None or not found.name:
        return True  # too new to be shown, or over
    if found.state in FINAL:
        return False
    names = names_of(job)
    if "" in names and not job.native_id.isdigit():  # a member of an array of which nothing is noted any more
        return found.name.startswith(NAME_PREFIX)
    return found.name in names


def refuse(job: Submission, dialect: str, reserved: Callable[[str], bool]) -> None:
    """Refuse options of a batch system that would undo what the platform promises of a job.

    Raises:
        BadRequest: the job has one of them.
    """
    for name in job.spec.attributes.custom_attributes:
        kind, _, option = name.partition(".")
        if kind == dialect and reserved(option):
            raise BadRequest(f"attributes: {name} is set by Headrace", hint="Leave it out.")


def abbreviates(options: Collection[str]) -> Callable[[str], bool]:
    """Return what says whether a word is taken for one of these options: their first letters are enough to many."""
    return lambda word: any(option.startswith(word) for option in options)


def judge(
    native_id: str,
    seen: JobStatus | None,
    claim: Claim | None,
    ended: Ended | None,
    limit_s: float | None,
    missing_s: float,
    unseen_s: float,
) -> JobStatus:
    """Say how a job is, from what the queue and the job itself tell.

    The batch system's word that it ended a job stands, and so does the job's own record of its exit code, which the
    queue may not have. Of a job that nobody knows it is said that it is lost, but not before it was missing for long:
    a queue that has just been started, or does not yet show what it took, has no word either.
    """
    if ended is not None and ended.native_id != native_id:
        ended = None  # left by an earlier run of the same job
    if seen is not None:
        if seen.reason == "exit_code" and seen.exit_code in NOT_BEGUN and claim is None and ended is None:
            return msgspec.structs.replace(seen, reason="node_failure", exit_code=None, detail=NOT_BEGUN_DETAIL)
        if seen.state in FINAL:
            return _with_record(seen, claim, ended)
        if ended is not None and ended.exit_code == 0 and claim is not None and _in_time(claim, ended, limit_s):
            return _with_record(msgspec.structs.replace(seen, state="completed", reason="", detail=""), claim, ended)
        return _with_record(seen, claim, None)
    if ended is not None:
        state, reason = _reason(ended.exit_code)
        return _with_record(JobStatus(native_id=native_id, state=state, reason=reason), claim, ended)
    if missing_s < unseen_s:
        waits = claim is None
        return JobStatus(
            native_id=native_id,
            state="queued" if waits else "active",
            detail="not seen in the queue",
            started_at=None if claim is None else claim.at,
        )
    return JobStatus(
        native_id=native_id,
        state="failed",
        reason="lost",
        detail="unknown to the batch system, and without a record of its end",
        started_at=None if claim is None else claim.at,
    )


def _in_time(claim: Claim, ended: Ended, limit_s: float | None) -> bool:
    """Say whether a program ended by itself: past its limit, it may have been told to end and did so politely."""
    return limit_s is None or ended.at - claim.at < limit_s


def _reason(exit_code: int) -> tuple[JobState, Reason]:
    if exit_code == 0:
        return "completed", ""
    return "failed", "signal" if is_signal(exit_code) else "exit_code"


def _with_record(status: JobStatus, claim: Claim | None, ended: Ended | None) -> JobStatus:
    """Return the status with what the job's own records tell better than the queue."""
    started_at = claim.at if claim is not None else status.started_at
    if ended is None:
        return msgspec.structs.replace(status, started_at=started_at)
    state, reason, exit_code = status.state, status.reason, ended.exit_code
    if state == "completed" or reason in ("exit_code", "signal"):
        state, reason = _reason(exit_code)  # some scripts end well whatever their program did
    return msgspec.structs.replace(
        status, state=state, reason=reason, exit_code=exit_code, started_at=started_at, ended_at=ended.at
    )
