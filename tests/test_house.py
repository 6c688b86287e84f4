"""The house checks itself: who imports whom, how large the rooms are, and what they must not hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("headrace", "streams", "functions", "workers", "gateway", "infra")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "headrace": (),
    "streams": ("headrace",),
    "functions": ("headrace", "streams"),
    "workers": ("headrace", "streams", "functions"),
    "gateway": ("headrace", "streams", "functions"),
    "infra": ("headrace", "streams", "functions", "workers", "gateway"),
}
AT_A_SITE = {"functions/examples/campaign/lj_md.py"}  # a program of a job, which is a process of its own elsewhere
CLIENT_NEEDS = {"aiohttp", "cloudpickle", "cyclopts", "msgspec", "rich"}
ROOM_LINES_MAX = 600
FUNCTION_LINES_MAX = 80


def rooms(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


ALL = [room for folder in FOLDERS for room in rooms(folder)]


def imported(room: Path) -> set[str]:
    """Return the top-level names of everything that a room imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(room.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_left_never_imports_the_right(folder: str) -> None:
    allowed = {folder, *MAY_IMPORT[folder]}
    wrong = {
        str(room.relative_to(ROOT)): sorted(other)
        for room in rooms(folder)
        if (other := (imported(room) & set(FOLDERS)) - allowed)
    }
    assert wrong == {}


def test_the_users_process_needs_few_libraries() -> None:
    standard = sys.stdlib_module_names
    needed = {name for room in rooms("headrace") for name in imported(room)} - standard - {"headrace"}
    assert needed - {"numpy"} <= CLIENT_NEEDS  # NumPy is reseeded in a child where a user's code has loaded it


def test_nats_and_redis_are_spoken_in_streams_alone() -> None:
    speakers = {room.relative_to(ROOT).parts[0] for room in ALL if imported(room) & {"nats", "redis"}}
    assert speakers <= {"streams", "infra"}


def test_the_s3_library_is_imported_in_one_room_and_only_when_that_is_needed() -> None:
    assert [str(room.relative_to(ROOT)) for room in ALL if "boto3" in imported(room)] == ["streams/s3.py"]
    told = (
        "import sys; import gateway.app, workers.worker, workers.staging, infra.services; print('boto3' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", told],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "False"


def test_the_gateway_opens_nothing_that_users_send() -> None:
    openers = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "tarfile", "zipfile", "importlib", "runpy"}
    assert {str(room): imported(room) & openers for room in rooms("gateway") if imported(room) & openers} == {}


def test_only_infra_reads_the_environment() -> None:
    readers = [
        str(room.relative_to(ROOT))
        for room in ALL
        if re.search(r"\bos\.(environ|getenv)\b", room.read_text()) and not room.is_relative_to(ROOT / "infra")
    ]
    # The client finds its platform in HEADRACE_URL, a child cleans its own environment, a pool hands one on.
    assert set(readers) <= {
        "headrace/address.py",
        "headrace/birth.py",
        "headrace/zygote.py",
        "workers/pool.py",
        *AT_A_SITE,
    }


def test_rooms_and_functions_stay_small() -> None:
    large: list[str] = []
    for room in ALL:
        text = room.read_text()
        if text.count("\n") > ROOM_LINES_MAX:
            large.append(f"{room.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    large.append(f"{room.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert large == []


def test_every_room_says_what_it_is_for() -> None:
    silent = [str(room.relative_to(ROOT)) for room in ALL if not (ast.get_docstring(ast.parse(room.read_text())) or "")]
    assert silent == []


def test_every_room_is_used() -> None:
    names = {".".join(room.relative_to(ROOT).with_suffix("").parts) for room in ALL}
    text = "\n".join(path.read_text() for path in [*ALL, *rooms("tests"), ROOT / "pyproject.toml", ROOT / "Makefile"])
    unused = [
        name
        for name in sorted(names)
        if not name.endswith(("__init__", "__main__"))
        and name.rpartition(".")[2] not in text.replace(f"/{name.rpartition('.')[2]}.py", "")
        and not name.startswith("functions.examples.")
    ]
    assert unused == []


def test_there_is_no_room_for_leftovers() -> None:
    assert [room for room in ALL if room.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_nothing_is_left_to_be_done_later() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError\(")
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.js", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    found = [name for name in tracked if name != "tests/test_house.py" and marks.search((ROOT / name).read_text())]
    assert found == []
