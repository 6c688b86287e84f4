"""The client against a real platform: real servers, real workers, real children."""

from __future__ import annotations

import asyncio
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from headrace import AsyncClient, Client, Event, Run, function
from headrace.errors import BadRequest, Conflict, NotFound, RunCanceled, RunFailed, Unauthorized
from tests.platforms import UpProcess
from tests.processes import wait_until

USER_FILE = """
    import asyncio, json, time
    from headrace import Context, Event, function, on
    from client_helpers import scale

    @on(name="client_double", deadline="60s")
    @function(name="client_double", timeout="30s", retries=1)
    def double(x: int, ctx: Context) -> int:
        \"\"\"Twice x.\"\"\"
        ctx.log.info("doubling %d", x)
        return scale(x, 2)

    @on(name="client_echo")
    @function(name="client_echo")
    def echo(data, ctx: Context):
        return data

    @on(name="client_fail")
    @function(name="client_fail")
    def fail(x):
        raise ValueError("no peak in frame 7")

    @on(name="client_slow")
    @function(name="client_slow")
    async def slow(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "at last"

    @on(name="client_early")
    @function(name="client_early")
    def early(x: int, ctx: Context) -> None:
        ctx.answer("early")
        ctx.call("client_slow", 30.0)

    @on(type="prefix:org.example.client", name="client_events")
    @function(name="client_events")
    def events(event: Event) -> dict:
        return {"type": event.type, "subject": event.subject, "data": event.data}

    @on(name="client_bytes")
    @function(name="client_bytes")
    def reverse(data: bytes) -> bytes:
        return data[::-1]

    @on(name="client_staged")
    @function(name="client_staged")
    def staged(uri: str, ctx: Context) -> int:
        return len(ctx.stage(uri).read_bytes())
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for decoy in ("functions.py", "workers.py", "streams.py", "gateway.py", "infra.py", "tests.py"):
        (folder / decoy).write_text("raise RuntimeError('a decoy was imported')\n")
    (folder / "client_helpers.py").write_text("def scale(x, k): return x * k\n")
    (folder / "client_user.py").write_text(textwrap.dedent(USER_FILE))
    return folder / "client_user.py"


@pytest.fixture(scope="module")
def deployed(shared_platform: UpProcess, user_file: Path) -> UpProcess:
    with Client(shared_platform.url, shared_platform.token) as client:
        client.deploy(user_file)
    return shared_platform


@pytest.fixture
def client(deployed: UpProcess) -> Iterator[Client]:
    with Client(deployed.url, deployed.token) as made:
        yield made


# ---------------------------------------------------------------- functions and routes


def test_a_file_in_a_folder_of_decoys_is_deployed_with_its_routes_and_runs(client: Client, user_file: Path) -> None:
    views = client.deploy(user_file)
    assert [view.name for view in views][:2] == ["client_double", "client_echo"]
    assert (views[0].options.timeout, views[0].options.retries, views[0].doc) == ("30s", 1, "Twice x.")
    assert "def double(x: int" in views[0].source
    assert "client_double" in {view.name for view in client.functions()}
    routes = {view.name: view.route for view in client.routes()}
    assert routes["client_double"].deadline == "60s"
    assert client.trigger("client_double", 21).result(timeout=30) == 42


def test_deploying_the_same_file_again_gives_the_same_versions(client: Client, user_file: Path) -> None:
    assert [view.version for view in client.deploy(user_file)] == [view.version for view in client.deploy(user_file)]


def test_a_function_of_this_process_is_registered_by_value_with_what_it_closes_over(client: Client) -> None:
    factor = 3

    @function(name="client_closure")
    def scaled(x: int) -> int:
        return x * factor

    assert client.register(scaled).name == "client_closure"
    assert client.register(lambda x: x + 1, name="client_lambda").name == "client_lambda"
    client.route("client_closure", function=scaled)
    client.route("client_lambda", function="client_lambda", deadline="30s")
    assert client.trigger("client_closure", 5).result(timeout=30) == 15
    assert client.trigger("client_lambda", 5).result(timeout=30) == 6


def test_a_lambda_without_a_name_and_a_route_to_nowhere_are_refused(client: Client) -> None:
    with pytest.raises(BadRequest, match="not a valid function name"):
        client.register(lambda x: x)
    with pytest.raises(NotFound, match="nowhere"):
        client.route("client_nowhere", function="nowhere")
    with pytest.raises(BadRequest, match="deadline"):
        client.route("client_soon", function="client_echo", deadline="soon")


def test_sites_are_listed(client: Client) -> None:
    assert isinstance(client.sites(), list)


# ---------------------------------------------------------------- starting runs


def test_a_trigger_with_wait_comes_back_with_the_finished_run(client: Client) -> None:
    run = client.trigger("client_double", 4, wait=30)
    assert run.seen is not None
    assert (run.seen.state, run.seen.deadline_met) == ("succeeded", True)
    assert run.result() == 8


def test_a_wait_that_is_too_short_comes_back_with_a_run_that_goes_on(client: Client) -> None:
    run = client.trigger("client_slow", 30.0, wait=0.1)
    assert run.state in ("accepted", "running")
    with pytest.raises(TimeoutError, match="it goes on"):
        run.result(timeout=0.05)
    run.cancel()


def test_the_same_id_is_the_same_run_and_with_other_data_a_conflict(client: Client) -> None:
    key = uuid4().hex
    first, again = client.trigger("client_echo", 1, id=key), client.trigger("client_echo", 1, id=key)
    assert (first.run_id, first.duplicate, again.duplicate) == (again.run_id, False, True)
    with pytest.raises(Conflict):
        client.trigger("client_echo", 2, id=key)


def test_bytes_go_as_they_are_text_goes_as_json_or_as_it_is_called(client: Client) -> None:
    assert client.trigger("client_bytes", b"\0abc").result(timeout=30) == b"cba\0"
    assert client.trigger("client_echo", "text").result(timeout=30) == "text"
    assert client.trigger("client_echo", {"a": [1, None]}).result(timeout=30) == {"a": [1, None]}
    assert client.trigger("client_bytes", "<x/>", content_type="application/xml").result(timeout=30) == b">/x<"
    assert client.trigger("client_echo").result(timeout=30) is None


@pytest.mark.parametrize("deadline", ["90s", 90.0, datetime.now(UTC) + timedelta(days=1)])
def test_a_deadline_may_be_a_duration_seconds_or_an_instant(client: Client, deadline: str | float | datetime) -> None:
    run = client.trigger("client_double", 1, deadline=deadline)
    assert run.deadline is not None
    assert run.ended().deadline_met is True


def test_an_unknown_route_a_wrong_token_and_an_odd_name_are_told(client: Client, deployed: UpProcess) -> None:
    with pytest.raises(NotFound, match="nowhere") as caught:
        client.trigger("nowhere", 1)
    assert caught.value.hint
    with pytest.raises(BadRequest, match="not a valid route name"):
        client.trigger("../v1", 1)
    with Client(deployed.url, "wrong") as other, pytest.raises(Unauthorized):
        other.runs()


def test_events_start_runs_one_by_one_and_as_a_batch(client: Client) -> None:
    def event(kind: str, data: object) -> Event:
        return Event(id=uuid4().hex, source="/tests/client", type=kind, subject="s", data=data)

    (run,) = client.publish(event("org.example.client.one", {"a": 1}))
    assert run.result(timeout=30) == {"type": "org.example.client.one", "subject": "s", "data": {"a": 1}}
    raw = {"specversion": "1.0", "id": uuid4().hex, "source": "/s", "type": "org.example.client.raw", "data": 5}
    runs = client.publish([event("org.example.client.two", "text"), event("org.example.unheard", 1), raw])
    assert [run.result(timeout=30)["data"] for run in runs] == ["text", 5]
    assert client.publish(event("org.example.unheard", 1)) == []


# ---------------------------------------------------------------- runs


def test_a_failed_run_raises_with_the_kind_and_the_frames_of_the_users_code(client: Client) -> None:
    run = client.trigger("client_fail", 1)
    with pytest.raises(RunFailed, match="ValueError: no peak in frame 7") as caught:
        run.result(timeout=30)
    assert (caught.value.kind, caught.value.reason) == ("user", "ValueError: no peak in frame 7")
    assert caught.value.run_id == run.run_id
    assert 'raise ValueError("no peak in frame 7")' in caught.value.traceback
    assert "headrace" not in caught.value.traceback
    assert run.state == "failed"


def test_a_canceled_run_raises_and_canceling_twice_is_one_wish(client: Client) -> None:
    run = client.trigger("client_slow", 60.0)
    run.cancel()
    client.cancel(run.run_id)
    with pytest.raises(RunCanceled, match="was canceled"):
        run.result(timeout=30)
    ended = client.trigger("client_double", 1, wait=30)
    wait_until(lambda: client.run(ended.run_id).state == "succeeded")  # readable everywhere within a moment
    with pytest.raises(Conflict, match="succeeded already"):
        ended.cancel()


def test_an_answer_given_early_is_there_before_the_run_has_ended(client: Client) -> None:
    run = client.trigger("client_early", 1)
    assert run.result(timeout=30) == "early"
    assert run.state == "running"
    run.cancel()


def test_a_run_is_followed_from_its_acceptance_to_its_end_and_from_any_point(client: Client) -> None:
    run = client.trigger("client_double", 6)
    events = list(run.follow())
    assert (events[0].kind, events[0].data["state"]) == ("run", "accepted")
    assert (events[-1].kind, events[-1].data["state"]) == ("run", "succeeded")
    assert "doubling 6" in [event.data["text"] for event in events if event.kind == "log"]
    rest = list(run.follow(after=events[2].seq))
    assert 0 < len(rest) < len(events)
    assert rest == events[-len(rest) :]


def test_all_runs_are_streamed_as_they_happen(client: Client) -> None:
    seen: list[str] = []
    heard = threading.Event()

    def listen() -> None:
        for event in client.stream():
            seen.append(str(event.data.get("run_id")))
            heard.set()
            if event.data.get("state") == "succeeded" and event.data["run_id"] in mine:
                return

    mine: list[str] = []
    thread = threading.Thread(target=listen)
    thread.start()
    while not heard.is_set():  # until the stream stands, nothing that was sent has to be on it
        client.trigger("client_echo", 1)
        heard.wait(0.05)
    mine.append(client.trigger("client_echo", 1).run_id)
    thread.join(30)
    assert mine[0] in seen


def test_runs_are_listed_newest_first_by_state_by_route_and_by_time(client: Client) -> None:
    before = datetime.now(UTC)
    made = [client.trigger("client_double", n, wait=30).run_id for n in range(5)]

    def newest() -> list[Run]:
        return client.runs(route="client_double", state="succeeded", since=before, limit=1000)

    wait_until(lambda: len(newest()) == 5)  # a list is of the read model, which is a moment behind
    found = newest()
    assert [run.run_id for run in found] == made[::-1]
    assert [run.run_id for run in client.runs(route="client_double", limit=2)] == made[:2:-1]
    assert all(run.seen is not None and run.seen.route == "client_double" for run in found)
    assert client.runs(since=datetime.now(UTC) + timedelta(days=1)) == []
    assert client.run(made[0]).route == "client_double"
    with pytest.raises(NotFound):
        client.run("nowhere")


def test_large_data_is_uploaded_and_staged_by_its_uri(client: Client, tmp_path: Path) -> None:
    (tmp_path / "frame").write_bytes(b"x" * 3_000_000)
    uri = client.upload(tmp_path / "frame", content_type="application/x-frame")
    assert client.trigger("client_staged", uri).result(timeout=30) == 3_000_000
    assert client.upload(b"x" * 3_000_000) == uri
    assert client.trigger("client_staged", client.upload(b"")).result(timeout=30) == 0


def test_one_client_serves_many_threads(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: client.trigger("client_double", n).result(timeout=60), range(40)))
    assert found == [2 * n for n in range(40)]


async def test_the_async_client_has_the_same_methods_as_coroutines(deployed: UpProcess, user_file: Path) -> None:
    async with AsyncClient(deployed.url, deployed.token) as client:
        assert (await client.deploy(user_file))[0].name == "client_double"
        runs = await asyncio.gather(*(client.trigger("client_double", n) for n in range(10)))
        assert await asyncio.gather(*(run.result(timeout=30) for run in runs)) == [2 * n for n in range(10)]
        assert await runs[0].state() == "succeeded"
        assert [event.kind async for event in runs[0].follow()][-1] == "run"
        assert {"client_double"} <= {view.name for view in await client.routes()}
    plain = {name for name in vars(Client) if not name.startswith("_")} - {"url"}
    assert plain <= {name for name in vars(AsyncClient) if not name.startswith("_")}


def test_a_client_waits_for_a_platform_that_starts_again(tmp_path: Path, user_file: Path) -> None:
    first = UpProcess(tmp_path / "headrace", "--workers", "1")
    second: UpProcess | None = None
    try:
        port = first.wait_ready().url.rpartition(":")[2]
        with Client(first.url, first.token, patience_s=60.0) as client:
            client.deploy(user_file)
            run = client.trigger("client_slow", 1.0)
            waiting = ThreadPoolExecutor(1).submit(run.result, 60)
            first.kill()
            second = UpProcess(tmp_path / "headrace", "--workers", "1", "--port", port)
            after = client.trigger("client_double", 2)
            assert waiting.result(60) == "at last"
            assert after.result(timeout=60) == 4
    finally:
        first.end()
        if second is not None:
            second.end()


def test_waiting_costs_no_time_when_the_answer_is_there(client: Client) -> None:
    run = client.trigger("client_double", 2, wait=30)
    began = time.monotonic()
    assert run.result(timeout=0) == 4
    assert time.monotonic() - began < 30
