"""What is fetched is what was promised, whatever the server and the line do; else it is refused with the reason."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.errors import BadRequest, HeadraceError, NotFound, Unavailable
from tests.faulty import Faulty, serving
from workers.egress import Stopped
from workers.guard import Guard
from workers.lines import Source
from workers.transfer import Checks, Fetched, Transfer, journal_of

PART = 64 * 1024
BODY = random.Random(7).randbytes(10 * PART + 123)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[Faulty]:
    with serving(Faulty(body=BODY)) as faulty:
        yield faulty


class Fetch:
    """Fetches into one file, again and again."""

    def __init__(self, folder: Path, server: Faulty) -> None:
        self.path = folder / "growing"
        self.path.touch()
        self.server = server
        self.stopped = threading.Event()
        self.told: list[tuple[int, int]] = []

    def room(self, size: int) -> None:
        if self.path.stat().st_size != size:
            journal_of(self.path).unlink(missing_ok=True)
            os.truncate(self.path, size)

    def moved(self, there: int, size: int) -> None:
        self.told.append((there, size))

    def __call__(self, *, own: bool = False, boot: str = "b", lines_max: int = 4, **checks: object) -> Fetched:
        return Transfer(
            Source(name="data", address=lambda: self.server.url, guard=None if own else Guard(hosts=["127.0.0.1"])),
            self.path,
            checks=Checks(**checks),  # type: ignore[arg-type]
            room=self.room,
            stopped=self.stopped,
            on_moved=self.moved,
            boot=boot,
            part_bytes=PART,
            lines_max=lines_max,
            backoff_s=0.001,
        ).run()


@pytest.fixture
def fetch(tmp_path: Path, server: Faulty) -> Fetch:
    return Fetch(tmp_path, server)


def test_a_file_arrives_in_stretches_and_is_told_of(fetch: Fetch, server: Faulty) -> None:
    found = fetch(sha256=SHA256, size=len(BODY))
    assert fetch.path.read_bytes() == BODY
    assert (found.size, found.sha256, found.moved) == (len(BODY), SHA256, len(BODY))
    assert len(server.asked) == 11
    assert fetch.told[-1] == (len(BODY), len(BODY))


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1])
def test_every_size_arrives(fetch: Fetch, server: Faulty, size: int) -> None:
    server.body = BODY[:size]
    assert fetch().sha256 == hashlib.sha256(server.body).hexdigest()
    assert fetch.path.read_bytes() == server.body


def test_a_server_without_stretches_will_do(fetch: Fetch, server: Faulty) -> None:
    server.ranged = False
    assert fetch(sha256=SHA256).size == len(BODY)
    assert fetch.path.read_bytes() == BODY


@pytest.mark.parametrize("ranged", [True, False])
def test_cut_connections_are_taken_up_again(fetch: Fetch, server: Faulty, ranged: bool) -> None:
    server.ranged, server.cut_after, server.cuts = ranged, PART // 3, 5
    found = fetch(sha256=SHA256)
    assert fetch.path.read_bytes() == BODY
    if ranged:
        assert found.moved == len(BODY)  # nothing was fetched twice
    assert server.cuts == 0


def test_a_server_that_never_ends_what_it_began_is_given_up_on(fetch: Fetch, server: Faulty) -> None:
    server.cut_after, server.cuts = 0, 10_000
    with pytest.raises(Unavailable, match="data cannot be fetched: the connection ended early"):
        fetch(sha256=SHA256)


def test_a_busy_server_is_asked_again(fetch: Fetch, server: Faulty) -> None:
    server.status, server.refusals = 503, 4
    assert fetch().sha256 == SHA256


@pytest.mark.parametrize(("status", "error"), [(404, NotFound), (403, BadRequest), (401, BadRequest)])
def test_a_refusal_is_told_at_once(fetch: Fetch, server: Faulty, status: int, error: type[HeadraceError]) -> None:
    server.status, server.refusals = status, 1
    with pytest.raises(error, match=f"the server answers {status}"):
        fetch()
    assert len(server.asked) == 1


def test_a_flipped_byte_is_noticed_and_mended(fetch: Fetch, server: Faulty) -> None:
    server.flip_at, server.flips = 5 * PART + 17, 1
    found = fetch(sha256=SHA256)
    assert fetch.path.read_bytes() == BODY
    assert found.sha256 == SHA256


def digests(body: bytes) -> dict[str, Callable[[], dict[str, str]]]:
    sha256 = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return {
        "Repr-Digest": lambda: {"Repr-Digest": f"sha-256=:{sha256}:"},
        "Digest": lambda: {"Digest": f"SHA-256={sha256}"},
        "x-amz-checksum-sha256": lambda: {"x-amz-checksum-sha256": sha256},
    }


@pytest.mark.parametrize("name", [*digests(b"")])
def test_what_the_server_says_of_the_content_is_checked_too(fetch: Fetch, server: Faulty, name: str) -> None:
    server.headers = digests(BODY)[name]()
    server.flip_at, server.flips = 3, 10_000
    with pytest.raises(BadRequest, match=r"data is damaged: its SHA-256 is .* instead of"):
        fetch()


def test_the_tag_of_an_object_in_one_piece_is_its_md5(fetch: Fetch, server: Faulty) -> None:
    server.flip_at, server.flips = 3, 1
    assert fetch(own=True).sha256 == SHA256
    server.flip_at, server.flips = 3, 10_000
    with pytest.raises(BadRequest, match="MD5"):
        fetch(own=True, boot="another")


def test_damage_that_stays_is_reported(fetch: Fetch, server: Faulty) -> None:
    server.flip_at, server.flips = 5 * PART, 10_000
    with pytest.raises(BadRequest, match=f"data is damaged: its SHA-256 is .* instead of {SHA256}"):
        fetch(sha256=SHA256)
    with pytest.raises(BadRequest, match="MD5"):
        fetch(md5=hashlib.md5(BODY).hexdigest())


def test_a_wrong_size_is_reported(fetch: Fetch, server: Faulty) -> None:
    with pytest.raises(BadRequest, match=r"it has 655,483 bytes instead of 655,482"):
        fetch(size=len(BODY) - 1)
    server.size_told = len(BODY) + 1000  # it promises more than it has
    with pytest.raises((BadRequest, Unavailable)):
        fetch()


def test_content_that_changes_on_the_way_is_fetched_anew(fetch: Fetch, server: Faulty) -> None:
    other = bytes(reversed(BODY))
    server.gate = threading.Event()

    def change() -> None:
        server.body = other
        assert server.gate is not None
        server.gate.set()

    threading.Timer(0.2, change).start()
    assert fetch().sha256 == hashlib.sha256(other).hexdigest()
    assert fetch.path.read_bytes() == other


def test_a_transfer_that_was_killed_goes_on_where_it_stopped(fetch: Fetch, server: Faulty) -> None:
    def stop_late(there: int, size: int) -> None:
        if there > 5 * PART:
            fetch.stopped.set()

    fetch.moved = stop_late  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        fetch(lines_max=1)
    before = server.sent
    fetch.stopped.clear()
    del fetch.moved
    found = fetch()
    assert found.sha256 == SHA256
    assert found.moved < len(BODY) // 2 + 2 * PART
    assert server.sent - before < 7 * PART


@pytest.mark.parametrize("what", ["another boot", "another content", "another file"])
def test_a_journal_counts_only_for_what_it_was_written_for(fetch: Fetch, server: Faulty, what: str) -> None:
    def stop_late(there: int, size: int) -> None:
        if there > 5 * PART:
            fetch.stopped.set()

    fetch.moved = stop_late  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        fetch(lines_max=1)
    fetch.stopped.clear()
    del fetch.moved
    if what == "another content":
        server.body = bytes(reversed(BODY))
    if what == "another file":
        fetch.path.unlink()
        fetch.path.touch()
    found = fetch(boot="c" if what == "another boot" else "b")
    assert found.moved == len(BODY)
    assert fetch.path.read_bytes() == server.body


def test_what_comes_compressed_is_refused(fetch: Fetch, server: Faulty) -> None:
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(BadRequest, match="comes compressed"):
        fetch()


def test_redirects_are_judged_like_first_addresses(fetch: Fetch, server: Faulty) -> None:
    with serving(Faulty(redirect="http://169.254.169.254/latest/meta-data/")) as other:
        fetch.server = other
        with pytest.raises(BadRequest, match=r"169\.254\.169\.254, which must not be fetched from"):
            fetch()
        other.redirect = server.url
        assert fetch().sha256 == SHA256
        other.redirect = other.url
        with pytest.raises(BadRequest, match="redirects more than 5 times"):
            fetch()


MEASURED = """
import sys, threading
from pathlib import Path
from workers.lines import Source
from workers.transfer import Checks, Transfer
url, path = sys.argv[1], Path(sys.argv[2])
def fetch():
    Transfer(
        Source(name="data", address=lambda: url), path, checks=Checks(), room=lambda size: None,
        stopped=threading.Event(), on_moved=lambda there, size: None,
    ).run()
def peak():  # not ru_maxrss: that begins with the peak of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = peak()
fetch()
print(peak() - before)
"""


def test_the_memory_stays_flat(tmp_path: Path, server: Faulty) -> None:
    server.body = bytes(96 * 1024 * 1024)
    path = tmp_path / "growing"
    path.touch()
    ran = subprocess.run(
        [sys.executable, "-P", "-c", MEASURED, server.url, str(path)],
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert path.stat().st_size == len(server.body)
    assert int(ran.stdout) < 30  # MiB
