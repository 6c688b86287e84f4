"""``python -P -m tests.simulation --seed N --trace`` repeats one seed; ``--seeds N --from M`` runs many."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.simulation.many import run_many
from tests.simulation.world import Options, simulate


def main() -> int:
    """Run what is asked for; 1 where something is wrong."""
    asked = argparse.ArgumentParser(prog="python -P -m tests.simulation")
    asked.add_argument("--seed", type=int, help="repeat this one")
    asked.add_argument("--trace", action="store_true", help="print what happens in it")
    asked.add_argument("--seeds", type=int, default=2000, help="how many to run")
    asked.add_argument("--from", type=int, default=0, dest="first", help="the first of them")
    asked.add_argument("--processes", type=int, default=2)
    given = asked.parse_args()
    if given.seed is not None:
        logging.disable(logging.CRITICAL)
        verdict = simulate(given.seed, Options(trace=given.trace))
        print(*verdict.trace, sep="\n")
        print("faults:", *verdict.plan, sep="\n  ")
        print(
            f"{verdict.messages} messages, {verdict.virtual_s:.1f} virtual s, {verdict.steps} steps, {verdict.digest}"
        )
        print(*(verdict.wrong or ["all is well"]), sep="\n")
        return bool(verdict.wrong)
    began = time.monotonic()
    found = run_many(range(given.first, given.first + given.seeds), given.processes)
    for seed, wrong in found.failed.items():
        print(f"seed {seed}:", *wrong[:5], sep="\n  ")
        print(f"  repeat it: python -P -m tests.simulation --seed {seed} --trace")
    took_s = time.monotonic() - began
    print(
        f"{given.seeds} seeds, {len(found.failed)} of them with something wrong, {found.messages:,} messages, "
        f"{found.virtual_s / 3600:,.1f} virtual hours in {took_s:.1f} s"
    )
    return bool(found.failed)


if __name__ == "__main__":
    sys.exit(main())
