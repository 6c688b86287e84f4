"""Folders of jobs: which are removed, and which are not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from streams.blobs import FolderBlobs
from workers.jobfolders import JobFolders
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
