"""What batch systems print, read: every state of Slurm, odd lines among plain ones, and how a job is judged from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import BadRequest
from headrace.jobs import REASONS, JobSpec, Resources
from workers.sites import open_site
from workers.sites.base import JobStatus, SiteConfig
from workers.sites.batch import judge
from workers.sites.executors import command
from workers.sites.records import Claim, Ended, Records
from workers.sites.slurm import (
    STATES,
    count,
    exit_code,
    is_open,
    parse_accounts,
    parse_nodes,
    parse_queue,
    state,
)

# https://slurm.schedmd.com/squeue.html, "JOB STATE CODES", and those that newer versions add.
SLURM_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PENDING", "PREEMPTED", "RUNNING", "RESV_DEL_HOLD", "REQUEUE_FED", "REQUEUE_HOLD", "REQUEUED"),
    *("RESIZING", "REVOKED", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED", "TIMEOUT"),
}

# Printed by Slurm 22.05 to the command of ``workers.sites.slurm``, columns made narrower.
QUEUE = """\
2_0 |5 |COMPLETED |0 |0 |1795275184 |1795275185 |n1 |None |hr-arr
1 |1 |FAILED |768 |0 |1795275184 |1795275185 |n1 |NonZeroExitCode |hr-a
3 |3 |PENDING |0 |0 |N/A |N/A | |JobHeldUser |wrap
4 |4 |RUNNING |0 |1 |1795275184 |1795275484 |n[2-3] |None |x y
7 |7 |PENDING |0 |0 |N/A |N/A | |ReqNodeNotAvail, UnavailableNodes:n[1-3] |a | b  c
8 |8 |FAILED |9 |0 |1795275184 |1795275185 |n1 |RaisedSignal:9(Killed) |hr-b
9 |9 |CANCELLED |0 |0 |1795275184 |1795275184 | |None |hr-c
10 |10 |TIMEOUT |0 |0 |1795275184 |1795275245 |n1 |TimeLimit |hr-d
11 |11 |DEADLINE |0 |0 |1795275184 |1795275184 | |DeadLine |hr-e
12 |12 |NODE_FAIL |1 |0 |1795275184 |1795275190 |n3 |NodeDown |hr-f
13 |13 |FAILED |0 |0 |1795275184 |1795275184 | |BadConstraints |hr-g
14 |14 |OUT_OF_MEMORY |125 |0 |1795275184 |1795275190 |n3 |OutOfMemory |hr-h
15 |15 |PENDING |0 |1 |N/A |N/A | |launch failed requeued held |hr-i
17 |17 |FAILED |9 |0 |1795275184 |1795275185 |n1 |JobLaunchFailure |hr-k
18 |18 |FAILED |53 |0 |1795275184 |1795275185 |n1 |JobLaunchFailure |hr-l
slurm_load_jobs error: this is no line of the table
16 |16 |SOMETHING_NEW |0 |0 |1795275184 |N/A |n1 |None |hr-j
"""


def test_every_state_of_slurm_has_a_word_of_ours() -> None:
    assert set(STATES) == SLURM_STATES
    assert {reason for _, reason in STATES.values()} <= set(REASONS)


def test_one_look_tells_all_jobs_apart_and_no_line_hides_another() -> None:
    told = parse_queue(QUEUE)
    assert {native_id: (job.state, job.reason, job.exit_code) for native_id, job in told.items()} == {
        "2_0": ("completed", "", 0),
        "1": ("failed", "exit_code", 3),
        "3": ("held", "", None),
        "4": ("active", "", None),
        "7": ("queued", "", None),
        "8": ("failed", "signal", 137),
        "9": ("canceled", "canceled", None),
        "10": ("failed", "walltime", None),
        "11": ("failed", "deadline", None),
        "12": ("failed", "node_failure", None),
        "13": ("failed", "launch", None),
        "14": ("failed", "out_of_memory", None),
        "15": ("held", "", None),
        "16": ("active", "", None),
        "17": ("failed", "signal", 137),
        "18": ("failed", "launch", None),
    }
    assert told["7"].detail == "PENDING: ReqNodeNotAvail, UnavailableNodes:n[1-3]"
    assert (told["4"].restarts, told["4"].nodes, told["4"].started_at) == (1, "n[2-3]", 1795275184.0)
    assert (told["9"].started_at, told["9"].ended_at) == (None, 1795275184.0)
    assert told["4"].ended_at is None  # what Slurm prints there is when it will have to end


@pytest.mark.parametrize(("raw", "code"), [(0, 0), (768, 3), (9, 137), (15, 143), (32512, 127)])
def test_a_wait_status_becomes_an_exit_code(raw: int, code: int) -> None:
    assert exit_code(raw) == code


def test_a_job_that_fails_before_its_program_says_so() -> None:
    assert state("FAILED", "JobLaunchFailure") == ("failed", "launch")
    assert state("FAILED", "NonZeroExitCode") == ("failed", "exit_code")
    assert state("CANCELLED by 1000", "") == ("canceled", "canceled")


def test_accounts_tell_what_the_queue_has_forgotten() -> None:
    told = parse_accounts(
        "7|CANCELLED by 0|0:0|Unknown|1795275185|None assigned\n"
        "8|FAILED|3:0|1795275184|1795275185|n1\n"
        "9|FAILED|0:9|1795275184|1795275185|n1\n"
        "10_3|TIMEOUT|0:0|1795275184|1795275245|n1\n"
        "11|COMPLETED|0:0|1795275184|1795275185|n1\n"
    )
    assert {native_id: (job.state, job.reason, job.exit_code) for native_id, job in told.items()} == {
        "7": ("canceled", "canceled", None),
        "8": ("failed", "exit_code", 3),
        "9": ("failed", "signal", 137),
        "10_3": ("failed", "walltime", None),
        "11": ("completed", "", 0),
    }


def test_free_gpus_are_counted_and_not_read_from_a_nodes_state() -> None:
    nodes = parse_nodes(
        "n1 |mixed |gpu:a100:4 |gpu:a100:4(IDX:0-3) |\n"
        "n1 |mixed |gpu:a100:4 |gpu:a100:4(IDX:0-3) |\n"
        "n2 |idle |gpu:a100:4,gpu:h200:2 |gpu:a100:1(IDX:0),gpu:h200:0(IDX:N/A) |\n"
        "n3 |draining |gpu:4(S:0-1) |gpu:0 |\n"
        "n4 |idle* |gpu:a100:4 |gpu:a100:0(IDX:N/A) |\n"
        "n5 |idle |(null) |gpu:0 |\n"
    )
    found = count(nodes, waiting=3, running=2, queue_open=True, at=1.0)
    assert (found.nodes_total, found.nodes_free, found.nodes_unusable) == (5, 2, 2)
    assert (found.gpus_total, found.gpus_free) == (18, 5)
    assert found.states == {"mixed": 1, "idle": 2, "draining": 1, "idle*": 1}


def test_a_site_is_open_as_its_default_partition_is() -> None:
    assert is_open("gpu*|up\ndebug|inact\n")
    assert not is_open("gpu*|inact\ndebug|up\n")
    assert is_open("debug|up\n")
    assert not is_open("")


# ---------------------------------------------------------------- judging

CLAIM = Claim("7", 100.0, "n1")
ENDED = Ended("7", 0, 110.0)
ACTIVE = JobStatus(native_id="7", state="active", detail="RUNNING")


def judged(
    seen: JobStatus | None, claim: Claim | None = CLAIM, ended: Ended | None = None, missing_s: float = 0.0
) -> tuple[str, str, int | None]:
    status = judge("7", seen, claim, ended, limit_s=60.0, missing_s=missing_s, unseen_s=30.0)
    return status.state, status.reason, status.exit_code


def test_a_program_that_ended_well_is_told_at_once() -> None:
    assert judged(ACTIVE, ended=ENDED) == ("completed", "", 0)


def test_a_program_that_failed_waits_for_the_batch_systems_word_why() -> None:
    assert judged(ACTIVE, ended=Ended("7", 137, 110.0)) == ("active", "", None)
    killed = JobStatus(native_id="7", state="failed", reason="out_of_memory")
    assert judged(killed, ended=Ended("7", 137, 110.0)) == ("failed", "out_of_memory", 137)


def test_a_program_that_ends_politely_at_its_limit_did_not_complete() -> None:
    polite = Ended("7", 0, 160.0)
    assert judged(ACTIVE, ended=polite) == ("active", "", None)
    timeout = JobStatus(native_id="7", state="failed", reason="walltime")
    assert judged(timeout, ended=polite) == ("failed", "walltime", 0)


def test_an_exit_code_that_the_batch_system_does_not_have_is_believed() -> None:
    completed = JobStatus(native_id="7", state="completed", exit_code=0)
    assert judged(completed, ended=Ended("7", 3, 110.0)) == ("failed", "exit_code", 3)


def test_a_record_of_another_native_job_is_not_this_ones() -> None:
    assert judged(ACTIVE, ended=Ended("6", 0, 90.0)) == ("active", "", None)


def test_a_job_that_nobody_sees_has_a_grace_period_and_is_never_guessed_to_be_well() -> None:
    assert judged(None, claim=None, missing_s=0.0) == ("queued", "", None)
    assert judged(None, missing_s=29.0) == ("active", "", None)
    assert judged(None, missing_s=30.0) == ("failed", "lost", None)
    assert judged(None, ended=ENDED, missing_s=0.0) == ("completed", "", 0)
    assert judged(None, ended=Ended("7", 139, 110.0)) == ("failed", "signal", 139)


# ---------------------------------------------------------------- records and commands


def test_a_record_that_is_not_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.prepare("", "")
    assert records.claim() is None
    (records.path / "claim").write_text("7 100.5 n")
    assert records.claim() is None
    (records.path / "claim").write_text("7 100.5 n1\n")
    assert records.claim() == Claim("7", 100.5, "n1")


def site(container: str | None) -> SiteConfig:
    return SiteConfig(
        name="lab",
        kind="slurm",
        work="/work",
        container="apptainer" if container == "apptainer" else "podman" if container else None,
    )


def test_a_container_is_run_by_the_program_that_the_site_has() -> None:
    spec = JobSpec(
        executable="md", arguments=["-n", "2"], container="md.sif", resources=Resources(gpu_cores_per_process=1)
    )
    folder = Path("/scratch/j1")
    assert command(site("apptainer"), spec, folder) == [
        *("apptainer", "exec", "--nv", "--bind", "/scratch/j1", "--pwd", "/scratch/j1", "md.sif", "md", "-n", "2")
    ]
    podman = command(site("podman"), spec, folder)
    assert podman[:3] == ["podman", "run", "--rm"]
    assert podman[-4:] == ["md.sif", "md", "-n", "2"]
    with pytest.raises(BadRequest, match="site lab runs no containers"):
        command(site(None), spec, folder)


def test_an_unknown_kind_of_site_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(BadRequest, match="'moab'") as error:
        open_site(SiteConfig(name="old", kind="moab", work="/work"))
    assert "slurm" in error.value.hint
