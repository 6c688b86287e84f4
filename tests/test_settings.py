"""Settings: read once, cast, and named in the error together with the cure."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from infra.credentials import BadSecretFile, kept_secret, read_secret, write_private
from infra.settings import GIB, BadSetting, Settings, env_name, environment, load, table


def test_without_anything_set_the_defaults_hold() -> None:
    assert load({}) == Settings()


def test_the_environment_wins_over_the_file_and_an_option_over_both(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text('port = 1\nhost = "0.0.0.0"\nworker_slots = 3\n')
    environ = {"HEADRACE_CONFIG": str(config), "HEADRACE_PORT": "2", "HEADRACE_WORKER_SLOTS": "4", "PATH": "/bin"}
    settings = load(environ, worker_slots=5, port=None)
    assert (settings.host, settings.port, settings.worker_slots) == ("0.0.0.0", 2, 5)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("HEADRACE_LOG_KEEP_S", "7d", "log_keep_s", 604800.0),
        ("HEADRACE_LOG_KEEP_S", "90", "log_keep_s", 90.0),
        ("HEADRACE_DRAIN_S", "500ms", "drain_s", 0.5),
        ("HEADRACE_CHILD_BYTES_MAX", "2GiB", "child_bytes_max", 2 * GIB),
        ("HEADRACE_CHILD_BYTES_MAX", "1000", "child_bytes_max", 1000),
        ("HEADRACE_LOG_BYTES_MAX", "1.5 GB", "log_bytes_max", 1_500_000_000),
        ("HEADRACE_DATA_DIR", "/data", "data_dir", Path("/data")),
        ("HEADRACE_PORT", " 80 ", "port", 80),
    ],
)
def test_durations_sizes_and_numbers_are_read_as_people_write_them(
    variable: str, text: str, field: str, value: object
) -> None:
    assert getattr(load({variable: text}), field) == value


@pytest.mark.parametrize(
    ("environ", "named", "cure"),
    [
        ({"HEADRACE_PRT": "1"}, "HEADRACE_PRT", "HEADRACE_PORT"),
        ({"HEADRACE_log_keep_s": "1"}, "HEADRACE_log_keep_s", "HEADRACE_LOG_KEEP_S"),
        ({"HEADRACE_WHATEVER_THIS_MAY_BE": "1"}, "HEADRACE_WHATEVER_THIS_MAY_BE", "README"),
        ({"HEADRACE_PORT": "many"}, "HEADRACE_PORT", "Port"),
        ({"HEADRACE_PORT": "65536"}, "65535", "Port"),
        ({"HEADRACE_PORT": ""}, "HEADRACE_PORT", "Port"),
        ({"HEADRACE_LOG_KEEP_S": "-1"}, "HEADRACE_LOG_KEEP_S", '"7d"'),
        ({"HEADRACE_LOG_KEEP_S": "nan"}, "HEADRACE_LOG_KEEP_S", '"7d"'),
        ({"HEADRACE_LOG_KEEP_S": "inf"}, "HEADRACE_LOG_KEEP_S", '"7d"'),
        ({"HEADRACE_LOG_KEEP_S": "7 fortnights"}, "HEADRACE_LOG_KEEP_S", '"7d"'),
        ({"HEADRACE_CHILD_BYTES_MAX": "2 apples"}, "HEADRACE_CHILD_BYTES_MAX", '"2GiB"'),
        ({"HEADRACE_CHILD_BYTES_MAX": "0"}, "HEADRACE_CHILD_BYTES_MAX", '"2GiB"'),
        ({"HEADRACE_LOG_LEVEL": "loud"}, "HEADRACE_LOG_LEVEL", "log lines"),
        ({"HEADRACE_TOKEN_FILE": ""}, "HEADRACE_TOKEN_FILE", "File"),
        ({"HEADRACE_CONFIG": "/nowhere.toml"}, "/nowhere.toml", "HEADRACE_CONFIG"),
    ],
)
def test_an_error_names_the_setting_and_the_cure(environ: dict[str, str], named: str, cure: str) -> None:
    with pytest.raises(BadSetting) as raised:
        load(environ)
    assert named in str(raised.value)
    assert cure in raised.value.hint


@pytest.mark.parametrize(
    ("text", "named"), [("prt = 1", "prt"), ("port = 'many'", "port"), ("port = ", "TOML"), ("[port]\nx = 1", "port")]
)
def test_an_error_in_the_file_names_the_file_and_the_key(tmp_path: Path, text: str, named: str) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text(text)
    with pytest.raises(BadSetting) as raised:
        load({"HEADRACE_CONFIG": str(config)})
    assert str(config) in str(raised.value)
    assert named in str(raised.value)


def test_what_is_the_clients_is_left_alone() -> None:
    assert load({"HEADRACE_URL": "http://127.0.0.1:1", "HEADRACE_TOKEN": "abc"}) == Settings()


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(BadSetting) as raised:
        load({"HEADRACE_NATS_URL": "nats://gateway:s3cret@127.0.0.1:4222"})
    assert "s3cret" not in str(raised.value) + raised.value.hint
    assert "password_file" in raised.value.hint


def test_a_child_process_sees_the_settings_of_its_parent() -> None:
    settings = load({"HEADRACE_LOG_KEEP_S": "1d", "HEADRACE_DATA_DIR": "/data", "HEADRACE_LISTEN_FD": "7"})
    assert load(environment(msgspec.structs.asdict(settings))) == settings


def test_every_setting_stands_in_the_table_with_a_meaning() -> None:
    rows = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in table().splitlines()[2:]}
    assert set(rows) == {f"`{env_name(field.name)}`" for field in msgspec.structs.fields(Settings)}
    assert all(meaning.endswith(".") for meaning in rows.values())


# ---------------------------------------------------------------- secrets


def test_a_secret_is_made_once_and_kept_in_a_file_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "token"
    first = kept_secret(path, "TOKEN")
    assert kept_secret(path, "TOKEN") == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(first) >= 43
    assert [p.name for p in tmp_path.iterdir()] == ["token"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_secret_that_others_can_reach_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    write_private(path, "s3cret\n")
    path.chmod(mode)
    with pytest.raises(BadSecretFile, match="TOKEN") as raised:
        read_secret(path, "TOKEN")
    assert raised.value.hint == f"chmod 600 {path}"
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", b"x" * 5000, b"nul\0"])
def test_a_file_that_holds_no_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(BadSecretFile, match="TOKEN"):
        read_secret(path, "TOKEN")


def test_a_secret_file_that_is_missing_or_a_folder_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BadSecretFile, match="TOKEN"):
            read_secret(path, "TOKEN")


def test_settings_hold_no_secret_to_show(tmp_path: Path) -> None:
    path = tmp_path / "password"
    write_private(path, "s3cret\n")
    settings = load({"HEADRACE_NATS_PASSWORD_FILE": str(path), "HEADRACE_REDIS_PASSWORD_FILE": str(path)})
    assert settings.nats_password() == settings.redis_password() == "s3cret"
    assert "s3cret" not in repr(settings) + str(msgspec.structs.asdict(settings))


def test_a_secret_is_never_open_to_others_while_it_is_written(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "token", "s3cret")
    finally:
        os.umask(before)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
