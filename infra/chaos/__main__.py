"""``python -P -m infra.chaos [--seed N] [--scale S] [F1 F5 ...]``: tries the faults and prints one table.

Exit codes: 0 the promise was kept and every bar held, 1 not so, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from headrace.errors import HeadraceError
from infra import telemetry
from infra.chaos import report
from infra.chaos.cases import CASES
from infra.chaos.lines import Result
from infra.chaos.report import Report
from infra.chaos.trial import Case, Trial

WIDTH = 160


async def one(case: Case, *, seed: int, scale: float, console: Console, folder: Path) -> Report:
    """Try one case in a folder of its own."""
    began = time.time()

    def told(result: Result | None = None, *, skipped: str = "", failed: str = "") -> Report:
        return Report(
            fault=case.name,
            title=case.title,
            seed=seed,
            scale=scale,
            began=report.stamp(began),
            took_s=time.time() - began,
            versions=report.versions(),
            settings=report.settings(),
            machine=report.where(),
            result=result,
            skipped=skipped,
            failed=failed,
        )

    reason = case.probe()
    if reason:
        console.print(f"{case.name} {case.title}: skipped: {reason}", markup=False)
        return told(skipped=reason)
    console.print(f"{case.name} {case.title}", markup=False)
    trial = Trial(folder, seed=seed, scale=scale, say=lambda text: console.print(f"   {text}", markup=False))
    try:
        return told(await case.run(trial))
    except (HeadraceError, OSError, AssertionError) as error:
        return told(failed=f"{type(error).__name__}: {error}")


async def _main(cases: list[Case], options: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    reports: list[Report] = []
    try:
        for case in cases:
            # Where it is asked for, what is left behind is kept for a look at it.
            with contextlib.ExitStack() as stack:
                if options.keep is not None:
                    folder = options.keep / f"{case.name}-{options.seed}-{int(time.time())}"
                    folder.mkdir(parents=True)
                else:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"headrace-{case.name}-")))
                reports.append(await one(case, seed=options.seed, scale=options.scale, console=console, folder=folder))
    finally:
        report.show(reports, console)
        if not options.no_report:
            report.write(reports)
    return 0 if all(r.good or r.skipped for r in reports) else 1


def main() -> None:
    """Try what was asked for."""
    known = {case.name: case for case in CASES}
    options = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"one or more of {', '.join(known)}; default: all")
    options.add_argument("--seed", type=int, default=1, help="where everything random comes from")
    options.add_argument("--scale", type=float, default=1.0, help="share of the full number of triggers and faults")
    options.add_argument("--keep", type=Path, help="folder in which logs and data are left for a look at them")
    options.add_argument("--no-report", action="store_true", help="leave infra/reports as it is")
    chosen = options.parse_args()
    unknown = [name for name in chosen.cases if name.upper() not in known]
    if unknown:
        options.error(f"{unknown[0]} is no case; there are {', '.join(known)}")
    telemetry.configure(level="error", role="chaos", terminal=True)
    try:
        code = asyncio.run(_main([known[name.upper()] for name in chosen.cases] or CASES, chosen))
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
