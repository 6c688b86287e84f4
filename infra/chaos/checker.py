"""Looks at what is left: the driver's logs, the event log, the effects. ``python -P -m infra.chaos.checker INQUIRY``.

It asks nothing of the platform but its log, and that as anybody with the gateway's credentials may read it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import aclosing
from pathlib import Path

import uvloop

from infra.chaos.judge import Judge, read_effects
from infra.chaos.lines import DriverLine, Inquiry, read_lines, read_plan, write_plan
from infra.rights import GATEWAY
from streams.follow import follow
from streams.link import open_link
from streams.log import Log

IDLE_S = 0.5
WINDOW = 4096


async def read_log(inquiry: Inquiry, judge: Judge) -> None:
    """Read the whole event log, and go on until every run has ended or nothing has happened for too long."""
    where = json.loads(Path(inquiry.servers_file).read_text())
    password = Path(inquiry.password_file).read_text().strip()
    link = await open_link(where["nats_url"], user=GATEWAY, password=password, name="checker")
    log = Log(link)
    await log.start()
    try:
        heard_at = time.monotonic()
        async with aclosing(follow(log, ["hr.>"], after=0, window=WINDOW, idle_s=IDLE_S)) as batches:
            async for batch in batches:
                if batch:
                    judge.stored(batch)
                    heard_at = time.monotonic()
                    continue
                if not judge.open_runs() or time.monotonic() - heard_at > inquiry.patience_s:
                    return
    finally:
        await log.close()
        await link.close()


async def _main(path: str) -> None:
    inquiry = read_plan(path, Inquiry)
    judge = Judge()
    for name in inquiry.driver_logs:
        judge.heard(read_lines(name, DriverLine))
    await read_log(inquiry, judge)
    ledger = Path(inquiry.ledger)
    judge.happened(read_effects(ledger.read_text()) if ledger.exists() else [])
    write_plan(Path(inquiry.verdict), judge.verdict(inquiry.expected, inquiry.silent))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(sys.argv[1]))
