"""The test cluster itself: it starts, stops and leaves nothing, as root or as anybody."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from infra.programs import NoServer
from infra.slurm.cluster import Cluster
from infra.slurm.daemons import process_fields, processes_marked
from infra.slurm.layout import Layout, Shape

NOBODY = 65534


def needs_slurm() -> None:
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("needs Slurm: apt-get install slurm-wlm munge")


def test_the_command_starts_tells_and_stops(tmp_path: Path) -> None:
    needs_slurm()

    def slurm(*arguments: str) -> tuple[int, str]:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "infra.slurm", *arguments, "--folder", tmp_path / "lab"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.returncode, ran.stdout + ran.stderr

    code, said = slurm("start", "--nodes", "2", "--gpus", "1")
    try:
        assert (code, "2 nodes with 1 GPUs each are idle" in said) == (0, True), said
        assert "runs already" in slurm("start")[1]
        code, said = slurm("status")
        assert (code, "slurmd-n2" in said, "gpu:a100:1" in said) == (0, True, True), said
        cluster = Cluster(tmp_path / "lab")
        job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600").strip()
        assert job in cluster.jobs()
        # One whose parent is gone is lost to Slurm, which knows processes by their parents here.
        cluster.run("sbatch", "--wait", "--output=/dev/null", "--wrap=setsid sleep 600 &")
        pids = [pid for pid in cluster.running().values() if pid]
        assert len(pids) == 4
    finally:
        assert slurm("stop")[0] == 0
    assert slurm("status")[0] == 1
    left = [fields for pid in pids if (fields := process_fields(pid))]
    assert [fields for fields in left if fields[0] != "Z"] == []  # whoever adopted them may take his time
    for node in ("n1", "n2"):
        assert not processes_marked({"SLURM_CONF": cluster.env["SLURM_CONF"], "SLURMD_NODENAME": node})
        assert not processes_marked({"HEADRACE_SLURM_NODE": f"{tmp_path / 'lab'}:{node}"})


def test_an_ordinary_user_has_a_whole_cluster(tmp_path: Path) -> None:
    needs_slurm()
    script = """if True:
        import os, sys
        from pathlib import Path
        from infra.slurm.cluster import Cluster
        from infra.slurm.daemons import until
        from infra.slurm.layout import Shape
        if os.getuid() == 0:
            os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
        cluster = Cluster(Path(sys.argv[1]), Shape(nodes=1, gpus=2))
        cluster.start()
        try:
            out = Path(sys.argv[1]) / "out"
            wrap = "--wrap=id -u; echo $CUDA_VISIBLE_DEVICES"
            cluster.run("sbatch", "--gpus=1", f"--output={out}", f"--chdir={sys.argv[1]}", wrap)
            until(lambda: out.exists() and len(out.read_text().split()) == 2, 30)
            print(out.read_text())
        finally:
            cluster.stop()
    """
    user = NOBODY if os.getuid() == 0 else os.getuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
        ran = subprocess.run(
            [sys.executable, "-P", "-c", script, f"{folder}/lab", str(user)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ran.stdout.split() == [str(user), "0"], ran.stderr


def test_a_missing_program_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.slurm.cluster.PROGRAMS", ("slurmctld", "no-such-program"))
    with pytest.raises(NoServer, match="no-such-program") as error:
        Cluster(tmp_path).start()
    assert "apt-get install slurm-wlm munge" in error.value.hint


def test_a_full_cluster_lets_jobs_wait(slurm: Cluster) -> None:
    assert len(slurm.fill()) == 3
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
    assert slurm.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING"


def test_a_cluster_without_gpus_has_no_devices(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert layout.gres_conf(Shape(gpus=0)) == ""
    assert "Gres=" not in layout.slurm_conf(Shape(gpus=0), 1, [2, 3, 4])
