"""``python -P -m tests.psij_suite``: PSI/J's own tests of executors, on ours: a real Slurm, PBS's commands, fakes.

The tests come from PSI/J's source package, as the index has it; what they import beside PSI/J, and which is not in that
package, stands in here: which executors there are to test, and how one of them is made.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psij
import pytest
from psij.executors.batch.batch_scheduler_executor import BatchSchedulerExecutorConfig

from infra.slurm.cluster import Cluster
from tests.fake_queue import Fake
from workers.sites.flux import FluxCommandExecutor
from workers.sites.local import MendedLocalExecutor
from workers.sites.lsf import MendedLSFExecutor
from workers.sites.pbs import MendedClassicExecutor, MendedPBSExecutor
from workers.sites.slurm import MendedSlurmExecutor

VERSION = "psij-python==0.9.11"
FILES = ("test_executor.py", "test_callbacks.py", "test_job_spec.py", "test_resources.py", "test_issue_435.py")
EXECUTORS: dict[str, Callable[..., psij.JobExecutor]] = {
    "slurm": MendedSlurmExecutor,
    "pbs": MendedPBSExecutor,
    "pbs_classic": MendedClassicExecutor,
    "lsf": MendedLSFExecutor,
    "flux": FluxCommandExecutor,
}
PAIRS = (
    *(f"{name}:{launcher}" for name in ("local", *EXECUTORS) for launcher in ("single", "multiple")),
    "slurm:srun",
    "flux:flux",
)
# It counts the names of machines, and all nodes of a cluster on loopback are one machine.
LEFT_OUT = "not (test_nodes and srun)"
POLL_S = 0.2
WAIT = timedelta(seconds=60)
SUITE = "HEADRACE_PSIJ_SUITE"


class ExecutorTestParams:
    """An executor and a launcher to test it with."""

    def __init__(self, spec: str) -> None:
        self.executor, self.launcher = spec.split(":")
        self.url = None

    def __str__(self) -> str:
        return f"{self.executor}:{self.launcher}"


def _make_test_dir() -> None:
    (Path.home() / ".psij" / "test").mkdir(parents=True, exist_ok=True)


def _get_timeout(params: ExecutorTestParams) -> timedelta:
    return WAIT


def _get_executor_instance(params: ExecutorTestParams, job: psij.Job | None = None) -> psij.JobExecutor:
    if job is not None and job.spec is not None:
        job.spec.launcher = params.launcher
    if params.executor == "local":
        return MendedLocalExecutor()
    config = BatchSchedulerExecutorConfig()
    config.queue_polling_interval = config.initial_queue_polling_delay = POLL_S  # type: ignore[assignment]
    return EXECUTORS[params.executor](config=config)


def assert_completed(job: psij.Job, status: psij.JobStatus | None, attached: bool = False) -> None:
    """Fail, with what the job said, unless it completed."""
    assert status is not None, "it did not end in time"
    assert status.state == psij.JobState.COMPLETED, (status.exit_code, status.message)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes an executor with each of ours."""
    if "execparams" in metafunc.fixturenames:
        metafunc.parametrize("execparams", [ExecutorTestParams(pair) for pair in PAIRS], ids=str)


def _stand_in() -> None:
    for name in ("executor_test_params", "_test_tools"):
        sys.modules[name] = sys.modules[__name__]


if SUITE in os.environ:  # loaded by pytest as a plug-in, before it loads the tests
    _stand_in()


def main() -> int:
    """Fetch the tests, start a Slurm and run them; the exit code is pytest's."""
    with tempfile.TemporaryDirectory(prefix="headrace-psij-") as folder:
        fetch = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*fetch, "--no-binary", ":all:", "--dest", folder, VERSION], check=True)
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        tests = next(Path(folder).glob("psij*/tests"))
        cluster = Cluster(Path(folder) / "slurm")
        cluster.start(tied=True)
        try:
            files = [str(tests / name) for name in FILES]
            command = [
                sys.executable,
                "-P",
                "-m",
                "pytest",
                "-q",
                "-p",
                "tests.psij_suite",
                "-c",
                os.devnull,
                "-k",
                LEFT_OUT,
            ]
            fakes = [Fake(Path(folder) / kind).install(kind)["PATH"].partition(":")[0] for kind in ("lsf", "flux")]
            env = {**os.environ, **cluster.env, SUITE: "1", "HOME": folder, "PYTHONPATH": str(Path.cwd())}
            env["PATH"] = ":".join([*fakes, env["PATH"]])
            ran = subprocess.run([*command, "--rootdir", str(tests), *files, *sys.argv[1:]], env=env, check=False)
        finally:
            cluster.stop()
        return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
