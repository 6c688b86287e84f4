"""A pool of children on its own, without a platform: run a text as a function and see what comes of it."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.children import ChildLimits
from headrace.model import Code
from headrace.wire import JSON, Ask, EventMeta, Granted, Invoke, Returned, Said
from tests.processes import until
from workers.pool import Pool

MIB = 1024 * 1024
NOOP = "def run(data): return data"
PID = "import os\ndef run(data): return os.getpid()"
STUBBORN = """
    import os, signal, subprocess, sys, time
    def run(data):
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        away = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(3600)"
        escaped = subprocess.Popen(
            [sys.executable, "-c", "import os\\nif os.fork() == 0:\\n    " + away], stdout=subprocess.PIPE, text=True)
        daemon = int(escaped.stdout.readline())
        escaped.wait()
        near = subprocess.Popen(["sleep", "3600"])
        with open(data, "w") as file:
            file.write(f"{os.getpid()} {near.pid} {daemon} ")
        time.sleep(3600)
    """


class Runs:
    """A pool, and what its functions said."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.heard: list[tuple[str, str]] = []
        self.progress: list[tuple[float, str]] = []
        self.asked: list[Ask] = []
        self.grant: Granted | Exception = Granted(value="/data/file")
        self.loads = 0

    async def run(
        self,
        text: str,
        data: Any = None,
        *,
        name: str = "run",
        version: str = "",
        timeout_s: float = 30.0,
        kind: str = JSON,
        body: bytes | None = None,
        event: EventMeta | None = None,
        files: dict[str, str] | None = None,
        heard: list[tuple[str, str]] | None = None,
        tenant: str = "",
    ) -> Returned:
        text = textwrap.dedent(text)
        listen = self.heard if heard is None else heard

        async def code() -> Code:
            self.loads += 1
            return Code(kind="source", module="shot", name=name, files={**(files or {}), "shot.py": text})

        async def ask(what: Ask) -> Granted:
            self.asked.append(what)
            if isinstance(self.grant, Exception):
                raise self.grant
            return self.grant

        def said(what: Said) -> None:
            if what.fraction is None:
                listen.append((what.level, what.text))
            else:
                self.progress.append((what.fraction, what.text))

        return await self.pool.run(
            Invoke(
                run_id="r1",
                invocation_id="i1",
                attempt=1,
                function=name,
                version=version or str(hash((text, tuple(sorted((files or {}).items()))))),
                type=kind,
                body=msgspec.json.encode(data) if body is None else body,
                event=event,
                tenant=tenant,
            ),
            code,
            timeout_s=timeout_s,
            on_said=said,
            on_line=lambda stream, line: listen.append((stream, line)),
            on_ask=ask,
        )

    async def value(self, text: str, data: Any = None, **more: Any) -> Any:
        return msgspec.json.decode((await self.run(text, data, **more)).result.body)


@contextlib.asynccontextmanager
async def pool_of(
    folder: Path, slots: int = 2, *, use_groups: bool = True, disk_bytes_min: int = 0, **limits: Any
) -> AsyncIterator[Runs]:
    pool = Pool(
        slots,
        limits=ChildLimits(**limits),
        scratch=folder / "scratch",
        use_groups=use_groups,
        disk_bytes_min=disk_bytes_min,
    )
    await pool.start()
    try:
        yield Runs(pool)
    finally:
        await pool.close()
        assert list((folder / "scratch").iterdir()) == []
        assert pool.processes == 0


async def grant_nothing(ask: Ask) -> Granted:
    return Granted()


async def pids_in(path: Path) -> list[int]:
    await until(lambda: path.exists() and path.read_text().endswith(" "))
    return [int(pid) for pid in path.read_text().split()]
