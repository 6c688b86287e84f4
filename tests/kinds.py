"""Batch systems of every kind to test against: a real Slurm, PBS's commands in front of it, and fakes of the rest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import pytest

from infra.slurm.cluster import Cluster
from tests.fake_queue import Fake
from workers.sites.base import SiteConfig

SETTLE_S = 2.5  # longer than a late submission takes
QUEUED_KINDS = ("slurm", "pbs", "pbs_classic", "lsf", "flux")
OVER_SLURM = ("slurm", "pbs", "pbs_classic")


class Kind(Protocol):
    """A batch system with a queue, and what a test does to it."""

    config: SiteConfig

    def hold(self) -> None:
        """Let jobs wait."""

    def release(self) -> None:
        """Let them begin."""

    def stop(self) -> None:
        """Let no command reach it; jobs run on."""

    def start(self) -> None:
        """Let it answer again."""

    def fail(self, mode: str) -> None:
        """Let the next submission time out ``before`` or ``after`` it was heard, or be heard ``late``."""

    def named(self, name: str) -> int:
        """Return how many jobs of this name there ever were."""
        ...


class OverSlurm:
    """A real Slurm, asked in one of the dialects in front of it."""

    def __init__(self, kind: str, cluster: Cluster, folder: Path) -> None:
        self.config = site_config(kind, folder, cluster.env)
        self._cluster = cluster

    def hold(self) -> None:
        """See ``Kind``, here and below."""
        self._cluster.set_partition("DOWN")

    def release(self) -> None:
        """See above."""
        self._cluster.set_partition("UP")

    def stop(self) -> None:
        """See above."""
        self._cluster.stop_controller()

    def start(self) -> None:
        """See above."""
        self._cluster.start_controller()

    def fail(self, mode: str) -> None:
        """See above."""
        self._cluster.fail_sbatch("after" if mode == "after" else "late" if mode == "late" else "before")

    def named(self, name: str) -> int:
        """See above."""
        return list(self._cluster.jobs().values()).count(name)


class Faked(Fake):
    """A fake of LSF or Flux."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__(folder / kind)
        self.config = site_config(kind, folder, self.install(kind))


def site_config(kind: str, folder: Path, environment: dict[str, str]) -> SiteConfig:
    """Return a site that concludes soon what it concludes from silence."""
    return SiteConfig(
        name="lab",
        kind=kind,
        work=str(folder / "work"),
        environment=environment,
        settle_s=SETTLE_S,
        unseen_s=2.0,
    )


def over_slurm(kind: str, cluster: Cluster, folder: Path) -> OverSlurm:
    """Return a real Slurm in one of its dialects; the test is skipped where that is not installed."""
    if kind != "slurm" and shutil.which("qsub") is None:
        pytest.skip("the commands of PBS are not installed: apt-get install slurm-wlm-torque")
    return OverSlurm(kind, cluster, folder)


def named_kind(request: pytest.FixtureRequest, name: str, folder: Path) -> Kind:
    """Return a batch system by the name of its kind."""
    if name in OVER_SLURM:
        return over_slurm(name, request.getfixturevalue("slurm"), folder)
    return Faked(name, folder)
