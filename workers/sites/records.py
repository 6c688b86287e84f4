"""What a job's own folder tells of it: who claimed it, and how its program ended.

The job writes this itself, on the site's shared disk, so it holds when the queue has forgotten the job, when the agent
was away, and when the network was. The claim is also a fence: of two jobs with the same folder only one runs its
program, whatever went wrong at their submission. What a job writes is not to be trusted: a record that makes no sense
is none.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from headrace.errors import HeadraceError
from headrace.jobs import REASONS, RECORDS, Reason
from workers.guard import open_inside
from workers.sites.base import SubmitUnsure

DUPLICATE_EXIT_CODE = 113
UNCLAIMED_EXIT_CODE = 114  # the disk took no claim, and what runs without one might run twice
# What a shell says of a script that is not there, or not to be read: the launcher is in the job's folder, too.
NOT_BEGUN = (DUPLICATE_EXIT_CODE, UNCLAIMED_EXIT_CODE, 126, 127)
RECORD_BYTES_MAX = 4096
TAIL_BYTES = 4096
EXIT_CODE_MAX = 255
INSTANT_MAX = 1e11
_ID = re.compile(r"[A-Za-z0-9_.\[\]-]{1,200}")  # with what is put before or behind it, still the name of a file
T = TypeVar("T")
# A job's own name for itself, by the variables of the batch systems; a plain machine has the process id.
NATIVE_ID = (
    '"${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"',
    '"$SLURM_JOB_ID"',
    '"$PBS_JOBID"',
    '"$LSB_JOBID${LSB_JOBINDEX:+[$LSB_JOBINDEX]}"',
    '"$HEADRACE_FLUX_JOB"',
    '"$$"',
)

_EXIT_CODES = {"duplicate": DUPLICATE_EXIT_CODE, "unclaimed": UNCLAIMED_EXIT_CODE}
# Both are read in by PSI/J's launcher script, which stops at the first error: hence `if`, and `|| true`.
_BEFORE = """\
headrace_records={records}
headrace_native=""
for headrace_id in {native}; do
  if [ -z "$headrace_native" ]; then headrace_native="$headrace_id"; fi
done
headrace_claim="$headrace_native $(date +%s.%N) $(hostname)"
if (set -o noclobber; : >"$headrace_records/claim") 2>/dev/null; then
  if ! echo "$headrace_claim" >"$headrace_records/claim"; then
    rm -f "$headrace_records/claim"
    exit {unclaimed}
  fi
elif [ -e "$headrace_records/claim" ]; then
  read -r headrace_first _ <"$headrace_records/claim" || true
  if [ "$headrace_first" != "$headrace_native" ]; then exit {duplicate}; fi
else
  exit {unclaimed}
fi
rm -f "$headrace_records/ended"
{more}
"""
# Of several processes the last one may have ended well, and another one not.
_AFTER = """\
_PSI_J_EC="${{_PSI_J_FAILED_EC:-$_PSI_J_EC}}"
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
        self.script = self.path / "batch.sh"
        self.before = self.path / "before.sh"
        self.after = self.path / "after.sh"
        self.progress = self.path / "progress"  # what the program writes: a share of the whole, and a few words
        self.stdout = folder / "stdout.txt"
        self.stderr = folder / "stderr.txt"

    def prepare(self, before: str, after: str) -> None:
        """Make the folder and the scripts that the job reads in before and after its program.

        Raises:
            OSError: they cannot be written.
        """
        self.make()
        records = shlex.quote(str(self.path))
        native = " ".join(NATIVE_ID)
        text = _BEFORE.format(records=records, native=native, more=_harmless(before), **_EXIT_CODES)
        _write(self.before, text)
        _write(self.after, _AFTER.format(more=_harmless(after)))

    def make(self) -> None:
        """Make the folder, but not what it is in: where that is gone, so is the disk of the site.

        Raises:
            OSError: it cannot be made.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def claim(self) -> Claim | None:
        """Return who runs the program; None as long as nobody began."""
        return self._read("claim", lambda native_id, at, node: Claim(_id(native_id), _instant(at), node))

    def ended(self) -> Ended | None:
        """Return how the program ended; None as long as it runs, and for ever if it was not left to end."""
        return self._read("ended", lambda native_id, code, at: Ended(_id(native_id), _exit_code(code), _instant(at)))

    def native_id(self) -> str | None:
        """Return the native id that was noted at the submission or, better, by the job itself."""
        claim = self.claim()
        if claim is not None:
            return claim.native_id
        noted = self._noted()
        return noted[0] if noted else None

    def native_name(self) -> str:
        """Return the name under which the job was submitted: its own, or that of its array; empty if none is noted."""
        noted = self._noted()
        return noted[1] if noted else ""

    def note_native_id(self, native_id: str, name: str) -> None:
        """Note under which id and name the job was submitted; its submission is then no longer unsure."""
        _write(self.path / "native", f"{native_id} {name}\n")
        self.forget_attempt()

    def note_array(self, array_id: str) -> None:
        """Note that the job belongs to an array, which is about to be submitted."""
        _write(self.path / "array", array_id)

    def array_id(self) -> str | None:
        """Return the array that the job belongs to; None where it is one by itself."""
        return self._read("array", _id, whole=False)

    def _noted(self) -> tuple[str, str] | None:
        return self._read("native", lambda native_id, name="": (_id(native_id), name))

    def note_killed(self, why: Reason) -> None:
        """Note that the job is ended from outside, and why; the first reason stands."""
        if not (self.path / "killed").exists():
            _write(self.path / "killed", f"{why} {time.time():.3f}\n")

    def killed(self) -> tuple[Reason, float] | None:
        """Return why and when the job was ended from outside."""
        return self._read("killed", lambda why, at: (_why(why), _instant(at)))

    def _read(self, name: str, make: Callable[..., T], *, whole: bool = True) -> T | None:
        """Return a record, made from its words; None if it is not there, or not to be read.

        Any file may be there instead: one without end, or one that blocks who opens it. ``whole`` ones have a line's
        end: a job may be writing them just now.
        """
        with suppress(OSError, ValueError, TypeError):
            handle = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                text = os.read(handle, RECORD_BYTES_MAX).decode()
            finally:
                os.close(handle)
            if text.endswith("\n") or not whole:
                return make(*text.split())
        return None

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


def tail(path: Path) -> str:
    """Return the last lines of what a job wrote, of ``TAIL_BYTES`` at most; nothing where there is no file. Blocks.

    The job may have put there what never ends, or blocks who opens it.
    """
    with suppress(OSError, HeadraceError):
        handle = open_inside(path.parent, path.name)
        try:
            size = os.fstat(handle).st_size
            text = os.pread(handle, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        finally:
            os.close(handle)
        return text if size <= TAIL_BYTES else text.partition("\n")[2] or text
    return ""


def _harmless(lines: str) -> str:
    """Return lines of bash that can neither end the script that reads them in nor leave anything behind in it."""
    return f"(\nset +e\n{lines}\n) </dev/null || true" if lines.strip() else ""


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.new")
    # What is there already may be anything, such as a pipe that nobody reads.
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    aside.replace(path)


def _id(word: str) -> str:
    if not _ID.fullmatch(word):
        raise ValueError(word)
    return word


def _instant(word: str) -> float:
    at = float(word)
    if not (math.isfinite(at) and 0.0 <= at <= INSTANT_MAX):
        raise ValueError(word)
    return at


def _exit_code(word: str) -> int:
    code = int(word)
    if not 0 <= code <= EXIT_CODE_MAX:
        raise ValueError(word)
    return code


def _why(word: str) -> Reason:
    if word not in REASONS:
        raise ValueError(word)
    return word
