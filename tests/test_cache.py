"""The cache of a machine: within its size, never at the cost of what is in use, and never a damaged byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headrace.errors import BadRequest, Unavailable
from workers.cache import Cache, Known
from workers.egress import Stopped
from workers.transfer import journal_of


def cache_of(folder: Path, bytes_max: int = 100, boot: str = "b1") -> Cache:
    return Cache(folder / "cache", bytes_max=bytes_max, boot=boot)


def fill(cache: Cache, body: bytes, used_at: float | None = None) -> str:
    digest = hashlib.sha256(body).hexdigest()
    with cache.growing(digest, threading.Event()) as path:
        cache.room(len(body), path)
        path.write_bytes(body)
        cache.adopt(path, digest)
    if used_at is not None:
        held = cache.hold(digest)
        assert held is not None
        os.utime(held.path, (used_at, used_at))
        held.close()
    return digest


def holds(cache: Cache, digest: str) -> bool:
    """Say whether it is there; this is no use that counts."""
    return any(folder.joinpath(digest).exists() for folder in cache._boots())


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    one, two, three = (fill(cache, bytes([n]) * 40, used_at=1000.0 + n) for n in range(3))
    assert not holds(cache, one)
    assert holds(cache, two)
    held = cache.hold(two)  # used again
    assert held is not None
    assert held.path.read_bytes() == b"\x01" * 40
    held.close()
    fill(cache, b"x" * 30)
    assert holds(cache, two)
    assert not holds(cache, three)


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    one = fill(cache, b"a" * 60, used_at=1000.0)
    two = fill(cache, b"b" * 40, used_at=2000.0)
    held = cache.hold(one)
    assert held is not None
    os.utime(held.path, (1000.0, 1000.0))
    three = fill(cache, b"c" * 40)
    assert holds(cache, one)
    assert not holds(cache, two)
    with pytest.raises(Unavailable, match="no room for 90 bytes: 60 of 100 are in use"):
        fill(cache, b"d" * 90)
    assert not holds(cache, three)
    held.close()
    fill(cache, b"d" * 90)
    assert not holds(cache, one)


def test_what_a_killed_process_held_may_leave(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    one = fill(cache, b"a" * 60)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-c",
            "import sys, time; from pathlib import Path; from workers.cache import Cache\n"
            "held = Cache(Path(sys.argv[1]), bytes_max=100, boot='b1').hold(sys.argv[2]); print(held, flush=True)\n"
            "time.sleep(60)",
            str(tmp_path / "cache"),
            one,
        ],
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert b"Held" in holder.stdout.readline()
    with pytest.raises(Unavailable):
        fill(cache, b"b" * 60)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    fill(cache, b"b" * 60)
    assert not holds(cache, one)


def test_what_is_on_its_way_counts_and_gives_way_when_nobody_works_at_it(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    with cache.growing("first", threading.Event()) as path:
        cache.room(70, path)
        assert path.stat().st_size == 70
        with pytest.raises(Unavailable):
            fill(cache, b"b" * 40)
        journal_of(path).write_text("x")
    fill(cache, b"b" * 40)
    assert not path.exists()
    assert not journal_of(path).exists()


def test_many_small_files_are_not_all_looked_at_for_each_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    look = Cache._files

    def looking(cache: Cache, but: Path) -> list[tuple[Path, os.stat_result]]:
        looked.append(but)
        return look(cache, but)

    monkeypatch.setattr(Cache, "_files", looking)
    for number in range(50):
        fill(cache_of(tmp_path, bytes_max=4 * 51), b"%04d" % number)  # in many processes, as it were
    assert len(looked) == 1
    for number in range(50, 60):
        fill(cache_of(tmp_path, bytes_max=4 * 51), b"%04d" % number)
    assert 1 < len(looked) < 11  # a little more than is needed leaves at once
    assert sum(path.stat().st_size for path in cache_of(tmp_path)._ours.iterdir()) <= 4 * 51


@pytest.mark.parametrize("lost", [b"", b"{", b'{"bytes":1}'])
def test_a_count_that_was_lost_is_made_anew(tmp_path: Path, lost: bytes) -> None:
    cache = cache_of(tmp_path)
    one = fill(cache, b"a" * 60, used_at=1000.0)
    (tmp_path / "cache" / "lock").write_bytes(lost)
    two = fill(cache, b"b" * 60)
    assert not holds(cache, one)
    assert holds(cache, two)


def test_what_is_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    one = fill(cache, b"a" * 60)
    with pytest.raises(BadRequest, match="101 bytes do not fit into the cache of 100"):
        fill(cache, b"b" * 101)
    assert holds(cache, one)


def test_only_one_at_a_time_lets_something_grow(tmp_path: Path) -> None:
    cache, other, stopped = cache_of(tmp_path), cache_of(tmp_path), threading.Event()
    order: list[str] = []
    inside = threading.Event()

    def wait_for_it() -> None:
        inside.set()
        with other.growing("same", threading.Event()):
            order.append("second")

    with cache.growing("same", stopped) as path:
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        inside.wait()
        stopped.set()
        with pytest.raises(Stopped), cache_of(tmp_path).growing("same", stopped):
            raise AssertionError
        path.write_bytes(b"x")
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_what_was_fetched_before_the_machine_last_started_is_checked_again(tmp_path: Path) -> None:
    before = cache_of(tmp_path)
    good, bad = fill(before, b"good"), fill(before, b"bad!")
    held = before.hold(bad)
    assert held is not None
    held.path.chmod(0o600)
    held.path.write_bytes(bytes(4))  # what a power cut leaves of a file whose bytes were not written yet
    held.close()
    after = cache_of(tmp_path, boot="b2")
    again = after.hold(good)
    assert again is not None
    assert again.path.read_bytes() == b"good"
    again.close()
    assert after.hold(bad) is None
    assert not (tmp_path / "cache" / "content" / "b1").exists()


def test_what_an_address_held_is_remembered(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    assert cache.recall("https://a/b") is None
    known = Known(etag='"x"', size=3, sha256="0" * 64)
    cache.remember("https://a/b", known)
    assert cache_of(tmp_path).recall("https://a/b") == known


def test_nobody_else_may_look_in(tmp_path: Path) -> None:
    cache_of(tmp_path)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
