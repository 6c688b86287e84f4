"""What still fits into an allocation that ends: work is begun only where it is expected to be over before that.

A pilot is a worker, or an agent of the machine it runs on, inside an allocation of a batch system. Functions go to it
as to any other worker, without a queue, and jobs to its site; what it does not begin, others do (``functions.moves``).
Pure.
"""

from __future__ import annotations

SPARE_S = 5.0  # between the end of the last work and that of the allocation, for its outcome to be committed


def fits(now: float, ends_at: float, run: tuple[float, float] | None, limit_s: float) -> bool:
    """Say whether work that is begun now is over when the allocation ends.

    Args:
        now: epoch seconds.
        ends_at: of the allocation, likewise.
        run: p50 and p90 of how long it takes, in seconds; None where nothing is known.
        limit_s: the longest it may take: what is counted with where nothing is known.
    """
    needs_s = limit_s if run is None else min(run[1], limit_s)
    return now + needs_s + SPARE_S <= ends_at
