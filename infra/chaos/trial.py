"""One trial of one case: its folder, its seed, and the processes that make it, all of which end with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct

from headrace.client import AsyncClient
from headrace.errors import HeadraceError
from infra.chaos import effects
from infra.chaos.launch import Up
from infra.chaos.lines import (
    DriverLine,
    Hit,
    Inquiry,
    Load,
    Plan,
    ReadBack,
    Reply,
    Result,
    Step,
    Verdict,
    read_lines,
    read_plan,
    write_plan,
)
from infra.process import tie_to
from infra.programs import nats_program, redis_program
from infra.rights import GATEWAY, WORKER
from infra.settings import PREFIX, environment

STEP_S = 0.05
END_S = 20.0
MIX = {"instant": 0.7, "chained": 0.2, "fanned": 0.08, "slow": 0.02}


class Broken(HeadraceError):
    """A process of the trial itself failed: there is no verdict."""

    title = "The trial itself failed"


def nothing_missing() -> str:
    """Say what is missing here for a platform that is killed and paused from outside; nothing if all is there."""
    if not sys.platform.startswith("linux"):
        return "processes are found in /proc, which only Linux has"
    try:
        nats_program()
        redis_program()
    except HeadraceError as error:
        return f"{error}: {error.hint}"
    return ""


class Case(NamedTuple):
    """A fault and how it is tried. ``probe`` says why it cannot be tried here, and nothing where it can."""

    name: str
    title: str
    run: Callable[[Trial], Awaitable[Result]]
    probe: Callable[[], str] = nothing_missing


class Trial:
    """What a case works with."""

    def __init__(
        self, folder: Path, *, seed: int = 1, scale: float = 1.0, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Describe it; nothing is started yet.

        Args:
            folder: an empty folder of its own.
            seed: where all that is random comes from.
            scale: share of the full number of triggers and faults.
            say: told how far it is, for the person who waits.
        """
        self.folder = folder
        self.seed = seed
        self.scale = scale
        self.say = say
        self.rng = random.Random(seed)  # noqa: S311 - seeded faults, no secret
        self.ledger = folder / "effects"
        self._driver_logs: list[Path] = []
        self._nemesis_logs: list[Path] = []
        self._platforms = 0

    def n(self, count: int, least: int = 1) -> int:
        """Return a number of things, scaled."""
        return max(least, round(count * self.scale))

    # ------------------------------------------------------------ the platform

    @asynccontextmanager
    async def platform(
        self, *, env: Mapping[str, str] | None = None, options: Sequence[str] = (), data: Path | None = None
    ) -> AsyncIterator[Up]:
        """Start a platform as a user does, deploy the functions of the trials, and stop it at the end."""
        self._platforms += 1
        async with Up(data or self.folder / f"platform-{self._platforms}", options, env) as up:
            await self.deploy(up.url, up.token)
            yield up

    async def deploy(self, url: str, token: str, *files: Path) -> None:
        """Deploy the functions of the trials, or of other files."""
        async with AsyncClient(url, token) as client:
            for file in files or (Path(effects.__file__),):
                await client.deploy(file)

    # ------------------------------------------------------------ driver and nemesis

    def load(self, up: Up, *, total: int, rate_per_s: float, mix: dict[str, float] | None = None, **more: Any) -> Load:
        """Return a load for a platform; the seed tells which trigger goes to which route."""
        number = len(self._driver_logs) + 1
        log = self.folder / f"driver-{number}.jsonl"
        self._driver_logs.append(log)
        return Load(
            url=up.url,
            token_file=str(up.data / "token"),
            log=str(log),
            ledger=str(self.ledger),
            name=f"chaos-{self.seed}-{number}",
            seed=self.seed * 1000 + number,
            total=total,
            rate_per_s=rate_per_s,
            mix=mix or MIX,
            **more,
        )

    @asynccontextmanager
    async def second_worker(self, up: Up) -> AsyncIterator[int]:
        """Start another worker for a platform, as ``headrace worker`` on another machine would be; yields its id."""
        run = up.data / "run"
        settings = {
            "data_dir": up.data,
            "nats_url": up.servers().nats_url,
            "nats_user": WORKER,
            "nats_password_file": run / f"nats-{WORKER}.password",
            "scratch_dir": self.folder / "scratch-of-the-second",
        }
        own = {name: text for name, text in os.environ.items() if not name.startswith(PREFIX)}
        with (self.folder / "second-worker.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "infra", WORKER],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=own | environment(settings),
                start_new_session=True,
                preexec_fn=tie_to(os.getpid()),
            )
        try:
            yield process.pid
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @asynccontextmanager
    async def driving(self, load: Load) -> AsyncIterator[None]:
        """Have a driver post the load; leaving the block waits until it is through."""
        async with self._process("driver", load, "drive"):
            yield

    async def drive(self, load: Load) -> None:
        """Post a load from its beginning to its end."""
        async with self.driving(load):
            pass

    @asynccontextmanager
    async def nemesis(self, up: Up, *, steps: Sequence[Step] = (), **more: Any) -> AsyncIterator[None]:
        """Have a nemesis inject faults; leaving the block waits until it is through."""
        number = len(self._nemesis_logs) + 1
        log = self.folder / f"nemesis-{number}.jsonl"
        self._nemesis_logs.append(log)
        plan = Plan(pid_file=str(up.pid_file), log=str(log), seed=self.seed * 1000 + number, steps=list(steps), **more)
        async with self._process("nemesis", plan):
            yield

    def adopt(self, log: Path) -> None:
        """Count a driver's log that was made elsewhere as one of this trial's."""
        self._driver_logs.append(log)

    async def read_back(self, up: Up, patience_s: float = 60.0) -> None:
        """Have a driver read the list of all runs once it shows that all have ended."""
        log = self.folder / f"read-{len(self._driver_logs) + 1}.jsonl"
        accepted = [str(path) for path in self._driver_logs]
        self._driver_logs.append(log)
        plan = ReadBack(
            url=up.url, token_file=str(up.data / "token"), log=str(log), accepted=accepted, patience_s=patience_s
        )
        async with self._process("driver", plan, "read"):
            pass

    async def check(
        self,
        up: Up | None = None,
        *,
        servers_file: Path | None = None,
        password_file: Path | None = None,
        expected: Mapping[str, Sequence[str]] | None = None,
        silent: Sequence[str] = (),
        patience_s: float = 60.0,
    ) -> Verdict:
        """Have a checker look at everything that is left, and return what it found."""
        run = None if up is None else up.data / "run"
        servers_file = servers_file or (run / "servers.json" if run is not None else None)
        password_file = password_file or (run / f"nats-{GATEWAY}.password" if run is not None else None)
        verdict = self.folder / "verdict.json"
        inquiry = Inquiry(
            servers_file=str(servers_file),
            password_file=str(password_file),
            driver_logs=[str(path) for path in self._driver_logs],
            ledger=str(self.ledger),
            verdict=str(verdict),
            expected={route: list(states) for route, states in (expected or {}).items()},
            silent=list(silent),
            patience_s=patience_s,
        )
        async with self._process("checker", inquiry):
            pass
        return read_plan(str(verdict), Verdict)

    # ------------------------------------------------------------ what was logged

    def lines(self) -> list[DriverLine]:
        """Return what all drivers logged so far."""
        return [line for path in self._driver_logs for line in read_lines(str(path), DriverLine)]

    def replies(self) -> list[Reply]:
        """Return all replies to triggers so far."""
        return [line for line in self.lines() if isinstance(line, Reply)]

    def hits(self) -> list[Hit]:
        """Return what the nemesis did so far."""
        return [hit for path in self._nemesis_logs for hit in read_lines(str(path), Hit)]

    def kills(self) -> int:
        """Return how many processes the nemesis killed so far."""
        return sum(hit.act == "kill" and hit.pid > 0 for hit in self.hits())

    # ------------------------------------------------------------ processes

    @asynccontextmanager
    async def _process(self, room: str, plan: Struct, *words: str) -> AsyncIterator[None]:
        """Run one room of this folder as a process of its own; it ends with the block, whatever happens there."""
        path = self.folder / f"{room}-{len(list(self.folder.glob(f'{room}-*.plan')))}.plan"
        write_plan(path, plan)
        said = path.with_suffix(".out")
        with said.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"infra.chaos.{room}", *words, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=tie_to(os.getpid()),
            )
        try:
            yield
            while process.poll() is None:
                await asyncio.sleep(STEP_S)
            if process.returncode != 0:
                raise Broken(
                    f"the {room} ended with {process.returncode}: {said.read_text(errors='replace')[-2000:]}",
                    hint="This says nothing about the platform; mend the trial.",
                )
        finally:
            if process.poll() is None:
                process.terminate()  # a nemesis lets what it paused go on
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
