"""Replays the traces, prints the table and stores it as text and as JSON. The same input gives the same bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from infra.bench.deadlines import calibration, dags, makespans, report, traces

REPORTS = Path(__file__).parents[2] / "reports"


def main() -> None:
    """Measure, print, store."""
    options = argparse.ArgumentParser(prog="make bench-deadlines", description=__doc__)
    options.add_argument("--workflows", type=Path, help="folder of WfCommons instances (*.json); else twins of 16")
    options.add_argument("--into", type=Path, default=REPORTS, help="folder for deadlines.md and deadlines.json")
    chosen = options.parse_args()
    graphs, says = dags.read(chosen.workflows)
    replayed = [traces.inference(), traces.alerts(graphs), traces.pods(), traces.helios()]
    covered = {trace.name: calibration.of_trace(trace) for trace in replayed}
    covered["workflows, first run of each"] = calibration.of_dags(graphs)
    covered[report.ALL] = calibration.mean(list(covered.values()))
    covered["workflows, the same run of each again"] = calibration.of_dags(graphs, 2)
    made = report.Report(
        [f"{trace.name}: {trace.says}; {len(trace.jobs):,} pieces of work" for trace in replayed]
        + [f"workflows: {says}"],
        report.SLOTS,
        list(report.rows(replayed)),
        makespans.gains(graphs),
        covered,
    )
    text = report.markdown(made)
    chosen.into.mkdir(parents=True, exist_ok=True)
    (chosen.into / "deadlines.md").write_text(text)
    (chosen.into / "deadlines.json").write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    print(text)


if __name__ == "__main__":
    main()
