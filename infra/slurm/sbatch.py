"""An ``sbatch`` or ``qsub`` in front of the real one that fails when told to, as one of a controller under load does.

The fault is chosen by the content of a file, ``MODE COUNT``: the next COUNT calls fail so, later ones do not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Fault = Literal["before", "after", "late", "slow", "hang"]
LATE_S = 1.0
HANG_S = 600

# The count is taken under a lock, because several submit at once. What sbatch says on a time-out is Slurm's own text.
_SCRIPT = """#!/bin/bash
fault={fault}
exec 8>>"$fault.lock"
flock 8
mode="" count=0
[ -s "$fault" ] && read -r mode count <"$fault"
if [ "${{count:-0}}" -gt 0 ]; then echo "$mode $((count - 1))" >"$fault"; else mode=""; fi
exec 8>&-
said="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
timed_out() {{ echo "$said" >&2; exit 1; }}
case "$mode" in
before) timed_out ;;
after) {real} "$@" >/dev/null 2>&1; timed_out ;;
late) (for fd in /proc/$BASHPID/fd/*; do fd=${{fd##*/}}; if [ "$fd" -gt 2 ]; then eval "exec $fd>&-"; fi; done
  sleep {late_s}; exec {real} "$@") >/dev/null 2>&1 </dev/null & timed_out ;;
slow) sleep {late_s}; exec {real} "$@" ;;
hang) exec sleep {hang_s} ;;
*) exec {real} "$@" ;;
esac
"""


def install(real: str, script: Path, fault: Path) -> None:
    """Write the wrapper of ``real`` as ``script``; ``fault`` is the file that chooses.

    ``before``: says that it timed out and submits nothing. ``after``: submits, then says so. ``late``: says so, and the
    job is submitted a second later, as by a controller that hung, while nothing holds any more what its caller held.
    ``slow``: submits after a second, and says so. ``hang``: does nothing for a long time.
    """
    script.write_text(_SCRIPT.format(fault=fault, real=real, late_s=LATE_S, hang_s=HANG_S))
    script.chmod(0o755)


def choose(fault: Path, mode: Fault, count: int) -> None:
    """Let the next ``count`` calls fail in this way."""
    aside = fault.with_suffix(".new")
    aside.write_text(f"{mode} {count}\n")
    os.replace(aside, fault)
