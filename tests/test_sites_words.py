"""What batch systems print, read: every state of Slurm, odd lines among plain ones, and how a job is judged from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from headrace.errors import BadRequest
from headrace.jobs import REASONS, JobSpec, Reason, Resources
from workers.sites import open_site
from workers.sites.base import JobStatus, Known, SiteConfig
from workers.sites.batch import judge, may_end
from workers.sites.executors import command
from workers.sites.flux import parse_jobs as parse_flux
from workers.sites.lsf import parse_queue as parse_lsf
from workers.sites.pbs import PBS_PRO, TORQUE, job_status, parse_jobs
from workers.sites.records import Claim, Ended, Records
from workers.sites.slurm import (
    STATES,
    Slurm,
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


# ---------------------------------------------------------------- PBS, LSF and Flux

# As PBS Professional's manual has it: long values go on after a tab, and what follows is no part of them.
PBS_JOBS = """\
Job Id: 12.pbs01
    Job_Name = hr-long
    resources_used.walltime = 00:10:04
    job_state = F
    exec_host = n1/0*4+n2/0*4
    Resource_List.walltime = 00:10:00
    run_count = 1
    substate = 93
    comment = Job run at Sat Nov 21 at 18:00 on (n1:ncpus=4)+(n2:ncpus=4) and ex
\tceeded resource walltime
    Exit_status = -29

Job Id: 13[2].pbs01
    job_state = R
    run_count = 2
    Variable_List = PBS_O_HOME=/home/u,WORD="a = b"
\t,Exit_status = 7

qstat: odd line
Job Id: 14.pbs01
    job_state = Q
    comment = Not Running: Insufficient amount of resource: ngpus
"""


def test_jobs_of_pbs_are_read_from_its_plain_format() -> None:
    told = {native_id: job_status(native_id, job, PBS_PRO) for native_id, job in parse_jobs(PBS_JOBS).items()}
    assert {native_id: (job.state, job.reason, job.exit_code) for native_id, job in told.items()} == {
        "12.pbs01": ("failed", "walltime", None),
        "13[2].pbs01": ("active", "", None),
        "14.pbs01": ("queued", "", None),
    }
    assert told["12.pbs01"].detail.endswith("and exceeded resource walltime")
    assert (told["12.pbs01"].nodes, told["13[2].pbs01"].restarts) == ("n1,n2", 1)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("Exit_status = 0|substate = 92", ("completed", "", 0)),
        ("Exit_status = 3|substate = 93", ("failed", "exit_code", 3)),
        ("Exit_status = 137|substate = 93", ("failed", "signal", 137)),
        ("Exit_status = 265|substate = 93", ("failed", "signal", 137)),
        ("Exit_status = 271|substate = 91", ("canceled", "canceled", None)),
        ("substate = 91", ("canceled", "canceled", None)),
        ("substate = 93", ("failed", "launch", None)),
        ("Exit_status = -1|substate = 93", ("failed", "launch", None)),
        ("Exit_status = -20|substate = 93", ("failed", "node_failure", None)),
        ("Exit_status = -27|substate = 93", ("failed", "out_of_memory", None)),
        ("Exit_status = -29|substate = 93", ("failed", "walltime", None)),
        # Older ones end a job for a limit as anybody would, and only the numbers tell.
        (
            "Exit_status = 271|substate = 91|resources_used.walltime = 01:00:03|Resource_List.walltime = 01:00:00",
            ("failed", "walltime", None),
        ),
        (
            "Exit_status = 265|substate = 93|resources_used.mem = 1050624kb|Resource_List.mem = 1gb",
            ("failed", "out_of_memory", None),
        ),
    ],
)
def test_ends_of_jobs_of_pbs_professional(lines: str, expected: tuple[str, str, int | None]) -> None:
    assert pbs_end("F", lines, PBS_PRO) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("exit_status = 0", ("completed", "", 0)),
        ("exit_status = 271", ("canceled", "canceled", None)),
        ("exit_status = 267", ("failed", "signal", 139)),
        ("exit_status = -10", ("failed", "out_of_memory", None)),
        ("exit_status = -11", ("failed", "walltime", None)),
        ("exit_status = -4", ("failed", "node_failure", None)),
        (
            "exit_status = 271|resources_used.walltime = 00:01:02|Resource_List.walltime = 00:01:00",
            ("failed", "walltime", None),
        ),
    ],
)
def test_ends_of_jobs_of_torque(lines: str, expected: tuple[str, str, int | None]) -> None:
    assert pbs_end("C", lines, TORQUE) == expected


def pbs_end(state: str, lines: str, reasons: Mapping[int, Reason]) -> tuple[str, str, int | None]:
    text = "\n".join(["Job Id: 1", f"    job_state = {state}", *(f"    {line}" for line in lines.split("|"))])
    told = job_status("1", parse_jobs(text)["1"], reasons)
    return told.state, told.reason, told.exit_code


LSF_QUEUE = """\
7|0|PEND|-|-|hr-a|-|Job dependency condition not satisfied;
8|0|PSUSP|-|-|hr-a|-|The job was suspended by the user while pending;
9|3|RUN|-|4*node1:4*node2|hr-a[3]|-|-
10|0|DONE|-|node1|hr-a|-|-
11|0|EXIT|3|node1|hr-a|-|-
12|0|EXIT|137|node1|hr-a|-|-
13|0|EXIT|140|node1|hr-a|TERM_RUNLIMIT: job killed after reaching LSF run time limit|-
14|0|EXIT|137|node1|hr-a|TERM_MEMLIMIT: job killed after reaching LSF memory usage limit|-
15|0|EXIT|130|node1|hr-a|TERM_OWNER: job killed by owner|-
16|0|EXIT|143|node1|hr-a|TERM_ZOMBIE: job exited while LSF is not available|-
17|0|EXIT|130|node1|hr-a|TERM_PREEMPT: job killed after preemption|-
18|0|UNKWN|-|node1|hr-a|-|-
19|0|EXIT|137|node1|hr-a|TERM_EXTERNAL_SIGNAL: job killed by a signal external to LSF|-
20|0|NEWER|-|node1|hr-a|-|-
Cannot connect to LSF. Please wait ...
"""


def test_jobs_of_lsf_are_told_apart() -> None:
    told = parse_lsf(LSF_QUEUE)
    assert {native_id: (job.state, job.reason, job.exit_code) for native_id, job in told.items()} == {
        "7": ("queued", "", None),
        "8": ("held", "", None),
        "9[3]": ("active", "", None),
        "10": ("completed", "", 0),
        "11": ("failed", "exit_code", 3),
        "12": ("failed", "signal", 137),
        "13": ("failed", "walltime", None),
        "14": ("failed", "out_of_memory", None),
        "15": ("canceled", "canceled", None),
        "16": ("failed", "node_failure", None),
        "17": ("failed", "preempted", None),
        "18": ("active", "", None),
        "19": ("failed", "signal", 137),
        "20": ("active", "", None),
    }
    assert told["9[3]"].nodes == "node1,node2"
    assert "run time limit" in told["13"].detail


FLUX_JOBS = """\
1|SCHED|16||0.0|0.0||||hr-a|
2|SCHED|0||0.0|0.0||||hr-a|
3|RUN|16||1795275184.5|0.0|n[1-2]|||hr-a|
4|COMPLETED|16|0|1795275184.5|1795275190.5|n1|||hr-a|
5|FAILED|16|3|1795275184.5|1795275190.5|n1|||hr-a|
6|FAILED|16|137|1795275184.5|1795275190.5|n1|||hr-a|
7|FAILED|16|-9|1795275184.5|1795275190.5|n1|||hr-a|
8|CANCELED|16|143|1795275184.5|1795275190.5|n1|cancel|0|hr-a|
9|CANCELED|16|-128|0.0|1795275190.5||cancel|0|hr-a|
10|TIMEOUT|16|142|1795275184.5|1795275190.5|n1|timeout|0|hr-a|resource allocation expired
11|FAILED|16|143|1795275184.5|1795275190.5|n1|node-failure|2|hr-a|lost contact with job shell on n1 (rank 3)
12|FAILED|16|143|1795275184.5|1795275190.5|n1|exec|0|hr-a|lost contact with job shell on n1 (rank 3) | again
13|FAILED|16|127|0.0|1795275190.5|n1|exec|0|hr-a|task 0: start failed
14|NEWER|16||0.0|0.0||||hr-a|
flux-jobs: ERROR: JobID 15 unknown
"""


def test_jobs_of_flux_are_told_apart() -> None:
    told = parse_flux(FLUX_JOBS)
    assert {native_id: (job.state, job.reason, job.exit_code) for native_id, job in told.items()} == {
        "1": ("queued", "", None),
        "2": ("held", "", None),
        "3": ("active", "", None),
        "4": ("completed", "", 0),
        "5": ("failed", "exit_code", 3),
        "6": ("failed", "signal", 137),
        "7": ("failed", "signal", 137),
        "8": ("canceled", "canceled", None),
        "9": ("canceled", "canceled", None),
        "10": ("failed", "walltime", None),
        "11": ("failed", "node_failure", None),
        "12": ("failed", "node_failure", None),
        "13": ("failed", "launch", None),
        "14": ("active", "", None),
    }
    assert (told["4"].started_at, told["4"].ended_at, told["9"].started_at) == (1795275184.5, 1795275190.5, None)


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


def test_a_job_that_completed_is_not_said_to_be_running() -> None:
    assert judge("7", ACTIVE, CLAIM, ENDED, limit_s=60.0, missing_s=0.0, unseen_s=30.0).detail == ""


@pytest.mark.parametrize(("code", "reason"), [(128, "exit_code"), (137, "signal"), (192, "signal"), (193, "exit_code")])
def test_above_the_signals_there_are_exit_codes_again(code: int, reason: str) -> None:
    assert judged(None, ended=Ended("7", code, 110.0)) == ("failed", reason, code)
    told = parse_queue(f"1 |1 |FAILED |{code << 8} |0 |1795275184 |1795275185 |n1 |NonZeroExitCode |hr-a")
    assert (told["1"].reason, told["1"].exit_code) == (reason, code)
    assert parse_accounts(f"8|FAILED|{code}:0|1795275184|1795275185|n1\n")["8"].reason == reason
    assert pbs_end("F", f"Exit_status = {code}|substate = 93", PBS_PRO) == ("failed", reason, code)
    assert parse_lsf(f"12|0|EXIT|{code}|node1|hr-a|-|-")["12"].reason == reason
    assert parse_flux(f"6|FAILED|16|{code}|1795275184.5|1795275190.5|n1|||hr-a|")["6"].reason == reason


@pytest.mark.parametrize(
    "lines",
    ["a b c", "7 yesterday n1", "7 nan n1", "7 -1 n1", "7;x 1 n1", "\0\0 \0 \0", "7 1.0 n1 more", "\xff \xff 1"],
)
def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, lines: str) -> None:
    records = Records(tmp_path)
    records.make()
    for name in ("claim", "ended", "killed"):
        (records.path / name).write_text(f"{lines}\n", encoding="latin-1")
    assert records.claim() is None
    assert records.ended() is None
    assert records.killed() is None


@pytest.mark.parametrize(
    ("name", "noted", "cancels"),
    [
        ("hr-a-1", "", True),
        ("hr-a-2", "", False),
        ("wrap", "", False),
        ("hr-array", "hr-array", True),
        ("hr-other", "hr-array", False),
        ("", "", True),
    ],
)
def test_a_job_is_canceled_under_its_own_name_only(tmp_path: Path, name: str, noted: str, cancels: bool) -> None:
    job = Known(job_id="a-1", native_id="7", folder=tmp_path)
    if noted:
        Records(tmp_path).make()
        Records(tmp_path).note_native_id("7", noted)
    assert may_end(job, JobStatus(native_id="7", state="active", name=name)) is cancels
    assert may_end(job, None)


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


@pytest.mark.parametrize("odd", ["pipe", "without end"])
def test_why_a_job_of_slurm_failed_is_not_read_from_what_is_no_file(tmp_path: Path, odd: str) -> None:
    job = Known(job_id="a-1", native_id="7", folder=tmp_path)
    records = Records(tmp_path)
    records.make()
    for lies_there in (records.stderr, records.path / "7.err"):
        if odd == "pipe":
            os.mkfifo(lies_there)
        else:
            lies_there.symlink_to("/dev/zero")
    failed = JobStatus(native_id="7", state="failed", reason="exit_code", exit_code=1)
    assert Slurm(site(None)).explain(job, failed) == failed
    records.stderr.unlink()
    records.stderr.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
    assert Slurm(site(None)).explain(job, failed).reason == "out_of_memory"
