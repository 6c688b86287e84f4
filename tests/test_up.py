"""``headrace up``: one command, six servers, ready when it says so, and nothing left when it is gone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra import up
from infra.settings import load
from infra.staging import Staging
from tests.platforms import UpProcess
from tests.processes import alive, command_line, descendants, wait_until


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _status(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def _infra(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a server command that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "infra", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[list[UpProcess]]:
    """Platforms that a test starts by itself, to be ended whatever happens."""
    started: list[UpProcess] = []
    yield started
    for process in started:
        process.end()


# ---------------------------------------------------------------- ready


def test_when_the_url_is_written_triggers_are_taken(shared_platform: UpProcess) -> None:
    assert _status(f"{shared_platform.url}/readyz") == 200
    assert _status(f"{shared_platform.url}/v1/runs", shared_platform.token) == 200
    assert _status(f"{shared_platform.url}/v1/runs", "guess") == 401


def test_url_and_token_are_files_for_their_owner_alone(shared_platform: UpProcess) -> None:
    assert _mode(shared_platform.data / "token") == _mode(shared_platform.data / "url") == 0o600
    assert _mode(shared_platform.data) == 0o700
    assert (shared_platform.data / "url").read_text() == f"{shared_platform.url}\n"


def test_it_says_where_it_is_and_does_not_print_the_token_into_a_file(shared_platform: UpProcess) -> None:
    wait_until(lambda: "Ctrl-C" in shared_platform.output())
    assert shared_platform.url in shared_platform.output()
    assert shared_platform.token not in shared_platform.output()


def test_it_runs_the_six_processes_and_no_secret_is_in_their_command_lines_or_logs(shared_platform: UpProcess) -> None:
    for what in ("nats-server", "redis-server", "gateway", "worker", "ledger", "agent"):
        shared_platform.child(what)
    secrets = [
        shared_platform.token,
        *(p.read_text().strip() for p in (shared_platform.data / "run").glob("*.password")),
    ]
    assert len(secrets) == 8
    for pid in (shared_platform.pid, *descendants(shared_platform.pid)):
        shown = command_line(pid)
        environ = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace")
        assert not [secret for secret in secrets if secret in shown or secret in environ]
    logs = "".join(path.read_text() for path in (shared_platform.data / "logs").iterdir())
    assert not [secret for secret in secrets if secret in logs]


def test_the_servers_log_lines_are_json_objects(shared_platform: UpProcess) -> None:
    for role in ("gateway", "worker", "ledger", "agent"):
        path = shared_platform.data / "logs" / f"{role}.log"
        assert _mode(path) == 0o600
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert "ready" in [line["event"] for line in lines]
        assert {line["role"] for line in lines} == {role}


# ---------------------------------------------------------------- stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_with_exit_code_0(platform: UpProcess, number: int) -> None:
    staging = Staging(str(platform.data)).folder
    assert platform.stop(number) == 0
    assert not (platform.data / "url").exists()
    assert (platform.data / "token").exists()
    assert not staging.exists()
    assert list((platform.data / "scratch").iterdir()) == []


def test_a_signal_while_it_starts_stops_everything(tmp_path: Path, starting: list[UpProcess]) -> None:
    process = UpProcess(tmp_path / "headrace")
    starting.append(process)
    process.child("nats-server")
    assert process.stop() == 0
    assert not (process.data / "url").exists()


async def test_a_signal_that_a_start_did_not_hear_stops_what_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Deaf(up.Platform):
        async def start(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        async def stop(self) -> None:
            done.append("stopped")

    async def serve(platform: up.Platform) -> None:
        done.append("served")

    monkeypatch.setattr(up, "Platform", Deaf)
    await up.up(load({}, data_dir=tmp_path), serve)
    assert done == ["stopped"]


def test_nothing_is_left_when_it_is_killed(platform: UpProcess) -> None:
    platform.kill()


def test_nothing_is_left_when_it_is_killed_while_it_starts(tmp_path: Path, starting: list[UpProcess]) -> None:
    process = UpProcess(tmp_path / "headrace")
    starting.append(process)
    process.child("nats-server")
    process.kill()


def test_it_starts_again_on_its_folder_after_a_kill_with_the_same_token(
    platform: UpProcess, starting: list[UpProcess]
) -> None:
    token = platform.token
    platform.kill()
    again = UpProcess(platform.data)
    starting.append(again)
    again.wait_ready()
    assert again.token == token
    assert _status(f"{again.url}/v1/runs", token) == 200


# ---------------------------------------------------------------- restart


@pytest.fixture(scope="module")
def sturdy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """One platform whose processes are killed one after the other."""
    process = UpProcess(tmp_path_factory.mktemp("sturdy") / "headrace")
    try:
        yield process.wait_ready()
    finally:
        process.end()


@pytest.mark.parametrize("what", ["gateway", "worker", "ledger", "agent", "nats-server", "redis-server"])
def test_a_process_that_is_killed_is_started_again(sturdy: UpProcess, what: str) -> None:
    pid = sturdy.child(what)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    wait_until(lambda: f"process is back process={what}" in sturdy.output())
    assert sturdy.child(what) != pid
    wait_until(lambda: _status(f"{sturdy.url}/v1/runs", sturdy.token) == 200)
    wait_until(lambda: _status(f"{sturdy.url}/readyz") == 200)


def test_callers_wait_instead_of_being_refused_while_the_gateway_is_started_again(sturdy: UpProcess) -> None:
    pid = sturdy.child("gateway")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert _status(f"{sturdy.url}/livez") == 200


# ---------------------------------------------------------------- refusals


def test_a_second_one_on_the_same_folder_is_refused_and_does_no_harm(shared_platform: UpProcess) -> None:
    refused = _infra("up", "--port", "0", "--data", str(shared_platform.data))
    assert refused.returncode == 2
    assert f"process {shared_platform.pid}" in refused.stderr
    assert "--data" in refused.stderr
    assert _status(f"{shared_platform.url}/readyz") == 200


def test_a_port_that_is_taken_is_told_with_its_cure(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = _infra("up", "--port", str(port), "--data", str(tmp_path / "headrace"))
    assert refused.returncode == 2
    assert f"port {port}" in refused.stderr
    assert "--port 0" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "headrace" / "url").exists()


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["up", "--prt", "0"], {}, "--port"),
        (["up", "--port", "many"], {}, "many"),
        (["up", "--port", "70000"], {}, "65535"),
        (["up"], {"HEADRACE_PRT": "1"}, "HEADRACE_PORT"),
        (["up"], {"HEADRACE_LOG_KEEP_S": "forever"}, "HEADRACE_LOG_KEEP_S"),
        (["up"], {"HEADRACE_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
        (["upp"], {}, "upp"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_names_what_is_wrong(
    arguments: list[str], env: dict[str, str], said: str
) -> None:
    refused = _infra(*arguments, **env)
    assert refused.returncode == 2
    assert said in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_server_that_cannot_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    data = tmp_path / "headrace"
    (data / "nats").mkdir(parents=True)
    (data / "nats" / "jetstream").write_text("not a folder")
    refused = _infra("up", "--port", "0", "--data", str(data))
    assert refused.returncode == 3
    assert "nats-server ended" in refused.stderr
    assert "Traceback" not in refused.stderr


# ---------------------------------------------------------------- doctor


def test_the_doctor_finds_a_running_platform_well(shared_platform: UpProcess) -> None:
    looked = _infra("doctor", "--data", str(shared_platform.data), "--json")
    findings = {finding["check"]: finding for finding in json.loads(looked.stdout)["findings"]}
    assert {
        "python",
        "processes",
        "nats-server",
        "disk",
        "rights",
        "platform",
        "site",
        "sync_interval",
        "clock",
    } <= set(findings)
    assert "local (local) is up" in findings["site"]["detail"]
    assert {f["check"] for f in findings.values() if f["state"] == "failed"} == set()
    assert looked.returncode == 0
    assert shared_platform.token not in looked.stdout


def test_the_doctor_names_the_cure_for_a_token_that_others_can_read(platform: UpProcess) -> None:
    (platform.data / "token").chmod(0o644)
    looked = _infra("doctor", "--data", str(platform.data))
    assert looked.returncode == 1
    assert f"chmod 600 {platform.data / 'token'}" in looked.stdout


def test_the_doctor_names_a_platform_that_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("http://127.0.0.1:1\n")
    looked = _infra("doctor", "--data", str(tmp_path))
    assert looked.returncode == 1
    assert "headrace up" in looked.stdout


def test_the_doctor_names_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        looked = _infra("doctor", "--data", str(tmp_path), HEADRACE_PORT=str(taken.getsockname()[1]))
    assert looked.returncode == 1
    assert "--port 0" in looked.stdout
