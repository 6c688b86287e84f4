"""The server commands: ``up``, ``demo``, ``doctor``, ``setup``, and ``gateway``, ``worker``, ``ledger`` by themselves.

Exit codes are those of ``headrace``: 0 good, 1 something was found or failed, 2 wrong usage, 3 the platform does not
answer, or a server that it needs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from headrace.errors import BadRequest, HeadraceError
from infra import rights, telemetry
from infra.locking import InUse
from infra.settings import BadSetting, Settings, load

WRONG_USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130

app = App(
    name="headrace",
    help="The servers of Headrace. Settings come from HEADRACE_CONFIG and HEADRACE_*.",
    version_flags=[],
)

Port = Annotated[int | None, Parameter(help="Port of the gateway; 0 takes a free one. Default: 8080.")]
Data = Annotated[Path | None, Parameter(help="Folder for everything that is kept. Default: ./.headrace.")]
Workers = Annotated[int | None, Parameter(help="Functions that run at a time. Default: one per core.")]


def main() -> NoReturn:
    """Run one command and end the process with its exit code."""
    try:
        code = app(exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(WRONG_USAGE)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        sys.exit(WRONG_USAGE if isinstance(error, BadSetting | BadRequest | InUse) else UNREACHABLE)
    sys.exit(code if isinstance(code, int) else 0)


@app.command
def up(*, port: Port = None, data: Data = None, workers: Workers = None) -> None:
    """Run the whole platform in this terminal until Ctrl-C.

    Starts nats-server, redis-server, the gateway, a worker and the read model's writer on loopback, and starts again
    what dies. What was accepted survives a stop, a kill and a restart. DIR/url and DIR/token are there once it is
    ready.
    """
    from infra import up as platforms

    settings = _settings(port=port, data_dir=data, worker_slots=workers)

    async def serve(platform: platforms.Platform) -> None:
        print(_welcome(platform.url, platform.token, settings), flush=True)
        await asyncio.Event().wait()

    asyncio.run(platforms.up(settings, serve))


@app.command
def demo(
    *, stay: Annotated[bool, Parameter(negative="", help="Leave the platform up until Ctrl-C.")] = False, port: Port = 0
) -> int:
    """Show the whole way on a platform of its own: real triggers in, the right answers out, before their deadlines.

    The exit code is 0 only if every answer was right and on time. Nothing is kept.
    """
    from infra import demo as demos
    from infra import up as platforms

    right: bool | None = None
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        settings = _settings(port=port, data_dir=folder)

        async def serve(platform: platforms.Platform) -> None:
            nonlocal right
            right = await demos.demo(platform.url, platform.token)
            if stay:
                print(_welcome(platform.url, platform.token, settings), flush=True)
                await asyncio.Event().wait()

        asyncio.run(platforms.up(settings, serve))
    return INTERRUPTED if right is None else int(not right)


def _settings(**options: object) -> Settings:
    """Read the settings of a command that starts the platform, and let its log lines be for a person."""
    settings = load(os.environ, **options)
    telemetry.configure(level=settings.log_level, role="headrace", terminal=True)
    return settings


def _welcome(url: str, token: str, settings: Settings) -> str:
    """Say where the platform is and how to use it. The token is shown to a person, and never written to a file."""
    shown = token if sys.stdout.isatty() else f"$(cat {settings.data_dir}/token)"
    near = settings.data_dir.absolute() == Path(".headrace").absolute()
    use = "" if near else f'  use    export HEADRACE_URL={url} HEADRACE_TOKEN="$(cat {settings.data_dir}/token)"\n'
    return (
        f"Headrace is ready: {url}\n"
        f"  page   {url}/#token={shown}\n"
        f"{use}"
        "  next   headrace deploy FILE.py, then headrace trigger ROUTE, and headrace watch\n"
        f"  kept   {settings.data_dir} (the log, results, the token; server logs in {settings.data_dir}/logs)\n"
        "  stop   Ctrl-C"
    )


@app.command
def gateway(*, port: Port = None, data: Data = None) -> None:
    """Run one gateway, configured by file and environment."""
    from infra import services

    services.run(rights.GATEWAY, load(os.environ, port=port, data_dir=data))


@app.command
def worker(*, data: Data = None, workers: Workers = None) -> None:
    """Run one worker, configured by file and environment."""
    from infra import services

    services.run(rights.WORKER, load(os.environ, data_dir=data, worker_slots=workers))


@app.command
def ledger(*, data: Data = None) -> None:
    """Run the writer of the read model, configured by file and environment. One is enough."""
    from infra import services

    services.run(rights.LEDGER, load(os.environ, data_dir=data))


@app.command
def setup() -> None:
    """Make the stream, its lanes and the tables on the servers of HEADRACE_NATS_URL. Safe to repeat.

    Needed once before gateways and workers use servers of your own; `headrace up` does it by itself.
    """
    from infra import services

    asyncio.run(services.setup(load(os.environ)))
    print("The log is set up.")


@app.command
def doctor(
    *, data: Data = None, as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")] = False
) -> int:
    """Look for what is wrong: versions, ports, disk, clock, the log's sync_interval, rights of files.

    Each finding says its cure. The exit code is 1 if something has to be mended.
    """
    from infra import doctor as doctors

    findings = asyncio.run(doctors.examine(load(os.environ, data_dir=data)))
    print(doctors.as_json(findings) if as_json else doctors.as_text(findings))
    return int(any(finding.state == "failed" for finding in findings))
