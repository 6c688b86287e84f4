"""What a job's own folder tells of it: who claimed it, and how its program ended.

The job writes this itself, on the site's shared disk, so it holds when the queue has forgotten the job, when the agent
was away, and when the network was. The claim is also a fence: of two jobs with the same folder only one runs its
program, whatever went wrong at their submission.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from msgspec import Struct

from headrace.jobs import RECORDS, Reason
from workers.sites.base import SubmitUnsure

DUPLICATE_EXIT_CODE = 113
# A job's own name for itself, by the variables of the batch systems; a plain machine has the process id.
NATIVE_ID = (
    '"${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"',
    '"$SLURM_JOB_ID"',
    '"$PBS_JOBID"',
    '"$LSB_JOBID"',
    '"$$"',
)

# Both are read in by PSI/J's launcher script, which stops at the first error: hence `if`, and `|| true`.
_BEFORE = """\
headrace_records={records}
headrace_native=""
for headrace_id in {native}; do
  if [ -z "$headrace_native" ]; then headrace_native="$headrace_id"; fi
done
if ! (set -o noclobber; echo "$headrace_native $(date +%s.%N) $(hostname)" >"$headrace_records/claim") 2>/dev/null; then
  read -r headrace_first _ <"$headrace_records/claim" || true
  if [ "$headrace_first" != "$headrace_native" ]; then exit {duplicate}; fi
fi
rm -f "$headrace_records/ended"
{more}
"""
_AFTER = """\
echo "$headrace_native $_PSI_J_EC $(date +%s.%N)" >"$headrace_records/ended.new" \
&& mv "$headrace_records/ended.new" "$headrace_records/ended" || true
{more}
"""


class Claim(Struct, frozen=True):
    """Which native job runs the program, since when, and on which node."""

    native_id: str
    at: float
    node: str


class Ended(Struct, frozen=True):
    """How the program of a native job ended."""

    native_id: str
    exit_code: int
    at: float


class Records:
    """The records in one job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RECORDS
        self.before = self.path / "before.sh"
        self.after = self.path / "after.sh"
        self.progress = self.path / "progress"  # what the program writes: a share of the whole, and a few words
        self.stdout = folder / "stdout.txt"
        self.stderr = folder / "stderr.txt"

    def prepare(self, before: str, after: str) -> None:
        """Make the folder and the scripts that the job reads in before and after its program."""
        self.path.mkdir(parents=True, exist_ok=True)
        records = shlex.quote(str(self.path))
        native = " ".join(NATIVE_ID)
        text = _BEFORE.format(records=records, native=native, duplicate=DUPLICATE_EXIT_CODE, more=_harmless(before))
        _write(self.before, text)
        _write(self.after, _AFTER.format(more=_harmless(after)))

    def claim(self) -> Claim | None:
        """Return who runs the program; None as long as nobody began."""
        words = _words(self.path / "claim", 3)
        return Claim(words[0], float(words[1]), words[2]) if words else None

    def ended(self) -> Ended | None:
        """Return how the program ended; None as long as it runs, and for ever if it was not left to end."""
        words = _words(self.path / "ended", 3)
        return Ended(words[0], int(words[1]), float(words[2])) if words else None

    def native_id(self) -> str | None:
        """Return the native id that was noted at the submission or, better, by the job itself."""
        claim = self.claim()
        if claim is not None:
            return claim.native_id
        words = _words(self.path / "native", 1)
        return words[0] if words else None

    def note_native_id(self, native_id: str) -> None:
        """Note under which id the job was submitted; its submission is then no longer unsure."""
        _write(self.path / "native", f"{native_id}\n")
        self.forget_attempt()

    def note_killed(self, why: Reason) -> None:
        """Note that the job is ended from outside, and why; the first reason stands."""
        if not (self.path / "killed").exists():
            _write(self.path / "killed", f"{why} {time.time():.3f}\n")

    def killed(self) -> tuple[Reason, float] | None:
        """Return why and when the job was ended from outside."""
        words = _words(self.path / "killed", 2)
        return (cast(Reason, words[0]), float(words[1])) if words else None

    @contextmanager
    def submitting(self) -> Iterator[int]:
        """Let one submission of this job go on at a time, on this machine; gives the descriptor of the lock.

        The submitting command inherits it: one that was left behind by an agent that died holds the lock until it is
        gone, too, so nobody submits beside it.

        Raises:
            SubmitUnsure: another process submits this job.
        """
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SubmitUnsure(
                    f"{self.folder.name} is being submitted by another process", hint="Ask again in a few seconds."
                ) from None
            yield handle
        finally:
            os.close(handle)

    def note_attempt(self) -> None:
        """Note that a submission begins whose fate is not known until something else is noted."""
        _write(self.path / "attempt", f"{time.time():.3f}\n")

    def attempted(self) -> bool:
        """Say whether a submission began of which nobody knows how it went."""
        return self.attempted_at() is not None

    def attempted_at(self) -> float | None:
        """Return when a submission began of which nobody knows how it went."""
        with suppress(FileNotFoundError):
            return (self.path / "attempt").stat().st_mtime
        return None

    def forget_attempt(self) -> None:
        """Note that no submission is of unknown fate any more."""
        (self.path / "attempt").unlink(missing_ok=True)


def _harmless(lines: str) -> str:
    """Return lines of bash that can neither end the script that reads them in nor leave anything behind in it."""
    return f"(\nset +e\n{lines}\n) </dev/null || true" if lines.strip() else ""


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text)
    aside.replace(path)


def _words(path: Path, count: int) -> list[str] | None:
    """Return the words of a record; None if it is not there, or not yet written to its end."""
    with suppress(OSError):
        text = path.read_text()
        words = text.split()
        if text.endswith("\n") and len(words) == count:
            return words
    return None
