"""Work in an allocation that ends: what fits is begun, the rest is left to others, and its end is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from functions.pilot import SPARE_S, fits
from headrace.errors import BadRequest
from infra.allocation import NoAllocation, ends_at
from infra.slurm.cluster import Cluster
from infra.slurm.daemons import until
from streams.link import Link
from streams.log import Log
from tests.test_worker import working

TWO = """
    def quick(x):
        return "quick"

    def lengthy(x):
        return "lengthy"
"""


@pytest.mark.parametrize(
    ("left_s", "run", "limit_s", "fit"),
    [
        (100.0, (10.0, 90.0), 600.0, True),
        (100.0, (10.0, 96.0), 600.0, False),  # p50 would do, p90 does not
        (100.0, None, 90.0, True),
        (100.0, None, 96.0, False),
        (100.0, (10.0, 500.0), 90.0, True),  # it is stopped at its limit, whatever is expected
        (SPARE_S - 1, (0.0, 0.0), 60.0, False),
    ],
)
def test_work_fits_that_is_over_before_the_allocation(
    left_s: float, run: tuple[float, float] | None, limit_s: float, *, fit: bool
) -> None:
    assert fits(1000.0, 1000.0 + left_s, run, limit_s) is fit


async def test_a_pilot_begins_what_fits_and_leaves_the_rest_to_others(log: Log, link: Link, tmp_path: Path) -> None:
    async with working(log, link, tmp_path / "pilot", ends_at=time.time() + 300) as pilot:
        await pilot.deploy(TWO, quick={"timeout": "20s"}, lengthy={"timeout": "1h"})
        lengthy = await pilot.trigger("lengthy", 1)
        quick = [await pilot.trigger("quick", number) for number in range(3)]
        assert [await pilot.answer(run) for run in quick] == ["quick"] * 3
        record, invocations = await pilot.state(lengthy)
        assert not record.ended
        assert [each.attempts for each in invocations] == [0]  # not begun, and not failed
        async with working(log, link, tmp_path / "pilot") as other:
            assert await other.answer(lengthy) == "lengthy"


def test_the_end_is_what_somebody_says() -> None:
    assert ends_at("55m", {}, 1000.0) == 1000.0 + 55 * 60
    assert ends_at("2026-11-21T18:00:00Z", {}, 0.0) == pytest.approx(1795284000.0)
    with pytest.raises(NoAllocation, match="ended 60 s ago"):
        ends_at("2026-11-21T18:00:00Z", {}, 1795284060.0)
    with pytest.raises(BadRequest):
        ends_at("soon", {}, 0.0)


def test_outside_of_slurm_it_has_to_be_said() -> None:
    with pytest.raises(NoAllocation, match="SLURM_JOB_ID is not set") as error:
        ends_at(None, {}, 0.0)
    assert "--until" in error.value.hint


def test_slurm_is_asked_for_the_end_of_its_own_job(slurm: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    told = "import os, time; from infra.allocation import ends_at; print(ends_at(None, os.environ, time.time()))"
    script.write_text(f"#!/bin/bash\nexec {sys.executable} -c '{told}'\n")
    env = {**os.environ, **slurm.env, "PYTHONPATH": str(Path(__file__).parent.parent)}
    submitted_at = time.time()
    out = tmp_path / "out"
    subprocess.run(["sbatch", "--time=10", f"--output={out}", str(script)], env=env, check=True, capture_output=True)
    assert until(lambda: out.exists() and out.read_text().endswith("\n"), 60.0)
    assert 590.0 < float(out.read_text()) - submitted_at < 660.0 + (time.time() - submitted_at)
