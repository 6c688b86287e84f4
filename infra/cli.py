"""The server commands: ``up``, ``demo``, ``doctor``, ``setup``, ``tenant``, ``site``, ``replay``, and each server.

Exit codes are those of ``headrace``: 0 good, 1 something was found or failed, 2 wrong usage, 3 the platform does not
answer, or a server that it needs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

from cyclopts import App, CycloptsError, Parameter

from headrace.errors import BadRequest, Conflict, HeadraceError, NotFound
from infra import rights, telemetry
from infra.locking import InUse
from infra.settings import BadSetting, Settings, load

if TYPE_CHECKING:
    from infra.tenants import Admin

T = TypeVar("T")

WRONG_USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130
REFUSED = (BadSetting, BadRequest, InUse, Conflict, NotFound)

app = App(
    name="headrace",
    help="The servers of Headrace. Settings come from HEADRACE_CONFIG and HEADRACE_*.",
    version_flags=[],
)

Port = Annotated[int | None, Parameter(help="Port of the gateway; 0 takes a free one. Default: 8080.")]
Data = Annotated[Path | None, Parameter(help="Folder for everything that is kept. Default: ./.headrace.")]
Workers = Annotated[int | None, Parameter(help="Functions that run at a time. Default: one per core.")]


Pilot = Annotated[bool, Parameter(negative="", help="It runs in an allocation, whose end Slurm is asked for.")]
Until = Annotated[str | None, Parameter(help='When that ends: an RFC 3339 instant, or "55m" from now.')]


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
        sys.exit(WRONG_USAGE if isinstance(error, REFUSED) else UNREACHABLE)
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
    *,
    stay: Annotated[bool, Parameter(negative="", help="Leave the platform up until Ctrl-C.")] = False,
    slurm: Annotated[bool, Parameter(negative="", help="Simulations in the queue of a Slurm of its own.")] = False,
    port: Port = 0,
) -> int:
    """Show the whole way on a platform of its own: real triggers in, the right answers out, before their deadlines.

    The exit code is 0 only if every answer was right and on time. Nothing is kept.
    """
    from infra import demo as demos
    from infra import demo_slurm
    from infra import up as platforms

    right: bool | None = None
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        settings = _settings(port=port, data_dir=folder)

        async def serve(platform: platforms.Platform) -> None:
            nonlocal right
            if slurm:
                right = await demo_slurm.demo_slurm(platform, Path(folder) / "lab")
            else:
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
def worker(*, data: Data = None, workers: Workers = None, pilot: Pilot = False, until: Until = None) -> None:
    """Run one worker, configured by file and environment.

    With --pilot it runs in an allocation of a batch system: it begins only what is over before that ends, drains, and
    leaves the rest to others.
    """
    from infra import services

    ends_at = _ends_at(pilot=pilot, until=until)
    services.run(rights.WORKER, load(os.environ, data_dir=data, worker_slots=workers, ends_at=ends_at))


@app.command
def ledger(*, data: Data = None) -> None:
    """Run the writer of the read model, configured by file and environment. One is enough."""
    from infra import services

    services.run(rights.LEDGER, load(os.environ, data_dir=data))


@app.command
def agent(
    *,
    site: Annotated[str | None, Parameter(help="Name of the site, as in the file.")] = None,
    config: Annotated[Path | None, Parameter(help="TOML file that describes the site.")] = None,
    data: Data = None,
    pilot: Pilot = False,
    until: Until = None,
) -> None:
    """Run the agent of one site: it submits the site's jobs to its batch system, and tells how they end.

    It connects out to the log's servers (HEADRACE_NATS_URL) and takes no connections. Without a file, the site is this
    machine. Jobs go on when it stops; the next one attaches to them. With --pilot the site is an allocation of a batch
    system, which gets only jobs that are over before it ends.
    """
    from infra import services
    from infra import site as sites

    ends_at = _ends_at(pilot=pilot, until=until)
    settings = load(os.environ, data_dir=data, site=site, site_config=config, ends_at=ends_at)
    sites.site_of(settings)  # what is wrong with it is told here and not in a log
    services.run(rights.AGENT, settings)


def _ends_at(*, pilot: bool, until: str | None) -> float | None:
    """Return the epoch second at which the allocation ends that this process runs in; None where it is in none."""
    from infra import allocation

    return allocation.ends_at(until, os.environ, time.time()) if pilot or until is not None else None


@app.command
def setup() -> None:
    """Make the stream, its lanes and the tables on the servers of HEADRACE_NATS_URL. Safe to repeat.

    Needed once before gateways and workers use servers of your own; `headrace up` does it by itself.
    """
    from infra import services

    asyncio.run(services.setup(load(os.environ)))
    print("The log is set up.")


@app.command
def replay(
    *,
    since: Annotated[str | None, Parameter(help='From when on: "24h" ago, or an RFC 3339 instant.')] = None,
    until: Annotated[str | None, Parameter(help="Up to when, likewise; now if it is not given.")] = None,
    policy: Annotated[str, Parameter(help="headrace, edf, fifo or priority.")] = "headrace",
    slots: Annotated[int | None, Parameter(help="How many run at a time; as many as did if not given.")] = None,
    save: Annotated[Path | None, Parameter(help="Keep the records in this file.")] = None,
    from_: Annotated[Path | None, Parameter(name="--from", help="Take the records from such a file.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")] = False,
) -> None:
    """Run nothing, and report what the past would have been under another policy (`headrace replay --simulate`).

    The records come from the platform of HEADRACE_URL, or from a file. The same records give the same report.
    """
    from infra import replaying

    report = asyncio.run(replaying.replay(since, until, policy, slots=slots, save=save, kept=from_))
    print(replaying.as_json(report) if as_json else replaying.as_text(report))


tenant = App(name="tenant", help="Who shares the platform. Needs the admin's rights on the log's servers.")
app.command(tenant)

TenantName = Annotated[str, Parameter(help="Name: 1 to 64 letters, digits, underscores or hyphens.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


@tenant.command(name="add")
def add_tenant(name: TenantName, /, *, data: Data = None) -> None:
    """Add a tenant and print its token: shown this once, and kept nowhere.

    Run it beside a `headrace up` on the same data folder, or with the settings of servers of your own.
    """
    token = _administer(data, lambda admin: admin.add(name))
    _print_token(name, token)


@tenant.command(name="list")
def list_tenants(*, data: Data = None, as_json: AsJson = False) -> None:
    """List the tenants: how many tokens each has, and how much of its work waits or runs."""
    from infra import tenants

    found = _administer(data, lambda admin: admin.list())
    print(tenants.as_json(found) if as_json else tenants.as_text(found))


@tenant.command(name="token")
def new_token(
    name: TenantName,
    /,
    *,
    revoke: Annotated[bool, Parameter(negative="", help="All its tokens before this one are good no longer.")] = False,
    data: Data = None,
) -> None:
    """Make another token of a tenant and print it; those before it stay good until --revoke."""
    token = _administer(data, lambda admin: admin.new_token(name, revoke=revoke))
    _print_token(name, token)


@tenant.command(name="remove")
def remove_tenant(
    name: TenantName,
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Cancel its runs that have not ended.")] = False,
    data: Data = None,
) -> None:
    """Remove a tenant with its tokens, routes and functions; refused while work of it waits or runs.

    Its runs stay in the log for as long as that keeps things, and whoever gets its name again sees them.
    """
    gone = _administer(data, lambda admin: admin.remove(name, force=force))
    print(
        f"{name} is removed, with {gone.routes} routes and {gone.functions} functions"
        + (f"; {gone.canceled:,} runs were canceled." if gone.canceled else ".")
    )


def _administer(data: Path | None, act: Callable[[Admin], Awaitable[T]]) -> T:
    from infra import tenants

    async def run() -> T:
        async with tenants.administration(load(os.environ, data_dir=data)) as admin:
            return await act(admin)

    return asyncio.run(run())


def _print_token(name: str, token: str) -> None:
    """Print a token by itself, so that a script can take it; what is said beside it goes elsewhere."""
    print(token, flush=True)
    print(f"This is a token of {name}. It is shown only now: keep it as HEADRACE_TOKEN.", file=sys.stderr)


site = App(name="site", help="The sites that run jobs. Needs the admin's rights on the log's servers.")
app.command(site)


@site.command(name="user")
def site_user(
    name: Annotated[str, Parameter(help="Name of the site, as its agent will give it.")],
    /,
    *,
    moves: Annotated[
        bool, Parameter(negative="", help="It may hand jobs on to other sites, as --pilot does before its end.")
    ] = False,
    exports: Annotated[bool, Parameter(negative="", help="Print instead what the platform's account lends.")] = False,
    data: Data = None,
) -> None:
    """Make the user agent-NAME on the log's servers, whose password is all that the agent of a site needs there.

    The password is kept in DIR/sites. A `headrace up` on the same folder knows the user within two seconds. For servers
    of your own its account is printed, for their configuration; print it anew once the tenants have changed.
    """
    from infra import siteusers, tenants

    if exports:
        print(siteusers.exports(), end="")
        return
    given = load(os.environ, data_dir=data)
    settings = tenants.of_running_platform(given)
    path = siteusers.kept(given.data_dir, name, moves=moves)
    print(f"The password of {rights.agent_user(name)} is in {path}.", file=sys.stderr)
    if settings is given:  # else the platform that runs looks into its folder by itself
        print(asyncio.run(siteusers.account(settings, siteusers.user(path))), end="")


@site.command(name="remove")
def remove_site(
    name: Annotated[str, Parameter(help="Name of the site, as `headrace sites` shows it.")],
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Take its jobs from it: to other sites, or they fail.")] = False,
    data: Data = None,
) -> None:
    """Remove a site that is no more; refused while its agent is heard, or while it has jobs.

    With --force jobs that have not begun go to other sites. Those that were submitted there are lost: they are tried
    again elsewhere, as often as they may be, and what the site still runs of them is not stopped.
    """
    from infra import removal

    async def run() -> removal.JobsThere:
        async with removal.removal(load(os.environ, data_dir=data)) as remover:
            return await remover.remove(name, force=force)

    had = asyncio.run(run())
    jobs = had.waiting + had.submitted
    print(f"{name} is removed" + (f"; {jobs:,} jobs were taken from it." if jobs else "."))


@app.command
def doctor(*, data: Data = None, as_json: AsJson = False) -> int:
    """Look for what is wrong: versions, ports, disk, clock, the log's sync_interval, rights of files.

    Each finding says its cure. The exit code is 1 if something has to be mended.
    """
    from infra import doctor as doctors

    findings = asyncio.run(doctors.examine(load(os.environ, data_dir=data)))
    print(doctors.as_json(findings) if as_json else doctors.as_text(findings))
    return int(any(finding.state == "failed" for finding in findings))
