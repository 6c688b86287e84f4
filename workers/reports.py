"""What the jobs of a site say of themselves, as the agent hears it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing

import msgspec

from headrace.joblog import Report
from headrace.wire import decode
from streams.follow import follow
from streams.log import Log
from streams.topology import report_subject

_log = logging.getLogger(__name__)


async def hear(log: Log, site: str, heard: Callable[[Report], None]) -> None:
    """Call ``heard`` with each report of a job of this site from now on, soon after it is stored; never returns.

    A report is a hint: whoever hears it asks the batch system. What was said while nobody listened is not told again,
    for the round that looks at all jobs finds it.
    """
    async with aclosing(follow(log, [report_subject("*", "*", site)])) as batches:
        async for batch in batches:
            for stored in batch:
                try:
                    report = decode(stored.body, Report)
                except msgspec.MsgspecError as error:
                    _log.warning("message %d is no report: %s", stored.seq, error)
                    continue
                heard(report)
