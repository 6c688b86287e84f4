"""What goes wrong, and when: drawn from the seed before the simulation begins, so that a seed says all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.actors import Actor, WorkerActor

if TYPE_CHECKING:
    from tests.simulation.messages import Connection
    from tests.simulation.world import World

MOMENTS = (
    "store work",
    "store done",
    "store lease",
    "store tally",
    "store try",
    "store end",
    "store cancel",
    "store start",
    "refuse done",
    "refuse tally",
    "deliver",
    "redeliver",
    "ack",
    "nak",
)
SKEW_S_MAX = 3600.0


class Nemesis:
    """Does to a world what was drawn for it, until it is told to stop."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._moments: dict[tuple[str, int], Callable[[str], None]] = {}
        self._counts: Counter[str] = Counter()
        self._over = False
        self.plan: list[str] = []
        self.clocks_differ = False

    def prepare(self, over_after_s: float) -> None:
        """Draw the faults, and arm them."""
        rng, world = self._rng, self._world
        if rng.random() < 0.4:
            world.server.lost_share = rng.choice((0.01, 0.03, 0.1))
            self.plan.append(f"messages are lost: {world.server.lost_share}")
        if rng.random() < 0.4:
            world.network.slow_share = 0.1
            world.network.slow_s = rng.choice((0.05, 0.5, 3.0))
            self.plan.append(f"some messages take up to {world.network.slow_s} s")
        if rng.random() < 0.3:
            world.redis.lost_share = 0.05
            self.plan.append("answers of Redis are lost")
        if rng.random() < 0.2:
            self.clocks_differ = True
            for actor in world.actors:
                actor.skew_s = rng.choice((0.0, 0.5, -0.5, 40.0, -40.0, SKEW_S_MAX, -SKEW_S_MAX)) * rng.random()
            self.plan.append("clocks differ by " + ", ".join(f"{a.skew_s:.1f}" for a in world.actors))
        for _ in range(rng.randrange(0, 6)):
            name, act = self._draw()
            if rng.random() < 0.6:
                moment, number = rng.choice(MOMENTS), rng.randrange(1, 12)
                self._moments[moment, number] = act
                self.plan.append(f"at {moment} no. {number}: {name}")
            else:
                at_s = over_after_s * rng.random()
                world.loop.later(at_s, self._at, act)
                self.plan.append(f"after {at_s:.2f} s: {name}")
        for _ in range(rng.randrange(0, 3)):
            world.loop.later(over_after_s * rng.random(), world.server.checkpoint)
            world.loop.later(over_after_s * rng.random(), world.redis.save)
        if self._moments:
            world.on_event = self._hear

    def stop(self) -> None:
        """Do nothing more, and put right what does not come right by itself: a pause and a partition end in time."""
        self._over = True
        self._moments.clear()
        world = self._world
        world.server.lost_share = world.network.slow_share = world.redis.lost_share = 0.0
        world.redis.away = False
        if not world.server.up:
            world.server.rise(0.01)
        for actor in world.actors:
            actor.skew_s = 0.0
            if actor.process is not None:
                actor.process.calm()
            actor.start()

    def _at(self, act: Callable[[str], None]) -> None:
        if not self._over:
            act("")

    def _hear(self, kind: str, subject: str, by: Connection | None) -> None:
        for moment in (kind, f"{kind} {subject.split('.', 2)[1]}"):
            self._counts[moment] += 1
            act = self._moments.get((moment, self._counts[moment]))
            if act is not None:
                act("" if by is None else by.name)

    def _draw(self) -> tuple[str, Callable[[str], None]]:
        rng, world = self._rng, self._world
        away_s = rng.choice((0.05, 0.5, 3.0)) * (0.5 + rng.random())
        long_s = rng.choice((0.2, 2.0, 9.0)) * (0.5 + rng.random())
        fuse = int(rng.choice((1, 10, 60)) * rng.random())
        other = rng.choice(world.actors)
        meant = rng.random() < 0.7  # the one who did what we waited for, else any

        def chosen(name: str) -> Actor:
            return world.by_name.get(name.rpartition("-")[0], other) if meant else other

        def crash(name: str) -> None:
            actor = chosen(name)
            if actor.process is not None:
                actor.process.light_fuse(fuse, lambda: actor.crash(away_s))

        def freeze(name: str) -> None:
            actor = chosen(name)
            process = actor.process

            def hold() -> None:
                world.note("freeze", actor.name, round(long_s, 2))
                actor_process.freeze()
                world.loop.later(long_s, actor_process.thaw)

            if process is not None and not process.frozen:
                actor_process = process
                process.light_fuse(fuse, hold)
                if long_s > 5 and actor.client is not None and actor.client.wired is not None and not meant:
                    world.loop.later(long_s * 0.9, actor.client.wired.cut)

        def cut(name: str) -> None:
            client = chosen(name).client
            if client is not None and client.wired is not None:
                world.note("cut", client.process.name)
                client.wired.cut()

        def partition(name: str) -> None:
            actor = chosen(name)
            client = actor.client
            if client is not None:
                world.note("partition", actor.name, round(long_s, 2))
                client.partition()
                world.loop.later(long_s, client.heal)

        def stop(name: str) -> None:
            actor = chosen(name)
            if isinstance(actor, WorkerActor):
                actor.stop()

        def server(name: str) -> None:
            world.kill_server(away_s)

        def redis_away(name: str) -> None:
            world.note("redis away")
            world.redis.away = True
            world.loop.later(away_s, world.redis_back)

        def redis_wiped(name: str) -> None:
            world.note("redis wiped")
            world.redis.wipe()

        def redis_older(name: str) -> None:
            world.note("redis older")
            world.redis.go_back()

        made: list[tuple[str, Callable[[str], None]]] = [
            (f"crash {other.name}, fuse {fuse}, away {away_s:.2f} s", crash),
            (f"crash {other.name}, fuse {fuse}, away {away_s:.2f} s", crash),
            (f"freeze {other.name} for {long_s:.2f} s, fuse {fuse}", freeze),
            (f"freeze {other.name} for {long_s:.2f} s, fuse {fuse}", freeze),
            (f"cut {other.name}", cut),
            (f"partition {other.name} for {long_s:.2f} s", partition),
            (f"stop {other.name}", stop),
            (f"kill the server, away {away_s:.2f} s", server),
            ("wipe Redis", redis_wiped),
            ("Redis goes back", redis_older),
            (f"Redis is away for {away_s:.2f} s", redis_away),
        ]
        return rng.choice(made)
