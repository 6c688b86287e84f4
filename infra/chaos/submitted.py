"""The functions of the trials that submit jobs, and the jobs. Each notes what it did outside the system.

A follow-up is given how a job ended and nothing else, so the path of the ledger is written into a copy of this file
before it is deployed, and which token a run has stands in a folder beside the ledger.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from headrace import Context, JobAttributes, JobEnd, JobSpec, function, on
from infra.chaos.effects import RETRIES, note

LEDGER = ""
EXIT_CODE = 3
MORTAL = "n1"  # the node that dies
SITE = "lab"
FOREVER_S = 3600
ROOMY = JobAttributes(duration="30m")

# A line for every time that the program of a job begins, then what the task says.
SCRIPT = 'echo "$HEADRACE_JOB_ID" >>"$0.ran"; sleep "$1"; exit "$2"'


def copy(folder: Path, ledger: Path) -> Path:
    """Write the copy that is deployed, and return its path."""
    made = folder / "submitting.py"
    made.write_text(Path(__file__).read_text().replace('LEDGER = ""', f"LEDGER = {str(ledger)!r}", 1))
    return made


def submit(
    task: dict[str, Any], ctx: Context, seconds: float, exit_code: int = 0, attributes: JobAttributes = ROOMY
) -> None:
    """Note it, keep the token for the follow-up, and submit a job."""
    token = note(task, ctx)
    tokens = Path(f"{LEDGER}.tokens")
    tokens.mkdir(exist_ok=True)
    aside = tokens / f"{ctx.run_id}.{os.getpid()}"
    aside.write_text(token)
    aside.replace(tokens / ctx.run_id)
    job = JobSpec(
        executable="/bin/bash",
        arguments=["-c", SCRIPT, LEDGER, str(seconds), str(exit_code)],
        attributes=attributes,
        sites=[SITE],
    )
    ctx.submit(job, then=went_well, on_failure=went_wrong)


def note_end(end: JobEnd, ctx: Context) -> str:
    """Note that the follow-up ran and what it was given."""
    token = Path(f"{LEDGER}.tokens", ctx.run_id).read_text()
    ends = Path(f"{LEDGER}.ends")
    ends.mkdir(exist_ok=True)
    (ends / f"{end.job_id}.{ctx.invocation_id}").write_bytes(msgspec.json.encode(end))
    return note({"ledger": LEDGER, "token": token}, ctx)


@on(deadline="900s")
@function(retries=RETRIES)
def simulated(task: dict[str, Any], ctx: Context) -> None:
    """Submit a job that takes as long as the task says."""
    submit(task, ctx, float(task.get("takes_s", 2.0)))


@on(deadline="900s")
@function(retries=RETRIES)
def exiting(task: dict[str, Any], ctx: Context) -> None:
    """Submit a job that ends with an exit code."""
    submit(task, ctx, 1.0, EXIT_CODE)


@on(deadline="900s")
@function(retries=RETRIES)
def outlasting(task: dict[str, Any], ctx: Context) -> None:
    """Submit a job that takes longer than it may, on a node that does not die before that."""
    excluded = {"slurm.exclude": MORTAL}
    submit(task, ctx, FOREVER_S, attributes=JobAttributes(duration="1m", custom_attributes=excluded))


@on(deadline="900s")
@function(retries=RETRIES)
def unwanted(task: dict[str, Any], ctx: Context) -> None:
    """Submit a job that somebody will cancel."""
    submit(task, ctx, FOREVER_S)


@function(retries=RETRIES)
def went_well(end: JobEnd, ctx: Context) -> str:
    """Follow a job that completed."""
    return note_end(end, ctx)


@function(retries=RETRIES)
def went_wrong(end: JobEnd, ctx: Context) -> str:
    """Follow a job that failed."""
    return note_end(end, ctx)
