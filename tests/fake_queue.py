"""Fakes of LSF's and Flux's commands: scripts run as processes of this machine, and the words are the real ones'.

Neither is to be had without a licence or a broker. What they print stands as their manuals have it, so a test against
them shows that our side reads, waits and looks up as it should, and not that the manuals are right. One folder is one
batch system; ``held`` in it lets jobs wait, ``away`` lets every command fail, and ``fault`` (``MODE COUNT``) the next
submissions: ``before`` and ``after`` say that nobody answered, and submit nothing or all the same.

Run as ``fake_queue.py COMMAND ...``; it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COMMANDS = {"lsf": ("bsub", "bjobs", "bkill"), "flux": ("flux",)}
MINUTE_S = 2.0  # LSF's limits are minutes; a test has seconds
LATE_S = 1.0
LOOK_S = 0.02
QUEUES = ("", "normal", "gpu")


class Fake:
    """One batch system in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, kind: str) -> dict[str, str]:
        """Write the commands of ``kind``, and return what a client needs in its environment."""
        programs = self.folder / "bin"
        programs.mkdir(parents=True)
        (self.folder / "jobs").mkdir()
        for command in COMMANDS[kind]:
            script = programs / command
            called = [sys.executable, "-I", __file__, str(self.folder), command]
            script.write_text(f'#!/bin/sh\nexec {shlex.join(called)} "$@"\n')
            script.chmod(0o755)
        return {"PATH": f"{programs}:{os.environ['PATH']}"}

    # ------------------------------------------------------------ what a test does to it

    def hold(self) -> None:
        """Let jobs wait."""
        (self.folder / "held").touch()

    def release(self) -> None:
        """Let them begin."""
        (self.folder / "held").unlink()

    def stop(self) -> None:
        """Let no command reach it; jobs run on."""
        (self.folder / "away").touch()

    def start(self) -> None:
        """Let it answer again."""
        (self.folder / "away").unlink()

    def fail(self, mode: str) -> None:
        """Let the next submission fail."""
        (self.folder / "fault").write_text(mode)

    def forget(self) -> None:
        """Let it know no ended job any more."""
        for job in self.jobs():
            if "ended" in job:
                (self.folder / "jobs" / job["id"]).rename(self.folder / f"forgotten-{job['id']}")

    def named(self, name: str) -> int:
        """Return how many jobs of this name there ever were."""
        told = [*self.folder.glob("jobs/*/job.json"), *self.folder.glob("forgotten-*/job.json")]
        return sum(json.loads(path.read_text())["name"] == name for path in told)

    # ------------------------------------------------------------ inside

    def jobs(self) -> list[dict[str, Any]]:
        """Return all jobs, the first submitted first."""
        found = []
        for folder in (self.folder / "jobs").iterdir():
            job: dict[str, Any] = {}
            for part in ("job", "begun", "ended"):
                with contextlib.suppress(FileNotFoundError):
                    told = json.loads((folder / f"{part}.json").read_text())
                    job |= told if part == "job" else {part: told}
            found.append(job)
        return sorted(found, key=lambda job: (job["number"], job["index"]))

    def submit(self, script: str, name: str, limit_s: float, memory: int | None, index: int, number: int) -> None:
        """Make one job and the process that runs it."""
        native_id = f"{number}[{index}]" if index else str(number)
        folder = self.folder / "jobs" / native_id
        aside = self.folder / f"new-{native_id}"
        aside.mkdir()
        (aside / "script").write_text(script)
        job = {"id": native_id, "number": number, "index": index, "name": name, "limit_s": limit_s, "memory": memory}
        (aside / "job.json").write_text(json.dumps(job))
        aside.rename(folder)
        subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.folder), "run", native_id],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def number(self) -> int:
        """Return a number that no job has yet."""
        for number in range(101, 100_000):
            with contextlib.suppress(FileExistsError):
                (self.folder / f"number-{number}").touch(exist_ok=False)
                return number
        raise AssertionError

    def run(self, native_id: str) -> None:
        """Run one job to its end."""
        folder = self.folder / "jobs" / native_id
        job = json.loads((folder / "job.json").read_text())
        while (self.folder / "held").exists():
            if (folder / "cancel").exists():
                return note(folder / "ended.json", {"why": "cancel", "at": time.time()})
            time.sleep(LOOK_S)
        env = {**os.environ, "FAKE_FLUX_JOB": native_id}
        if (self.folder / "bin" / "bsub").exists():
            env |= {"LSB_JOBID": str(job["number"]), "LSB_JOBINDEX": str(job["index"])}
        note(folder / "begun.json", {"at": time.time()})
        process = subprocess.Popen(["bash", folder / "script"], env=env, start_new_session=True)
        give_up_at, why = time.monotonic() + job["limit_s"], ""
        while process.poll() is None:
            if (folder / "cancel").exists():
                why = "cancel"
            elif time.monotonic() > give_up_at:
                why = "timeout"
            elif job["memory"] and resident(process.pid) > job["memory"]:
                why = "memory"
            if why:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(LOOK_S)
        note(folder / "ended.json", {"why": why, "status": process.returncode, "at": time.time()})
        return None

    def submitting(self, said: str) -> Iterator[None]:
        """Submit, or fail as a test wants it."""
        fault, mode = self.folder / "fault", ""
        with contextlib.suppress(FileNotFoundError):
            mode = fault.read_text()
            fault.unlink()
        if mode == "late" and os.fork() == 0:
            for stream in (1, 2):  # else who submits would wait for them to be closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os.closerange(3, 256)  # nor may it hold what its caller held
            time.sleep(LATE_S)
            yield
            os._exit(0)
        if mode in ("", "after"):
            yield
        if mode:
            sys.exit(said)


def note(path: Path, told: dict[str, Any]) -> None:
    """Write a record at once."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(told))
    aside.rename(path)


def resident(group: int) -> int:
    """Return how many bytes the processes of a group hold."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            fields = stat.read_text().rpartition(") ")[2].split()
            if int(fields[3]) == group or int(fields[2]) == group:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")


def directives(script: str, sentinel: str) -> dict[str, str]:
    """Return the options that a script gives in its own lines."""
    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith(sentinel):
            words = shlex.split(line.removeprefix(sentinel))
            while words:
                name, joined, value = words.pop(0).partition("=")
                if not joined and words and not words[0].startswith("-"):
                    value = words.pop(0)
                found[name] = value
    return found


# ---------------------------------------------------------------- LSF


def bsub(fake: Fake, arguments: list[str]) -> None:
    """Take a script from the input."""
    script = sys.stdin.read()
    options = directives(script, "#BSUB ")
    queue = options.get("-q", "")
    if queue not in QUEUES:
        print(f"{queue}: No such queue. Job not submitted.", file=sys.stderr)
        sys.exit(255)
    name, _, numbers = options["-J"].partition("[")
    first, last = map(int, numbers.rstrip("]").split("-")) if numbers else (0, 0)
    memory = int(options["-M"].removesuffix("KB")) * 1024 if "-M" in options else None
    for _ in fake.submitting("Cannot connect to LSF. Please wait ...: batch daemon not responding"):
        number = fake.number()
        for index in range(first, last + 1):
            fake.submit(script, name, float(options["-W"]) * MINUTE_S, memory, index, number)
        print(f"Job <{number}> is submitted to default queue <normal>.")


def bjobs(fake: Fake, arguments: list[str]) -> None:
    """List jobs in the format that is asked for."""
    found = fake.jobs()
    if "-J" in arguments:
        found = [job for job in found if job["name"] == arguments[arguments.index("-J") + 1]]
    if not found:
        print("No job found", file=sys.stderr)
        sys.exit(255)
    fields = arguments[arguments.index("-o") + 1].split()
    delimiter = next((word.split("'")[1] for word in fields if word.startswith("delimiter=")), " ")
    reasons = {
        "cancel": "TERM_OWNER: job killed by owner",
        "timeout": "TERM_RUNLIMIT: job killed after reaching LSF run time limit",
        "memory": "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit",
    }
    for job in found:
        ended = job.get("ended")
        code = exit_code(ended) if ended else 0
        stat = ("DONE" if code == 0 else "EXIT") if ended else "RUN" if "begun" in job else "PEND"
        told = {
            "jobid": job["number"],
            "jobindex": job["index"],
            "stat": stat,
            "exit_code": code or "-",
            "exec_host": "node1" if "begun" in job else "-",
            "job_name": f"{job['name']}[{job['index']}]" if job["index"] else job["name"],
            "exit_reason": reasons.get(ended["why"], "-") if ended else "-",
            "pend_reason": "New job is waiting for scheduling;" if stat == "PEND" else "-",
        }
        print(delimiter.join(str(told[field]) for field in fields if field in told))


def exit_code(ended: dict[str, Any]) -> int:
    """Return the exit code of a job's script as a shell has it; of one that never ran, a signal's."""
    status = int(ended.get("status", -signal.SIGINT))
    return status if status >= 0 else 128 - status


def bkill(fake: Fake, arguments: list[str]) -> None:
    """End jobs."""
    for native_id in arguments:
        folder = fake.folder / "jobs" / native_id
        if not folder.exists():
            sys.exit(f"Job <{native_id}>: No matching job found")
        if (folder / "ended.json").exists():
            sys.exit(f"Job <{native_id}>: Job has already finished")
        (folder / "cancel").touch()
        print(f"Job <{native_id}> is being terminated")


# ---------------------------------------------------------------- Flux


def flux(fake: Fake, arguments: list[str]) -> None:
    """Do what one of Flux's commands does."""
    match arguments:
        case ["batch", path]:
            flux_batch(fake, Path(path).read_text())
        case ["jobs", *options]:
            flux_jobs(fake, options)
        case ["cancel", *native_ids]:
            for native_id in native_ids:
                if (fake.folder / "jobs" / native_id / "ended.json").exists():
                    sys.exit(f"flux-cancel: ERROR: {native_id}: job is inactive")
                (fake.folder / "jobs" / native_id / "cancel").touch()
        case ["job", "id", "--to=dec", native_id]:
            fault = fake.folder / "fault-id"
            if fault.exists():
                fault.unlink()
                sys.exit("flux-job: ERROR: error parsing jobid")
            print(native_id.removeprefix("f"))
        case ["getattr", "jobid"]:
            print("f" + os.environ["FAKE_FLUX_JOB"])
        case ["run", *options]:
            flux_run(options)
        case _:
            sys.exit(f"flux: '{' '.join(arguments)}' is not a flux command")


def flux_batch(fake: Fake, script: str) -> None:
    """Take a script."""
    options = directives(script, "#flux: ")
    queue = options.get("--queue", "")
    if queue not in QUEUES:
        sys.exit(f"flux-batch: ERROR: [Errno 22] Invalid queue '{queue}' specified")
    for _ in fake.submitting("flux-batch: ERROR: [Errno 110] Connection timed out"):
        number = fake.number()
        fake.submit(script, options["--job-name"], float(options["--time-limit"].removesuffix("s")), None, 0, number)
        print(f"f{number}")


def flux_jobs(fake: Fake, options: list[str]) -> None:
    """List jobs in the format that is asked for."""
    form = options[options.index("--format") + 1]
    found = {job["id"]: job for job in fake.jobs()}
    wanted = [word for word in options if word.isdigit()]
    name = next((word.partition("=")[2] for word in options if word.startswith("--name=")), None)
    missing = [native_id for native_id in wanted if native_id not in found]
    for native_id in wanted or found:
        if (job := found.get(native_id)) is None or (name is not None and job["name"] != name):
            continue
        line = form
        for field, text in flux_told(job).items():
            line = line.replace(f"{{{field}}}", text)
        print(line)
    for native_id in missing:
        print(f"flux-jobs: ERROR: JobID {native_id} unknown", file=sys.stderr)
    if missing:
        sys.exit(1)


def flux_told(job: dict[str, Any]) -> dict[str, str]:
    """Return the fields of one job."""
    begun, ended = job.get("begun"), job.get("ended")
    status, kind, note_, code = "RUN" if begun else "SCHED", "", "", ""
    if ended:
        code = str(exit_code(ended) if begun else -128)
        status = "COMPLETED" if code == "0" else "FAILED"
        if ended["why"] == "cancel":
            status, kind = "CANCELED", "cancel"
        elif ended["why"] == "timeout":
            status, kind, note_ = "TIMEOUT", "timeout", "resource allocation expired"
    return {
        "id.dec": job["id"],
        "status": status,
        "urgency": "16",
        "returncode": code,
        "t_run": str(begun["at"]) if begun else "0.0",
        "t_cleanup": str(ended["at"]) if ended else "0.0",
        "nodelist": "node1" if begun else "",
        "exception.type": kind,
        "exception.severity": "0" if kind else "",
        "name": job["name"],
        "exception.note": note_,
    }


def flux_run(options: list[str]) -> None:
    """Start as many processes as are asked for, each with its number."""
    count = 1
    while options[0].startswith("--"):
        name, _, value = options.pop(0).partition("=")
        count = int(value) if name == "--ntasks" else count
    ran = [subprocess.Popen(options, env={**os.environ, "FLUX_TASK_RANK": str(rank)}) for rank in range(count)]
    sys.exit(max(exit_code({"status": process.wait()}) for process in ran))


def main() -> None:
    """Carry out one command."""
    fake, command, arguments = Fake(Path(sys.argv[1])), sys.argv[2], sys.argv[3:]
    if command == "run":
        fake.run(arguments[0])
        return
    inside = command == "flux" and arguments[0] in ("job", "getattr", "run")
    if (fake.folder / "away").exists() and not inside:
        if command == "flux":
            sys.exit("flux: ERROR: Unable to connect to Flux: ENOENT: No such file or directory")
        print("LSF is down. Please wait ...", file=sys.stderr)
        sys.exit(255)
    commands: dict[str, Callable[[Fake, list[str]], None]] = {
        "bsub": bsub,
        "bjobs": bjobs,
        "bkill": bkill,
        "flux": flux,
    }
    commands[command](fake, arguments)


if __name__ == "__main__":
    main()
