"""Twice the load on a real platform: what is due soon is in time with lanes, and is not without."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.bench import live


@pytest.mark.alone
async def test_under_twice_the_load_what_is_due_soon_is_answered_in_time_and_without_lanes_it_is_not(
    tmp_path: Path,
) -> None:
    plan = live.Plan(slots=2, triggers=20, span_s=6.0)
    with_lanes = await live.measured(tmp_path / "lanes", plan, lanes=True)
    without = await live.measured(tmp_path / "fifo", plan, lanes=False)
    assert with_lanes.met >= 18
    assert without.met <= with_lanes.met - 5
    assert with_lanes.background_done < with_lanes.background_sent  # there was more than could be done
    assert "20" in live.markdown(live.Report(2, plan, live.DEADLINE_S, live.WORK_S, with_lanes, without))
