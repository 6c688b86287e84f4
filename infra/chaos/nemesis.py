"""Injects faults, the same ones for the same seed, and logs each: ``python -P -m infra.chaos.nemesis PLAN``.

It knows processes by their ids and nothing else of the platform. What it paused, it lets go on, also when it is ended
itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from infra.chaos.faces import pids_by_name
from infra.chaos.lines import Hit, LineLog, Plan, Step, read_plan

LOOK_STEP_S = 0.01
APPEAR_S = 20.0


def steps_of(plan: Plan) -> list[Step]:
    """Return all that is to be done: the steps, and then the random kills, at exponentially distributed gaps."""
    rng = random.Random(plan.seed)  # noqa: S311 - seeded faults, no secret
    names, weights = list(plan.weights), list(plan.weights.values())
    kills = [
        Step(after_s=rng.expovariate(1.0 / plan.gap_s), act="kill", who=rng.choices(names, weights)[0])
        for _ in range(plan.kills if names else 0)
    ]
    return [*plan.steps, *kills]


class Nemesis:
    """Does one step after the other."""

    def __init__(self, plan: Plan, log: LineLog) -> None:
        self._plan = plan
        self._log = log
        self._paused: set[int] = set()

    def run(self) -> None:
        """Do all steps; what is not there when its turn comes is waited for."""
        for step in steps_of(self._plan):
            time.sleep(step.after_s)
            self._do(step)

    def release(self) -> None:
        """Let everything that was paused go on."""
        for pid in list(self._paused):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self._paused.discard(pid)

    def _do(self, step: Step) -> None:
        give_up_at = time.monotonic() + APPEAR_S
        while time.monotonic() < give_up_at:
            pid = self._find(step.who)
            if pid:
                try:
                    os.kill(pid, signal.SIGKILL if step.act == "kill" else signal.SIGSTOP)
                except ProcessLookupError:
                    continue  # somebody was quicker: whoever takes its place is hit
                self._log.write(Hit(at=time.time(), act=step.act, who=step.who, pid=pid, hold_s=step.hold_s))
                if step.act == "pause":
                    self._paused.add(pid)
                    time.sleep(step.hold_s)
                    self.release()
                    self._log.write(Hit(at=time.time(), act="go on", who=step.who, pid=pid))
                return
            time.sleep(LOOK_STEP_S)
        self._log.write(Hit(at=time.time(), act=step.act, who=step.who))

    def _find(self, who: str) -> int:
        try:
            supervisor = int(Path(self._plan.pid_file).read_text())
        except (OSError, ValueError):
            return 0
        return pids_by_name(supervisor).get(who, 0)


def main() -> None:
    """Do what the plan says."""
    plan = read_plan(sys.argv[1], Plan)
    nemesis = Nemesis(plan, LineLog(plan.log))

    def end(number: int, frame: FrameType | None) -> None:
        nemesis.release()
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    nemesis.run()


if __name__ == "__main__":
    main()
