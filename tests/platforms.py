"""``headrace up`` as a process of its own, as a user starts it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.processes import alive, descendants, wait_until

READY_S = 60.0
STOP_S = 60.0

_numbers = itertools.count(1)


class UpProcess:
    """One ``headrace up`` and what it started. ``stop`` and ``kill`` check that nothing of it is left."""

    def __init__(self, data: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        """Start it on a free port, or the one in the options, without waiting for anything."""
        self.data = data
        self.said = data.parent / f"{data.name}-{next(_numbers)}.out"
        port = () if "--port" in options else ("--port", "0")
        environ = {name: text for name, text in os.environ.items() if not name.startswith("HEADRACE_")}
        with self.said.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "infra", "up", *port, "--data", str(data), *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environ, **(env or {})},
            )

    @property
    def pid(self) -> int:
        """The id of the supervisor."""
        return self.process.pid

    @property
    def url(self) -> str:
        """Where the gateway is; empty while the platform is not ready."""
        try:
            return (self.data / "url").read_text().strip()
        except FileNotFoundError:
            return ""

    @property
    def token(self) -> str:
        """The bearer token."""
        return (self.data / "token").read_text().strip()

    def wait_ready(self) -> UpProcess:
        """Return once the platform is ready."""
        # Not the file DIR/url: one that was killed leaves its own behind until the next one has begun.
        wait_until(lambda: "is ready" in self.output() or self.process.poll() is not None, READY_S)
        assert self.process.poll() is None, f"headrace up ended: {self.output()}"
        return self

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.said.read_text()

    def child(self, what: str) -> int:
        """Return the id of one of its processes, found by a word of its command line."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            for pid in descendants(self.pid):
                words = _words(pid)
                if any(word == what or word.endswith("/" + what) for word in words) or words[:1] == [what]:
                    return pid
            time.sleep(0.01)
        raise AssertionError(f"no process called {what}")

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ask it to stop and return its exit code."""
        family = [self.pid, *descendants(self.pid)]
        self.process.send_signal(number)
        code = self.process.wait(STOP_S)
        left = [pid for pid in family if alive(pid)]
        assert not left, f"still running: {[(pid, _words(pid)) for pid in left]}"
        return code

    def kill(self) -> None:
        """Kill the supervisor, as the kernel does when memory runs out; all it started has to go with it."""
        family = descendants(self.pid)
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not any(alive(pid) for pid in family))

    def end(self) -> None:
        """Stop it if it still runs; for the end of a test."""
        if self.process.poll() is None:
            code = self.stop()
            assert code == 0, f"headrace up ended with {code}: {self.output()}"


def _words(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").split()
