"""Code by value: what travels with a function, and what is said when it cannot."""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import functions.catalog
import streams.topology
from headrace import packing
from headrace.errors import BadRequest, LoadError, TooLarge
from headrace.packing import pack, pack_file
from headrace.sdk import function

DECOYS = ("functions.py", "workers.py", "streams.py", "gateway.py", "infra.py", "tests.py")


def write(folder: Path, more: dict[str, str] | None = None, **files: str) -> Path:
    for name, text in {**files, **(more or {})}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    assert sys.path == path
    own = {name for name in set(sys.modules) - modules if packing._is_own(sys.modules[name])}
    assert not own


SIMPLE = """
    from headrace import function
    from helpers import scale

    @function(timeout="5s", retries=1)
    def double(x: int) -> int:
        \"\"\"Twice x.\"\"\"
        return scale(x, 2)
"""


def test_a_file_travels_with_the_helpers_that_it_imports_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, main=SIMPLE, helpers="def scale(x, k): return x * k", unrelated="1 / 0")
    (packed,) = pack_file(tmp_path / "main.py")
    assert packed.declaration.name == "double"
    assert packed.declaration.options is not None
    assert (packed.declaration.options.timeout, packed.declaration.options.retries) == ("5s", 1)
    assert packed.doc == "Twice x."
    assert (packed.code.kind, packed.code.module, packed.code.name) == ("source", "main", "double")
    assert sorted(packed.code.files) == ["helpers.py", "main.py"]
    assert packed.code.files["main.py"] == (tmp_path / "main.py").read_text()
    assert packed.code.python == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_packages_submodules_and_imports_inside_functions_travel(tmp_path: Path) -> None:
    write(
        tmp_path,
        main="""
            from headrace import function
            from tools import peaks

            @function
            def find(x):
                import late
                from plain.inner import thing
                return peaks.find(x)
        """,
        late="import numpy, json",
        more={
            "tools/__init__": "from . import shared",
            "tools/peaks": "from .shared import K\nfrom .deep.er import x\n\ndef find(x): return K",
            "tools/shared": "K = 1",
            "tools/deep/__init__": "",
            "tools/deep/er": "x = 1",
            "tools/unused": "",
            "plain/inner": "thing = 1",
        },
    )
    (packed,) = pack_file(tmp_path / "main.py")
    assert sorted(packed.code.files) == [
        "late.py",
        "main.py",
        "plain/inner.py",
        "tools/__init__.py",
        "tools/deep/__init__.py",
        "tools/deep/er.py",
        "tools/peaks.py",
        "tools/shared.py",
    ]


def test_a_module_imported_by_a_computed_name_travels(tmp_path: Path) -> None:
    main = """
        import importlib
        from headrace import function
        plugin = importlib.import_module("plug" + "in")

        @function
        def run(x): return plugin.value
    """
    write(tmp_path, main=main, plugin="value = 1")
    (packed,) = pack_file(tmp_path / "main.py")
    assert sorted(packed.code.files) == ["main.py", "plugin.py"]


def test_a_folder_of_decoys_named_like_ours_does_no_harm(tmp_path: Path) -> None:
    for name in DECOYS:
        (tmp_path / name).write_text("raise RuntimeError('a decoy was imported')")
    write(tmp_path, main=SIMPLE, helpers="def scale(x, k): return x * k")
    (packed,) = pack_file(tmp_path / "main.py")
    assert sorted(packed.code.files) == ["helpers.py", "main.py"]


@pytest.mark.parametrize("name", DECOYS)
def test_a_file_named_like_one_of_our_folders_is_itself(tmp_path: Path, name: str) -> None:
    write(tmp_path, helpers="def scale(x, k): return x * k")
    (tmp_path / name).write_text(textwrap.dedent(SIMPLE))
    (packed,) = pack_file(tmp_path / name)
    assert packed.code.module == name.removesuffix(".py")
    assert sorted(packed.code.files) == sorted(["helpers.py", name])
    assert sys.modules["functions.catalog"] is functions.catalog
    assert sys.modules["streams.topology"] is streams.topology


def test_the_neighbours_of_a_file_win_over_modules_of_the_same_name_loaded_before(tmp_path: Path) -> None:
    one = write(tmp_path / "one", main=SIMPLE, helpers="def scale(x, k): return 1")
    two = write(tmp_path / "two", main=SIMPLE, helpers="def scale(x, k): return 2")
    texts = [pack_file(each / "main.py")[0].code.files["helpers.py"] for each in (one, two, one)]
    assert texts == ["def scale(x, k): return 1", "def scale(x, k): return 2", "def scale(x, k): return 1"]


def test_a_neighbour_named_like_one_of_our_folders_is_the_one_that_is_imported(tmp_path: Path) -> None:
    main = "from headrace import function\nfrom functions import K\n\n@function\ndef f(x): return K\n"
    write(tmp_path, main=main, functions="K = 1")
    (packed,) = pack_file(tmp_path / "main.py")
    assert packed.code.files["functions.py"] == "K = 1"
    assert sys.modules["functions.catalog"] is functions.catalog


def test_a_declared_function_taken_over_from_a_helper_is_registered_from_there(tmp_path: Path) -> None:
    steps = "from headrace import function\n\n@function\ndef second(x): return x\n"
    main = "from headrace import function\nfrom steps import second\n\n@function\ndef first(x): return x\n"
    write(tmp_path, main=main, steps=steps)
    found = {each.declaration.name: each.code for each in pack_file(tmp_path / "main.py")}
    assert {name: code.module for name, code in found.items()} == {"first": "main", "second": "steps"}
    assert sorted(found["second"].files) == ["steps.py"]


def test_an_error_in_the_file_is_told_as_the_users_with_the_users_frames(tmp_path: Path) -> None:
    main = """
        from helpers import broken

        def go():
            return broken()

        go()
    """
    write(tmp_path, main=main, helpers="def broken():\n    return 1 / 0\n")
    with pytest.raises(LoadError, match=r"main.py cannot be loaded: ZeroDivisionError: division by zero") as caught:
        pack_file(tmp_path / "main.py")
    assert "helpers.py" in caught.value.traceback
    assert "return broken()" in caught.value.traceback
    assert "headrace" not in caught.value.traceback.replace(str(tmp_path), "")
    assert "importlib" not in caught.value.traceback


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("from headrace import function\n@function(timeout='soon')\ndef f(x): pass\n", "'soon' is not a duration"),
    ],
)
def test_whatever_a_file_raises_is_told(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "main.py").write_text(text)
    with pytest.raises(LoadError) as caught:
        pack_file(tmp_path / "main.py")
    assert says in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("random.py", "random"),
        ("headrace.py", "headrace"),
        ("a.b.py", "not the name of a Python module"),
        ("my-file.py", "not the name of a Python module"),
    ],
)
def test_a_file_that_would_hide_a_module_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_text(textwrap.dedent(SIMPLE))
    with pytest.raises(BadRequest, match=says):
        pack_file(tmp_path / name)


def test_a_file_without_declarations_and_one_that_is_missing_are_refused(tmp_path: Path) -> None:
    write(tmp_path, main="def f(x): return x")
    with pytest.raises(BadRequest, match=r"main.py declares no function") as caught:
        pack_file(tmp_path / "main.py")
    assert "@headrace.function" in caught.value.hint
    with pytest.raises(BadRequest, match="there is no file"):
        pack_file(tmp_path / "nowhere.py")
    twice = "from headrace import function\n@function(name='a')\ndef f(x): pass\n@function(name='a')\ndef g(x): pass\n"
    write(tmp_path, twice=twice)
    with pytest.raises(BadRequest, match="two functions called a"):
        pack_file(tmp_path / "twice.py")


def test_code_over_four_mebibytes_is_refused_with_the_limit_named(tmp_path: Path) -> None:
    write(tmp_path, main=SIMPLE, helpers=f"def scale(x, k): return x\nDATA = '{'x' * 4 * 1024 * 1024}'")
    with pytest.raises(TooLarge, match="4 MiB") as caught:
        pack_file(tmp_path / "main.py")
    assert "ctx.stage" in caught.value.hint
    data = b"x" * 5 * 1024 * 1024
    with pytest.raises(TooLarge, match="4 MiB"):
        pack(lambda: data)


def test_the_version_follows_from_the_code_and_not_from_what_else_is_imported(tmp_path: Path) -> None:
    write(tmp_path, main=SIMPLE, helpers="def scale(x, k): return x * k", other=SIMPLE.replace("double", "treble"))
    alone = pack_file(tmp_path / "main.py")[0].code
    pack_file(tmp_path / "other.py")
    assert pack_file(tmp_path / "main.py")[0].code == alone


# ---------------------------------------------------------------- functions


def on_top(x: int) -> int:
    return x + OFFSET


OFFSET = 7
shown = function(name="shown")(lambda x: x + OFFSET)


def test_a_function_of_a_module_travels_as_the_source_of_its_file() -> None:
    code = pack(on_top)
    assert (code.kind, code.name) == ("source", "on_top")
    place = code.module.replace(".", "/") + ".py"
    assert code.files[place] == Path(__file__).read_text()


def test_a_lambda_that_its_module_knows_by_a_name_travels_as_source() -> None:
    assert (pack(shown).kind, pack(shown).name) == ("source", "shown")


def test_a_closure_travels_as_a_pickle_that_needs_none_of_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = 3

    def scaled(x: int) -> int:
        return on_top(x) * factor

    code = pack(scaled)
    assert code.kind == "pickle"
    assert "def scaled(x: int) -> int:" in next(iter(code.files.values()))
    monkeypatch.delitem(sys.modules, __name__)
    assert cloudpickle.loads(code.blob)(1) == 24
    assert __name__ not in cloudpickle.list_registry_pickle_by_value()


def test_a_function_typed_at_a_prompt_travels_without_source() -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("def typed(x):\n    return x * 2\n", space)
    code = pack(space["typed"])
    assert (code.kind, code.files) == ("pickle", {})
    assert cloudpickle.loads(code.blob)(4) == 8


def test_an_installed_function_travels_by_its_name() -> None:
    import math

    code = pack(math.hypot)
    assert code.kind == "pickle"
    assert cloudpickle.loads(code.blob) is math.hypot


def test_what_cannot_travel_is_told_with_its_cure() -> None:
    lock = threading.Lock()
    with pytest.raises(BadRequest, match=r"cannot pickle '_thread.lock' object") as caught:
        pack(lambda: lock)
    assert "inside the function" in caught.value.hint
