"""Real servers for the tests, each on its own free port and in its own folder, and gone when the test is over."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from redis.asyncio import Redis

from headrace import cli
from infra.embedded import NatsServer, RedisServer
from infra.programs import NoServer
from infra.rgw import INSTALL, Rgw, is_installed
from infra.rights import ADMIN
from infra.slurm.cluster import Cluster
from infra.slurm.layout import Shape
from streams import topology
from streams.link import Link, open_link
from streams.log import Log
from tests.commands import Ran, Run
from tests.doors import Door, Doors
from tests.platforms import UpProcess
from tests.pools import Runs, pool_of

# What cannot be installed: a right that this user has or has not. Only a skip that says so is let pass under CI.
NOT_PERMITTED = "not permitted here"
CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
TEST_S_MAX = 180.0


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that needs the machine for itself wait until the other workers of pytest-xdist pause."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder: Path = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined] # that of all workers
    alone = item.get_closest_marker("alone") is not None
    # Whoever wants to be alone keeps the door shut meanwhile, or the others would go on one after the other.
    with held(folder / "door", alone=True) as door, held(folder / "room", alone=alone):
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@contextmanager
def held(file: Path, *, alone: bool) -> Iterator[int]:
    """Hold a lock between processes, for oneself or together with others."""
    opened = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield opened
    finally:
        os.close(opened)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Let a test that hangs fail, and the others go on."""

    def too_long(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"still running after {TEST_S_MAX:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, TEST_S_MAX)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure under CI: there, everything that a test needs has to be installed."""
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail") and NOT_PERMITTED not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Hold whole files to the same rule."""
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no setting of the developer's shell reach a test."""
    for name in list(os.environ):
        if name.startswith("HEADRACE_"):
            monkeypatch.delenv(name)


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real nats-server with JetStream, synced, with the users and rights that ``headrace up`` gives it."""
    server = NatsServer(tmp_path / "headrace")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def redis_server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A real redis-server with a password."""
    server = RedisServer(tmp_path / "headrace")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def link(nats_server: NatsServer) -> AsyncIterator[Link]:
    """A connection with full rights to a log whose stream, lanes and tables exist."""
    opened = await open_link(nats_server.url, user=ADMIN, password=nats_server.password(ADMIN), name="test")
    await topology.ensure(opened, topology.Limits())
    yield opened
    await opened.close()


@pytest.fixture
async def log(link: Link) -> AsyncIterator[Log]:
    """An empty log, ready to append to."""
    opened = Log(link)
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of an empty redis-server."""
    client = Redis.from_url(redis_server.url, password=redis_server.password)
    yield client
    await client.aclose()


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    """Opens gateways with limits of the test's own."""
    async with Doors(tmp_path) as found:
        yield found


@pytest.fixture
async def door(doors: Doors) -> Door:
    """A gateway on which the route ``r`` leads to the function ``f``."""
    opened = await doors.open()
    await opened.deploy()
    return opened


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rgw]:
    """A real S3 server for all tests that make a bucket, or a prefix, of their own; it takes 15 s to start."""
    if not is_installed():
        pytest.skip(f"Ceph's RADOS Gateway is not installed: {INSTALL}")
    with Rgw(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
async def runs(tmp_path: Path) -> AsyncIterator[Runs]:
    """Two children of a pool that run texts as functions, without a platform."""
    async with pool_of(tmp_path) as made:
        yield made


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    return call


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[UpProcess]:
    """A whole platform of its own, started with ``headrace up`` and ready: ``url``, ``token``, ``data``, ``pid``."""
    process = UpProcess(tmp_path / "headrace")
    try:
        yield process.wait_ready()
    finally:
        process.end()


@pytest.fixture(scope="session")
def shared_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """One platform for all tests that only add to it: names and ids of their own, nothing stopped or killed."""
    process = UpProcess(tmp_path_factory.mktemp("shared") / "headrace")
    try:
        yield process.wait_ready()
    finally:
        process.end()


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of three nodes with four GPUs each; it is gone with this process, however that ends."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start(tied=True)
    except NoServer as error:
        pytest.skip(f"needs Slurm: {error}")
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The Slurm of this session, idle and whole at the beginning and at the end."""
    slurm_cluster.mend()
    yield slurm_cluster
    slurm_cluster.mend()


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory, slurm_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that forgets ended jobs at once."""
    cluster = Cluster(tmp_path_factory.mktemp("forgetful"), Shape(nodes=1, gpus=0, finished_kept_s=2))
    cluster.start(tied=True)
    yield cluster
    cluster.stop()
