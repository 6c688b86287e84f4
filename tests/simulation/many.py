"""Many seeds, shared between forked processes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
from dataclasses import dataclass, field

from tests.simulation.world import Options, simulate

CHUNK = 50


@dataclass
class Found:
    """What came of many seeds: those with something wrong, and how much happened in all of them."""

    failed: dict[int, list[str]] = field(default_factory=dict)
    messages: int = 0
    virtual_s: float = 0.0


def run_some(seeds: range, options: Options | None = None) -> Found:
    """Run seeds one after the other."""
    logging.disable(logging.CRITICAL)
    found = Found()
    gc.collect()
    gc.freeze()
    gc.disable()
    for seed in seeds:
        verdict = simulate(seed, options)
        if verdict.wrong:
            found.failed[seed] = verdict.wrong
        found.messages += verdict.messages
        found.virtual_s += verdict.virtual_s
        if seed % 10 == 9:
            gc.collect()
    return found


def run_many(seeds: range, processes: int) -> Found:
    """Run seeds in forked processes, and put together what came of them."""
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    found = Found()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for part in pool.imap_unordered(run_some, chunks):
            found.failed |= part.failed
            found.messages += part.messages
            found.virtual_s += part.virtual_s
    found.failed = dict(sorted(found.failed.items()))
    return found
