"""Folders of jobs: which are removed, which are not, and what is read of them and kept."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from headrace.errors import Unavailable
from headrace.jobs import JobSpec
from streams.blobs import Blobs, FolderBlobs
from workers.jobfolders import JobFolders
from workers.sites.records import TAIL_BYTES
from workers.staging import Stager

KEEP_S = 1000.0


@pytest.fixture
def folders(tmp_path: Path) -> JobFolders:
    made = JobFolders(tmp_path / "work", Stager(FolderBlobs(tmp_path / "blobs")))
    made.make()
    return made


def old(folder: Path, *, but: str = "") -> None:
    """Make a folder of a job of long ago, in which only one file is new."""
    (folder / ".headrace").mkdir(parents=True)
    (folder / "deep" / "deeper").mkdir(parents=True)
    for name in (".headrace/claim", "deep/deeper/frame.npz"):
        (folder / name).touch()
    for path in sorted(folder.rglob("*"), reverse=True):
        if str(path.relative_to(folder)) != but:
            os.utime(path, (0.0, 0.0))
    os.utime(folder, (0.0, 0.0))


@pytest.mark.parametrize("file", [".headrace/claim", "deep/deeper/frame.npz"])
async def test_a_folder_goes_once_nothing_in_it_is_new(folders: JobFolders, file: str) -> None:
    old(folders.of("gone-1"))
    old(folders.of("stays-1"), but=file)
    assert await folders.sweep(KEEP_S, []) == 1
    assert [path.name for path in folders.root.iterdir()] == ["stays-1"]


async def test_a_folder_that_is_watched_is_kept_by_all_agents_of_the_site(folders: JobFolders) -> None:
    old(folders.of("runs-1"))
    other = JobFolders(folders.root.parent, Stager(FolderBlobs(folders.root.parent / "blobs")))
    assert await folders.sweep(KEEP_S, ["runs-1"]) == 0
    assert await other.sweep(KEEP_S, []) == 0
    assert folders.of("runs-1").stat().st_mtime > time.time() - KEEP_S


@pytest.mark.parametrize("odd", ["pipe", "without end", "link", "folder"])
async def test_what_a_job_put_in_place_of_its_stderr_is_not_read(folders: JobFolders, tmp_path: Path, odd: str) -> None:
    folder = folders.of("odd-1")
    folder.mkdir()
    (folder / "stdout.txt").write_text("what it said\n")
    (tmp_path / "secret").write_text("of another\n")
    lies_there = folder / "stderr.txt"
    match odd:
        case "pipe":
            os.mkfifo(lies_there)
        case "without end":
            lies_there.symlink_to("/dev/zero")
        case "link":
            lies_there.symlink_to(tmp_path / "secret")
        case _:
            lies_there.mkdir()
    assert await folders.last_lines(folder) == "what it said\n"


async def test_the_last_lines_are_whole_and_few(folders: JobFolders) -> None:
    folder = folders.of("long-1")
    folder.mkdir()
    (folder / "stderr.txt").write_text("".join(f"line {number:04}\n" for number in range(1000)))
    told = await folders.last_lines(folder)
    assert len(told) <= TAIL_BYTES
    assert told.splitlines()[0].startswith("line ")
    assert told.endswith("line 0999\n")


class Worn(Stager):
    """Stands in for a store of which one thing cannot be had now, and another one takes its time."""

    def __init__(self, blobs: Blobs) -> None:
        super().__init__(blobs)
        self.stored: list[str] = []

    async def store(self, content: Path | bytes) -> str:
        assert isinstance(content, Path)
        said = content.read_text()
        if said == "bad":
            raise Unavailable("the store does not answer")
        await asyncio.sleep(0.1)
        self.stored.append(said)
        return await super().store(content)


async def test_nothing_is_kept_any_more_once_it_is_told_that_outputs_cannot_be_kept_now(tmp_path: Path) -> None:
    stager = Worn(FolderBlobs(tmp_path / "blobs"))
    folders = JobFolders(tmp_path / "work", stager)
    folders.make()
    folder = folders.of("out-1")
    folder.mkdir()
    for name in ("bad", "good"):
        (folder / name).write_text(name)
    with pytest.raises(Unavailable):
        await folders.keep(JobSpec(executable="/bin/true", outputs=["bad", "good"]), folder)
    assert stager.stored == ["good"]
