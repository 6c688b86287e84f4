"""Job arrays, where a batch system has them: one submission, and each member finds what is its own by its number."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import psij
from psij import Launcher

from headrace.errors import BadRequest, TooLarge
from headrace.jobs import JobSpec
from workers.sites.base import ARRAY_JOBS_MAX, Submission
from workers.sites.batch import Batch
from workers.sites.executors import Job, beside, environment, launcher_of, native_name, psij_job
from workers.sites.records import Records


class ArrayBatch(Batch):
    """A batch system with arrays. Their members are numbered from ``FIRST``, and know theirs by ``INDEX``."""

    INDEX: ClassVar[str]
    FIRST: ClassVar[int] = 0

    @abstractmethod
    def mark_array(self, spec: psij.JobSpec, numbers: str) -> None:
        """Make a job an array, with numbers such as ``0-11``."""

    @abstractmethod
    def member(self, array: str, number: int) -> str:
        """Return the native id of a member of an array, by that of the array."""

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """See ``BatchSystem.submit_array``: one array. One job alone is none: PBS has no array of one."""
        for job in jobs:
            self.check(job)
        if len(jobs) == 1:
            return await super().submit_array(array_id, jobs)
        return await self.beside(self._submit_array, array_id, jobs)

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        """See ``BatchSystem.find``."""
        found = await super().find(job_id, folder)
        return found if found is None or place is None else self.member(found, self.FIRST + place)

    def _submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        first, name = jobs[0], native_name(array_id)
        group = Submission(job_id=array_id, spec=array_spec(jobs), folder=first.folder.parent / name)
        array = self._once(name, Records(group.folder), lambda records: self._write_array(group, records, jobs))
        native = {job.job_id: self.member(array, number) for number, job in enumerate(jobs, self.FIRST)}
        for job in jobs:
            Records(job.folder).make()
            Records(job.folder).note_native_id(native[job.job_id], name)
        return native

    def _write_array(self, group: Submission, records: Records, jobs: Sequence[Submission]) -> Job:
        """Write what the array and its members do."""
        records.prepare("", "")
        members = [psij_job(self.config, job, self.config.kind) for job in jobs]
        config = beside(records)  # what starts their processes, once for all
        launchers = {name: self._executor.new_launcher(name, config) for name in map(launcher_of, members)}
        for number, (job, made) in enumerate(zip(jobs, members, strict=True), self.FIRST):
            made.records.prepare(job.before, job.after)
            (group.folder / f"{number}.sh").write_text(self._member_script(job, made, launchers[launcher_of(made)]))
        whole = psij_job(self.config, group, self.config.kind, single=True)
        spec = cast(psij.JobSpec, whole.spec)
        member = f'{shlex.quote(str(group.folder))}/"${self.INDEX}".sh'
        spec.executable, spec.arguments = "/bin/bash", ["-c", f"exec bash {member}"]
        spec.pre_launch = spec.post_launch = None  # each member has its own
        spec.stdout_path = spec.stderr_path = Path("/dev/null")
        self.mark_array(spec, f"{self.FIRST}-{self.FIRST + len(jobs) - 1}")
        return whole

    def _member_script(self, job: Submission, made: Job, launcher: Launcher) -> str:
        """Return what one member of an array does: what it would do as a job of its own."""
        where = shlex.quote(str(job.spec.directory or job.folder))
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment(self.config, job).items()]
        launch = shlex.join(launcher.get_launch_command(made))
        return "\n".join([f"cd {where} || exit", *lines, f"exec {launch}", ""])


def array_spec(jobs: Sequence[Submission]) -> JobSpec:
    """Return the specification of an array: what all its members have in common.

    Raises:
        TooLarge: there are too many.
        BadRequest: they are not of one shape.
    """
    first = jobs[0].spec
    if len(jobs) > ARRAY_JOBS_MAX:
        raise TooLarge(f"an array of {len(jobs)} jobs; at most {ARRAY_JOBS_MAX}", hint="Submit several.")
    for job in jobs:
        if (job.spec.resources, job.spec.attributes) != (first.resources, first.attributes):
            raise BadRequest(
                f"jobs {jobs[0].job_id} and {job.job_id} need different resources or attributes",
                hint="Only jobs of one shape can be one array.",
            )
    return JobSpec(executable="/bin/bash", resources=first.resources, attributes=first.attributes)
