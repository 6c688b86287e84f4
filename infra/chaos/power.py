"""F2: the power is cut. What had reached the disk at a random moment is all that a platform finds when it starts again.

The data folder lies on a file system in a file, and that file is copied under load: in the copy is what the disk held,
and not what was on its way there. A real cut leaves the disk as it was at one instant, so nothing may run while it is
copied: all processes are stopped for these milliseconds, and none of them is asked to write anything.

Each copy is started in a world of its own, on the same path, with shared memory empty and the effects as they were.
Then everything that was accepted before the cut has to be there, and to end once. The contrast is a log's server that
syncs when it likes to: it must lose, or the trial proves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from infra.chaos.island import Island, Mount, cannot_mount, copy_disk, make_image
from infra.chaos.launch import NotUp
from infra.chaos.lines import Figure, Reply, Result, Verdict
from infra.chaos.trial import Case, Trial
from infra.rights import ACCOUNT, GATEWAY
from streams.follow import follow
from streams.link import open_link
from streams.log import Log
from streams.topology import STREAM

TRIGGERS = 10_000
CUTS = 20
CONTRAST_CUTS = 3
RATE_PER_S = 100.0
IMAGE_BYTES = 2 * 1024**3
SETTLED_S = 1.0
FIRST_S = 60.0
STEP_S = 0.01
CONTRAST_PATIENCE_S = 2.0
EXAMINED_AT_ONCE = 3
IDLE_S = 0.5
LAX = "infra.chaos.lax"


class Cut(Struct, frozen=True, kw_only=True):
    """One cut: copies of disk and effects, the instant (epoch seconds), and how long all stood still for it."""

    folder: Path
    at: float
    still_s: float


async def run(trial: Trial) -> Result:
    """Cut the power of a platform that syncs, and then of one that does not."""
    cuts, accepted = await _cut_under_load(trial, trial.n(CUTS, 2), "infra")
    verdicts = await _examine_all(trial, cuts, "infra", 60.0)
    contrast = Trial(trial.folder / "contrast", seed=trial.seed, scale=trial.scale, say=trial.say)
    lax_cuts, _ = await _cut_under_load(contrast, trial.n(CONTRAST_CUTS), LAX)
    lax = await _examine_all(contrast, lax_cuts, LAX, CONTRAST_PATIENCE_S)
    total = _sum(verdicts)
    promised, lax_lost, lax_promised = total.accepted, _sum(lax).lost, _sum(lax).accepted
    return Result(
        verdict=total,
        kills=len(cuts),
        figures=[
            Figure(
                name="acknowledged before a cut and lost, as shipped (sync always), all cuts together",
                value=f"{total.lost} of {promised:,} in {len(cuts)} cuts",
                bar="0",
                good=total.lost == 0 and promised > 0,
            ),
            Figure(
                name="the same with the server's own default (contrast)",
                value=f"{lax_lost} of {lax_promised:,} in {len(lax_cuts)} cuts",
                bar="> 0",
                good=lax_lost > 0,
            ),
            Figure(name="bodies that ran again after a cut", value=str(total.bodies_again)),
            Figure(
                name="time that all stood still for a copy of the disk, longest",
                value=f"{max(cut.still_s for cut in cuts):.2f} s",
            ),
        ],
        notes=[f"{accepted:,} triggers were accepted while the platform ran; each cut counts those before it."],
    )


async def _cut_under_load(trial: Trial, count: int, room: str) -> tuple[list[Cut], int]:
    """Run a load, copy the disk at so many random moments of it, and return the copies and how many were accepted."""
    trial.folder.mkdir(exist_ok=True)
    image = make_image(trial.folder / "image", IMAGE_BYTES)
    triggers = trial.n(TRIGGERS, 200)
    took_s = triggers / RATE_PER_S
    moments = sorted(trial.rng.uniform(0.1, 0.95) * took_s for _ in range(count))
    cuts: list[Cut] = []
    async with _island(trial, image, room) as island:
        await trial.deploy(island.url, island.token)
        os.sync()  # what is lost in the contrast is what was acknowledged, and not the log as a whole
        await asyncio.sleep(SETTLED_S)
        load = trial.load(island, total=triggers, rate_per_s=RATE_PER_S)
        async with trial.driving(load):
            began = time.monotonic()
            for number, moment in enumerate(moments, 1):
                await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
                await _first_effect(trial)
                cuts.append(await asyncio.to_thread(_cut, trial, island, image, number))
        trial.say(f"{triggers:,} triggers, {count} cuts ({room})")
    return cuts, len({reply.id for reply in trial.replies() if reply.answered == "accepted"})


def _island(trial: Trial, image: Path, room: str, ledger: Path | None = None) -> Island:
    """Return a platform on an image. All are at the same path, so that what is on the disk fits each of them."""
    mounts: list[Mount] = [("-o", "loop", str(image), str(trial.folder / "disk"))]
    if ledger is not None:
        mounts.append(("--bind", str(ledger), str(trial.ledger)))
    return Island(trial.folder / "disk", mounts, room=room)


async def _first_effect(trial: Trial) -> None:
    """Return once something was accepted and ran: from a cut before that nothing could be lost."""
    async with asyncio.timeout(FIRST_S):
        while not trial.ledger.exists():
            await asyncio.sleep(STEP_S)


def _cut(trial: Trial, island: Island, image: Path, number: int) -> Cut:
    folder = trial.folder / f"cut-{number}"
    folder.mkdir()
    stopped_at = time.monotonic()
    with island.standing_still():
        at = copy_disk(image, folder / "image")
        shutil.copyfile(trial.ledger, folder / "effects")
    return Cut(folder=folder, at=at, still_s=time.monotonic() - stopped_at)


async def _examine_all(trial: Trial, cuts: list[Cut], room: str, patience_s: float) -> list[Verdict]:
    """Examine the cuts, a few at a time: each is a platform that waits for leases to run out."""
    free = asyncio.Semaphore(EXAMINED_AT_ONCE)

    async def one(cut: Cut, number: int) -> Verdict:
        async with free:
            return await _examine(trial, cut, number, room, patience_s)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(cut, number)) for number, cut in enumerate(cuts, 1)]
    return [task.result() for task in tasks]


async def _examine(trial: Trial, cut: Cut, number: int, room: str, patience_s: float) -> Verdict:
    """Start a platform on what the cut left, let everything end, and return the verdict."""
    after = Trial(cut.folder, seed=trial.seed, scale=trial.scale, say=trial.say)
    promised = _what_was_said(trial, cut)
    after.adopt(cut.folder / "driver.jsonl")
    island = _island(trial, cut.folder / "image", room, after.ledger)
    try:
        await island.start()
        await after.check(island, patience_s=patience_s)
        await _forget_what_nobody_can_know(after, island, promised)
        if not _stages_in_memory(island):
            trial.say(f"cut {number}: batches are not staged in memory again")
        verdict = await after.check(island, patience_s=IDLE_S)
    except NotUp as error:
        trial.say(f"cut {number}: the platform does not start: {error}")
        verdict = Verdict(accepted=len(promised), lost=len(promised), named={"lost": [str(error)]})
    finally:
        await island.stop()
        with contextlib.suppress(FileNotFoundError):
            (cut.folder / "image").unlink()
    trial.say(
        f"cut {number} ({room}): {verdict.accepted} accepted before it, lost {verdict.lost}, doubled {verdict.doubled},"
        f" ghost {verdict.ghost}, wrong {verdict.wrong}"
    )
    return verdict


def _stages_in_memory(island: Island) -> bool:
    """Say whether the link to shared memory, which led nowhere after the cut, leads somewhere again."""
    place = island.data / "nats" / "jetstream" / ACCOUNT / "streams" / STREAM / "batches"
    return place.is_symlink() and island.seen(place.readlink()).is_dir()


def _what_was_said(trial: Trial, cut: Cut) -> set[str]:
    """Write the driver's log as it was at the cut, what was not yet answered as unknown; return what was accepted."""
    said: list[Reply] = []
    promised = set()
    for line in trial.lines():
        if not isinstance(line, Reply):
            continue
        if line.at < cut.at:
            if line.answered == "accepted":
                promised.add(line.id)
            said.append(line)
        else:
            said.append(msgspec.structs.replace(line, status=0, answered="unknown", run=""))
    (cut.folder / "driver.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in said))
    return promised


async def _forget_what_nobody_can_know(after: Trial, island: Island, promised: set[str]) -> None:
    """Take out effects of triggers that were sent while the disk was being copied and did not get into the copy."""
    there: set[str] = set()
    servers = json.loads((island.data / "run" / "servers.json").read_text())
    password = (island.data / "run" / f"nats-{GATEWAY}.password").read_text().strip()
    link = await open_link(servers["nats_url"], user=GATEWAY, password=password, name="power")
    log = Log(link)
    await log.start()
    try:
        end = await log.end_seq()
        async with aclosing(follow(log, ["hr.work.>"], after=0, window=4096, idle_s=IDLE_S)) as batches:
            async for batch in batches:
                there.update(stored.subject.split(".")[4] for stored in batch)
                if not batch or batch[-1].seq >= end:
                    break
    finally:
        await log.close()
        await link.close()
    kept = [
        line
        for line in after.ledger.read_text().splitlines(keepends=True)
        if line.split(",", 1)[0] in there or line.rstrip().rpartition(",")[2] in promised
    ]
    after.ledger.write_text("".join(kept))


def _sum(verdicts: list[Verdict]) -> Verdict:
    """Return the verdicts of all cuts as one: counts added, of the times the longest, and what was named."""
    found: dict[str, Any] = {}
    for name in Verdict.__struct_fields__:
        values = [getattr(verdict, name) for verdict in verdicts]
        if isinstance(values[0], int):
            found[name] = sum(values)
        elif isinstance(values[0], float):
            found[name] = max(values)
    named: dict[str, list[str]] = {}
    for verdict in verdicts:
        for kind, what in verdict.named.items():
            named.setdefault(kind, []).extend(what)
    return Verdict(**found, named=named)


def probe() -> str:
    """Return why the power cannot be cut here."""
    return cannot_mount(loop=True)


CASE = Case(name="F2", title="power cut of the log", run=run, probe=probe)
