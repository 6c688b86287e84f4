"""The file of a site: what is good in it is taken, and what is wrong is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.settings import BadSetting, Settings
from infra.site import read_site, site_of

GOOD = 'kind = "slurm"\nwork = "/scratch/headrace"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "lab.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_with_its_durations_and_tables(tmp_path: Path) -> None:
    text = GOOD + 'name = "lab"\nsettle_s = "20s"\ncommand_s = 5\nduration_s = "2h"\n[environment]\nPATH = "/opt/bin"\n'
    site = read_site(written(tmp_path, text))
    assert (site.name, site.kind, site.settle_s, site.command_s, site.duration_s) == ("lab", "slurm", 20.0, 5.0, 7200.0)
    assert site.environment == {"PATH": "/opt/bin"}


def test_the_name_may_stand_in_the_command_alone(tmp_path: Path) -> None:
    assert read_site(written(tmp_path, GOOD), "lab").name == "lab"


def test_without_a_file_the_site_is_this_machine(tmp_path: Path) -> None:
    site = site_of(Settings(data_dir=tmp_path))
    assert (site.name, site.kind, site.work) == ("local", "local", str(tmp_path / "jobs"))
    assert site.job_environment["PATH"].startswith(str(Path(sys.executable).parent))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind = ", "not TOML"),
        ('kind = "slurm"\n', "work is missing"),
        (GOOD + "colour = 3\n", "colour"),
        ('kind = "cloud"\nwork = "/w"\n', "cloud"),
        ('kind = "slurm"\nwork = "here"\n', "not absolute"),
        (GOOD + 'name = "other"\n', "describes site other"),
        (GOOD + 'name = "a b"\n', "not a valid site"),
        (GOOD + "jobs_max = 0\n", "jobs_max"),
        (GOOD + "settle_s = -1\n", "settle_s"),
        (GOOD + 'settle_s = "soon"\n', "settle_s"),
        (GOOD + "environment = 3\n", "environment"),
        (GOOD + 'launcher = "rocket"\n', "rocket"),
        (GOOD + 'queue = "gpu\\n#SBATCH --array=0-3"\n', "queue holds a control character"),
        (GOOD + 'account = ""\n', "account is empty"),
        (GOOD + '[environment]\n"-u" = "x"\n', "environment: '-u' is not the name of a variable"),
        (GOOD + '[job_environment]\n"A=B" = "x"\n', "job_environment: 'A=B' is not the name of a variable"),
        (GOOD + "unseen_s = inf\n", "unseen_s is inf"),
        (GOOD + "settle_s = nan\n", "settle_s is nan"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadSetting, match=said):
        read_site(written(tmp_path, text), "lab")


@pytest.mark.parametrize(
    "work", ["/scratch/$USER/hr", "/scratch/a b", "/scratch/it's", "/x;y", "/a:b", "/50%j", "/~me/x"]
)
def test_a_folder_that_a_script_would_read_as_another_is_refused(tmp_path: Path, work: str) -> None:
    with pytest.raises(BadSetting, match="another folder") as caught:
        read_site(written(tmp_path, f'kind = "slurm"\nwork = "{work}"\n'), "lab")
    assert caught.value.hint is not None
    assert "Write it out" in caught.value.hint


@pytest.mark.parametrize("work", ["~/hr", "$SCRATCH/hr"])
def test_a_folder_that_begins_with_a_variable_is_not_absolute(tmp_path: Path, work: str) -> None:
    with pytest.raises(BadSetting, match="not absolute"):
        read_site(written(tmp_path, f'kind = "slurm"\nwork = "{work}"\n'), "lab")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('duration_s = "1 day"', '"500ms", "60s"'),
        ("duration_s = true", '"15s"'),
        ('container = "docker"', "apptainer or podman"),
        ('jobs_max = "many"', "whole number"),
        ("queue = 3", "a queue or partition"),
        ("environment = 3", "[environment]"),
        ("job_environment = {PATH = 3}", "[job_environment]"),
    ],
)
def test_the_hint_is_about_the_field(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(BadSetting) as caught:
        read_site(written(tmp_path, f"{GOOD}{line}\n"), "lab")
    assert line.partition(" ")[0] in str(caught.value)
    assert said in (caught.value.hint or "")


def test_the_folders_of_jobs_are_kept_for_as_long_as_jobs_may_wait(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + 'keep_s = "1h"\n')
    with pytest.raises(BadSetting, match="keep_s is 3600 s"):
        site_of(Settings(data_dir=tmp_path, site="lab", site_config=path))
    assert site_of(Settings(data_dir=tmp_path, site="lab", site_config=path, work_age_max_s=3600.0)).keep_s == 3600.0


def test_a_wrong_file_ends_the_command_with_its_words(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "colour = 3\n")
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "infra", "agent", "--site", "lab", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 2
    assert "colour" in ran.stderr
    assert "Traceback" not in ran.stderr
