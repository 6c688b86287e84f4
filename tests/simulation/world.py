"""One simulation: the servers, the processes, those who send triggers, the faults, and the end."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headrace.model import Code
from headrace.names import run_id
from headrace.wire import encode
from streams import topology
from streams.ledger import FACTS, POSITION
from streams.stored import Stored
from tests.simulation import campaigns, check, ladders, programs
from tests.simulation.actors import Actor, Effect, GatewayActor, LedgerActor, Tables, WorkerActor, worker_of
from tests.simulation.client import Network
from tests.simulation.faults import Nemesis
from tests.simulation.loop import OutOfTime, Process, SimLoop, run
from tests.simulation.messages import Connection
from tests.simulation.redis import SimRedis
from tests.simulation.server import SimServer
from workers.worker import Tools, Worker

GUEST_EVERY = 3  # of so many triggers one is another tenant's
FAULTS_S = 4.0
CALM_S_MAX = 600.0
BURST_S = 0.05
LOOK_S = 0.25
JOBS_SHARE = 0.2
PILOTS_SHARE = 0.5
ANSWER_S = 8.0
RETRY_S = 0.4


@dataclass
class Trigger:
    """An event that is sent until it is accepted, or until its sender gives up."""

    event: str
    route: str
    program: programs.Program
    patience: int
    subject: str | None = None
    tenant: str = programs.TENANT
    run: str = ""
    tries: int = 0
    accepted: bool = False
    canceled: bool = False
    done: bool = False


@dataclass
class Options:
    """How a simulation differs from the usual one."""

    trace: bool = False
    guarding: bool = True
    faults: bool = True
    worker: Callable[[Tools], Worker] = worker_of


@dataclass
class Verdict:
    """What came of a seed. ``wrong`` is empty where all is well."""

    seed: int
    wrong: list[str]
    plan: list[str]
    steps: int
    virtual_s: float
    digest: str
    messages: int
    trace: list[str] = field(default_factory=list)


class World:
    """Everything that there is in one simulation."""

    def __init__(self, seed: int, options: Options) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.loop = SimLoop(random.Random(draw.random()))
        self._rng = random.Random(draw.random())
        self._trace: list[str] | None = [] if options.trace else None
        self.on_event: Callable[[str, str, Connection | None], None] | None = None
        self.network = Network(self.loop, random.Random(draw.random()))
        self.server = SimServer(self.loop, random.Random(draw.random()))
        self.server.guarding = options.guarding
        self.server.on_event = self._hear
        self.redis = SimRedis(self.loop, random.Random(draw.random()))
        self.tables = Tables()
        self.blobs: dict[str, bytes] = dict.fromkeys(self.tables.names, _CODE)
        self.worker_kind = options.worker
        self.processes: list[Process] = []
        self.effects: list[Effect] = []
        self.heard: list[tuple[str, Stored]] = []
        self.ended: list[tuple[str, BaseException | None]] = []
        self.slots = self._rng.randrange(1, 5)
        self.workers = [WorkerActor(self, f"w{n}") for n in range(2)]
        self.gateways = [GatewayActor(self, f"g{n}") for n in range(self._rng.randrange(1, 3))]
        self.actors: list[Actor] = [*self.workers, *self.gateways, LedgerActor(self, "ledger")]
        self.by_name = {actor.name: actor for actor in self.actors}
        # In some worlds cameras send frames quicker than they can be looked at, of which only the newest counts.
        self._frames = self.chance(0.25)
        self._ladders = self.chance(0.25)
        # And in some, functions submit batch jobs. Drawn apart, so that the others are what they were without.
        self._jobs_rng = random.Random(seed * 7919 + 5)
        self.batches: dict[str, campaigns.SimBatch] = {}
        if self._jobs_rng.random() < JOBS_SHARE:
            self._add_site()
        self.calm_at = 0.0
        self._burst_s = FAULTS_S * 0.6 * self._rng.random()
        self.triggers = [self._draw_trigger(n) for n in range(self._rng.randrange(1, 9 if self._frames else 5))]
        self.nemesis = Nemesis(self, random.Random(draw.random()))
        self._faults = options.faults

    def _add_site(self) -> None:
        rng = self._jobs_rng
        batch = self.batches[programs.SITE] = campaigns.SimBatch(self, random.Random(rng.random()))
        self.tables.sites = campaigns.Sites(lambda: self.server.now)
        agents = [campaigns.AgentActor(self, f"a{n}", batch) for n in range(1 if rng.random() < 0.8 else 2)]
        if rng.random() < PILOTS_SHARE:
            pilot = self.batches[programs.PILOT] = campaigns.SimBatch(self, random.Random(rng.random()), programs.PILOT)
            agents.append(campaigns.PilotActor(self, "p0", pilot, rng))
        self.actors += agents
        self.by_name |= {agent.name: agent for agent in agents}

    def chance(self, share: float) -> bool:
        """Draw."""
        return self._rng.random() < share

    def note(self, *what: object) -> None:
        """Write down what happens, if somebody wants to read it."""
        if self._trace is not None:
            self._trace.append(f"{self.loop.time():10.4f} " + " ".join(map(str, what)))

    def _hear(self, kind: str, subject: str, by: Connection | None) -> None:
        if self._trace is not None:
            self.note(kind, len(self.server.log) if kind == "store" else "", subject, "" if by is None else by.name)
        if self.on_event is not None:
            self.on_event(kind, subject, by)

    # ------------------------------------------------------------ senders

    def _draw_trigger(self, number: int) -> Trigger:
        if self._ladders and self.chance(0.7):
            return self._drawn(number, "ladder", ladders.draw(self._rng))
        route = "late" if self.chance(0.1) else "newest" if self._frames and self.chance(0.8) else "main"
        made = self._drawn(number, route, programs.draw(self._rng))
        if self.batches and self._jobs_rng.random() < 0.7:
            made.program = campaigns.draw(self._jobs_rng)
        if route == "newest":
            made.subject = self._rng.choice(("cam", "cam", "eye", None))
        return made

    def _drawn(self, number: int, route: str, program: programs.Program) -> Trigger:
        event = f"e{number}"
        made = Trigger(event, route, program, patience=1 if self.chance(0.1) else 1000)
        made.tenant = programs.GUEST if number % GUEST_EVERY == 1 and route != "ladder" else programs.TENANT
        made.run = run_id(made.tenant, "sim", event, route)
        return made

    def _schedule(self) -> None:
        waiting = list(self.triggers)
        while waiting:
            together = waiting[: 2 if self.chance(0.2) else 1]
            del waiting[: len(together)]
            at_s = FAULTS_S * 0.6 * self._rng.random()
            if together[0].route == "newest":
                at_s = self._burst_s + BURST_S * self._rng.random()
            self.loop.later(at_s, self._send, together)
            if self.chance(0.15):
                self.loop.later(at_s + 0.01 * self._rng.random(), self._send, together)
            if self.chance(0.12):
                self.loop.later(at_s + 2.0 * self._rng.random(), self._cancel, together[0])

    def _send(self, triggers: list[Trigger]) -> None:
        first = triggers[0]
        gateway = self._rng.choice(self.gateways)
        if not gateway.open:
            self.loop.later(RETRY_S, self._send, triggers)
            return
        first.tries += 1
        answered: list[bool] = []

        def respond(accepted: bool) -> None:
            if answered:
                return
            answered.append(accepted)
            self.note("answer", first.event, accepted)
            if accepted:
                for one in triggers:
                    one.accepted = one.done = True
            else:
                again()

        def again() -> None:
            if first.tries >= first.patience:
                for one in triggers:
                    one.done = True
            elif not first.accepted:
                self.loop.later(RETRY_S, self._send, triggers)

        def late() -> None:
            if not answered:
                answered.append(False)
                again()

        gateway.submit(triggers, respond, waits=self.chance(0.3))
        self.loop.later(ANSWER_S, late)

    def _cancel(self, trigger: Trigger) -> None:
        gateway = self._rng.choice(self.gateways)
        if trigger.accepted and gateway.open:
            trigger.canceled = True
            gateway.cancel(trigger.run)

    # ------------------------------------------------------------ servers

    def kill_server(self, away_s: float) -> None:
        """Kill the NATS server, and start it again after a while."""
        if not self.server.up:
            return
        self.note("server dies")
        self.server.die()
        for actor in self.actors:
            if actor.client is not None and actor.client.wired is not None:
                actor.client.wired.cut()
        self.loop.later(away_s, self._raise_server)

    def _raise_server(self) -> None:
        if not self.server.up:
            self.note("server is back")
            self.server.rise(0.05 if self.chance(0.5) else 0.0)

    def redis_back(self) -> None:
        """Let Redis answer again."""
        self.redis.away = False

    # ------------------------------------------------------------ the whole of it

    async def live(self) -> None:
        """Live through the faults, then through the calm until all is done."""
        for lane in range(topology.LANES):
            for tenant in (programs.TENANT, programs.GUEST):
                config = topology.lane_config(lane, tenant)
                self.server.add_consumer(topology.lane_consumer(lane, tenant), config.as_dict())
        for actor in self.actors:
            actor.start()
        self._schedule()
        if self._faults:
            self.nemesis.prepare(FAULTS_S)
        self.loop.limit_s = FAULTS_S + CALM_S_MAX
        await asyncio.sleep(FAULTS_S if self._faults else 0.1)
        self.note("calm")
        self.calm_at = self.server.now
        self.nemesis.stop()
        while not self.quiet():
            await asyncio.sleep(LOOK_S)

    def quiet(self) -> bool:
        """Say whether there is nothing left to do."""
        if not (self.server.ready and all(t.done for t in self.triggers) and all(a.well for a in self.actors)):
            return False
        if self.server.undone() or not all(batch.quiet for batch in self.batches.values()):
            return False
        if self.batches and self._open_jobs():
            return False
        newest = max((found.seq for facts in FACTS if (found := self.server.last(facts)) is not None), default=0)
        return int(self.redis.data.get(POSITION.encode(), b"0")) >= newest and b"hr:whole" in self.redis.data

    def _open_jobs(self) -> bool:
        """Say whether a run with a batch job goes on: the work of a job is acknowledged long before its end."""
        facts = check.Facts(self.server.log)
        return any(not facts.records[several[0][1].run_id][0].ended for several in facts.jobs.values())


_CODE = encode(Code(kind="source", name="work", module="work", files={"work.py": "..."}))


def simulate(seed: int, options: Options | None = None) -> Verdict:
    """Run one seed and say what came of it."""
    world = World(seed, options or Options())
    wrong: list[str] = []
    try:
        run(world.loop, world.live())
    except OutOfTime as late:
        wrong.append(f"stuck: {late}; left: {world.server.undone()[:5]}, " + _why(world))
    wrong += check.check(world)
    trace = world._trace or []
    digest = hashlib.sha256()
    for line in trace:
        digest.update(line.encode())
    folders = [str(batch.folder).encode() for batch in world.batches.values()]
    for kept in world.server.log:
        body = kept.body
        for folder in folders:
            body = body.replace(folder, b"")
        digest.update(kept.subject.encode() + body)
    verdict = Verdict(
        seed=seed,
        wrong=wrong,
        plan=world.nemesis.plan,
        steps=world.loop.steps,
        virtual_s=world.loop.time(),
        digest=digest.hexdigest(),
        messages=len(world.server.log),
        trace=trace,
    )
    world.loop.take_apart(world.processes)
    for batch in world.batches.values():
        batch.close()
    return verdict


def _why(world: World) -> str:
    told: list[Any] = [
        [t.event for t in world.triggers if not t.done],
        [a.name for a in world.actors if not a.well],
        world.redis.data.get(POSITION.encode()),
        len(world.server.log),
    ]
    return f"unsent {told[0]}, down {told[1]}, the read model is at {told[2]} of {told[3]}"
