"""What may be fetched, and which names are safe: a table of tricks, each refused with the reason."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from headrace.errors import BadRequest, HeadraceError, NotFound
from tests.faulty import Faulty, serving
from workers.guard import Guard, check_name, open_inside
from workers.lines import Line, Source

PUBLIC = "93.184.216.34"


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Have every name lead to these addresses, the last ones for ever, and numbers to what they mean."""
    asked: list[str] = []
    real, left = socket.getaddrinfo, list(answers)

    def answer(host: str, port: int, *rest: object, **more: object) -> object:
        if any(c.isalpha() for c in host.removeprefix("0x")) and not host.startswith("0x") and ":" not in host:
            asked.append(host)
            found = left.pop(0) if len(left) > 1 else left[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]
        return real(host, port, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "169.254.170.2",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::7f00:1]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "[fc00::1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::80ff:fffe]",
        "224.0.0.1",
        "255.255.255.255",
        "localhost",
    ],
)
def test_an_address_inside_is_refused(host: str) -> None:
    with pytest.raises(BadRequest, match="must not be fetched from"):
        Guard().endpoint(f"https://{host}/x")


def test_a_name_counts_for_where_it_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, [PUBLIC], ["10.0.0.1"], [PUBLIC, "127.0.0.1"])
    assert Guard().endpoint("https://data.example/x").addresses == (PUBLIC,)
    with pytest.raises(BadRequest, match=r"'data\.example' leads to 10\.0\.0\.1"):
        Guard().endpoint("https://data.example/x")
    assert Guard().endpoint("https://data.example/x").addresses == (PUBLIC,)  # and never to the other one


def test_a_name_that_changes_its_mind_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was judged is the one that is connected to; the name is not asked a second time."""
    asked = resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    with serving(Faulty(body=b"inside")) as server:
        url = server.url.replace("127.0.0.1", "data.example")
        line = Line(threading.Event())
        reply = line.get(Source(name="x", address=lambda: url, guard=Guard(hosts=["data.example"])), 0, 10)
        assert reply.response.read() == b"inside"
        line.close()
    assert len(asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "ftp://data.example/x",
        "gopher://data.example/x",
        "dict://data.example/x",
        "//data.example/x",
        "https:///x",
        "https://user:secret@data.example/x",
        "https://user@data.example/x",
        "https://data.example:0/x",
        "https://data.example:99999/x",
        "https://data.example\\@10.0.0.1/x",
        "https://data.example/a b",
        "https://data.example/\r\nX: y",
        "https://dat\u00e4.example/x",
        "https://[::1/x",
        "https://data.example/" + "x" * 5000,
    ],
)
def test_an_address_with_tricks_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolving(monkeypatch, [PUBLIC])
    with pytest.raises(BadRequest) as refused:
        Guard().endpoint(url)
    assert asked == []
    assert refused.value.hint
    assert "secret" not in str(refused.value)


def test_plain_http_and_private_addresses_are_for_hosts_that_an_operator_names(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, [PUBLIC])
    with pytest.raises(BadRequest, match="plain http"):
        Guard().endpoint("http://data.example/x")
    assert Guard(hosts=["data.example"]).endpoint("http://data.example/x").port == 80
    guard = Guard(hosts=["10.0.0.0/8", "127.0.0.1", "fd00::/8"])
    assert guard.endpoint("http://10.9.8.7:8000/x").addresses == ("10.9.8.7",)
    assert guard.endpoint("https://127.0.0.1/x").port == 443
    with pytest.raises(BadRequest):
        guard.endpoint("https://192.168.0.1/x")
    with pytest.raises(BadRequest):
        guard.endpoint("https://[::ffff:192.168.0.1]/x")


def test_where_clouds_hand_out_credentials_nobody_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, ["169.254.169.254"])
    guard = Guard(hosts=["0.0.0.0/0", "::/0", "data.example"])
    for host in ("169.254.169.254", "[fe80::a9fe:a9fe]", "[::ffff:169.254.169.254]", "data.example"):
        with pytest.raises(BadRequest, match="must not be fetched from"):
            guard.endpoint(f"http://{host}/latest/meta-data/")


def test_a_host_that_is_none_cannot_be_allowed() -> None:
    with pytest.raises(BadRequest, match="is no host"):
        Guard(hosts=["http://data.example"])


def test_files_are_read_below_the_folders_that_are_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "a b.h5").write_bytes(b"a")
    (outside / "secret").write_bytes(b"s")
    (inside / "link").symlink_to(outside / "secret")
    (inside / "good").symlink_to(inside / "a b.h5")
    os.mkfifo(inside / "pipe")
    guard = Guard(folders=[inside])
    assert guard.file(f"file://{inside}/a%20b.h5") == inside / "a b.h5"
    assert guard.file(f"file://localhost{inside}/good") == inside / "a b.h5"
    for uri in (
        f"file://{outside}/secret",
        f"file://{inside}/link",
        f"file://{inside}/../out/secret",
        f"file://{inside}/%2e%2e/out/secret",
        f"file://{inside}x",
        f"file://{inside}/pipe",
        f"file://{inside}",
        f"file://elsewhere{inside}/a",
        f"file://{inside}/a%00b",
        "file:relative",
    ):
        with pytest.raises(BadRequest):
            guard.file(uri)
    with pytest.raises(NotFound):
        guard.file(f"file://{inside}/nothing")
    with pytest.raises(BadRequest, match="outside the folders"):
        Guard().file(f"file://{inside}/good")


def test_buckets_are_read_that_are_allowed() -> None:
    guard = Guard(buckets=["raw-data", "shared/run7"])
    assert guard.object("s3://raw-data/a/b c.h5") == ("raw-data", "a/b c.h5")
    assert guard.object("s3://shared/run7/x") == ("shared", "run7/x")
    for uri in ("s3://shared/run70/x", "s3://shared/x", "s3://other/x", "s3://raw-data/", "s3://raw-data", "s3://R/x"):
        with pytest.raises(BadRequest) as refused:
            guard.object(uri)
        assert refused.value.hint


NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "a/../b",
    "a//b",
    "a/",
    "./a",
    "~/a",
    "~root",
    "a\\b",
    "..\\a",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "x" * 256,
    "\u00e4" * 200,
    "\ud800",
    "/".join("a" * 40),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_tricks_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot be the name of a file"):
        check_name(name)
    with pytest.raises(BadRequest):
        open_inside(tmp_path, name)


def test_a_disk_that_does_not_answer_is_not_told_as_a_wrong_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def full(path: object, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space left"):
        open_inside(tmp_path, "a", os.O_WRONLY | os.O_CREAT)


def test_a_plain_name_is_opened_and_made(tmp_path: Path) -> None:
    os.close(open_inside(tmp_path, "out/frames 1.h5", os.O_WRONLY | os.O_CREAT))
    assert (tmp_path / "out" / "frames 1.h5").is_file()
    assert check_name("a/\u00e4.h5") == ("a", "\u00e4.h5")
    with pytest.raises(NotFound):
        open_inside(tmp_path, "out/nothing")


def test_links_that_a_job_left_are_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "job", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("s")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "folder").symlink_to(outside)
    (folder / "hard").hardlink_to(outside / "secret")
    os.mkfifo(folder / "pipe")
    (folder / "inner").mkdir()
    for name, said in (
        ("link", "'link' is a link"),
        ("folder/secret", "lies behind a link"),
        ("hard", "linked to from elsewhere"),
        ("pipe", "is a pipe"),
        ("inner", "is a folder"),
    ):
        with pytest.raises(BadRequest, match=said):
            open_inside(folder, name)
    for name, said in (("pipe", "is a pipe"), ("inner", "is a folder")):
        with pytest.raises(BadRequest, match=said):
            open_inside(folder, name, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(HeadraceError):
        open_inside(folder, "folder/new", os.O_WRONLY | os.O_CREAT)
    assert not (outside / "new").exists()
