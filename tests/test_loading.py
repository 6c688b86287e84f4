from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

from headrace import loading
from headrace.errors import LoadError
from headrace.loading import load
from headrace.model import Code

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def _modules_as_before() -> Iterator[None]:
    before = dict(sys.modules)
    yield
    if loading._active is not None:
        loading._active.deactivate()
    assert {name: module for name, module in sys.modules.items() if before.get(name, module) is not module} == {}


def source(files: dict[str, str], module: str = "shot", name: str = "run") -> Code:
    return Code(kind="source", module=module, name=name, files=files)


def test_a_file_becomes_a_module_whose_function_can_be_called() -> None:
    loaded = load(source({"shot.py": "def run(x):\n    return x + 1\n"}))
    assert loaded.function(1) == 2
    assert loaded.function.__module__ == "shot"
    assert sys.modules["shot"].__file__ == "shot.py"


def test_the_files_beside_it_are_imported_absolutely_relatively_and_late() -> None:
    files = {
        "lab/__init__.py": "from .peaks import find\n",
        "lab/peaks.py": "from . import shapes\ndef find(): return shapes.AREA\n",
        "lab/shapes.py": "AREA = 12\n",
        "lab/deep/later.py": "from ..shapes import AREA\nVALUE = AREA * 2\n",
        "shot.py": "import lab\ndef run():\n    from lab.deep.later import VALUE\n    return lab.find() + VALUE\n",
    }
    assert load(source(files)).function() == 36


def test_a_function_inside_a_package_is_found_by_its_dotted_module() -> None:
    files = {"lab/__init__.py": "", "lab/peaks.py": "class Finder:\n    @staticmethod\n    def run(): return 5\n"}
    assert load(source(files, "lab.peaks", "Finder.run")).function() == 5


def test_a_function_is_also_found_by_the_name_it_was_declared_with() -> None:
    text = "from headrace import function\n@function(name='find-hits')\ndef run(): return 5\n"
    assert load(source({"shot.py": text}, name="find-hits")).function() == 5


def test_two_versions_with_modules_of_the_same_name_do_not_see_each_other() -> None:
    shot = "import helper\nSTATE = []\ndef run():\n    import late\n    STATE.append(1)\n"
    shot += "    return helper.N, late.N, len(STATE)\n"
    one = load(source({"shot.py": shot, "helper.py": "N = 1\n", "late.py": "N = 10\n"}))
    two = load(source({"shot.py": shot, "helper.py": "N = 2\n", "late.py": "N = 20\n"}))
    assert two.function() == (2, 20, 1)
    one.bundle.activate()
    assert one.function() == (1, 10, 1)
    two.bundle.activate()
    assert two.function() == (2, 20, 2)
    assert sys.modules["helper"].__dict__["N"] == 2
    two.bundle.deactivate()
    assert "helper" not in sys.modules


def test_a_version_does_not_see_the_modules_of_another() -> None:
    load(source({"shot.py": "def run(): pass\n", "helper.py": ""}))
    with pytest.raises(LoadError, match="No module named 'helper'"):
        load(source({"shot.py": "import helper\ndef run(): pass\n"}))


def test_files_named_like_folders_of_headrace_are_the_users() -> None:
    names = ["functions", "workers", "streams", "gateway", "infra", "tests"]
    before = {name: importlib.import_module(name) for name in names}
    files = {f"{name}.py": f"WHO = 'user {name}'\n" for name in names}
    files["shot.py"] = (
        "".join(f"import {n}\n" for n in names) + f"def run(): return [m.WHO for m in ({', '.join(names)})]\n"
    )
    loaded = load(source(files))
    assert loaded.function() == [f"user {name}" for name in names]
    loaded.bundle.deactivate()
    assert {name: sys.modules[name] for name in names} == before


def test_a_file_named_like_an_installed_module_is_the_users_for_the_user_only() -> None:
    import colorsys

    loaded = load(
        source({"shot.py": "import colorsys\ndef run(): return colorsys.MINE\n", "colorsys.py": "MINE = 1\n"})
    )
    assert loaded.function() == 1
    loaded.bundle.deactivate()
    assert importlib.import_module("colorsys") is colorsys


@pytest.mark.parametrize("name", ["headrace", "sys", "os"])
def test_a_file_that_would_hide_what_python_or_headrace_needs_is_refused(name: str) -> None:
    with pytest.raises(LoadError, match=f"named like the module {name}") as seen:
        load(source({"shot.py": "", f"{name}.py": ""}))
    assert f"my_{name}" in seen.value.hint


def test_a_traceback_shows_the_lines_of_the_files() -> None:
    loaded = load(source({"shot.py": "def run():\n    raise ValueError('bad shot')  # here\n"}))
    with pytest.raises(ValueError, match="bad shot") as seen:
        loaded.function()
    shown = "".join(traceback.format_exception(seen.value))
    assert 'File "shot.py", line 2, in run' in shown
    assert "raise ValueError('bad shot')  # here" in shown


def test_the_traceback_of_a_load_error_holds_the_users_frames_only() -> None:
    files = {"shot.py": "import helper\ndef run(): pass\n", "helper.py": "x = 1\ny = x / 0\n"}
    with pytest.raises(LoadError, match=r"shot\.py cannot be loaded: ZeroDivisionError: division by zero") as seen:
        load(source(files))
    assert 'File "shot.py", line 1' in seen.value.traceback
    assert "y = x / 0" in seen.value.traceback
    assert "headrace" not in seen.value.traceback
    assert "importlib" not in seen.value.traceback


def test_a_syntax_error_shows_its_line() -> None:
    with pytest.raises(LoadError, match="SyntaxError") as seen:
        load(source({"shot.py": "def run(:\n    pass\n"}))
    assert "def run(:" in seen.value.traceback


def test_a_module_that_is_not_installed_is_named_with_the_cure() -> None:
    with pytest.raises(LoadError, match="No module named 'scipy_of_the_future'") as seen:
        load(source({"shot.py": "import scipy_of_the_future.fft\ndef run(): pass\n"}))
    assert "Install scipy_of_the_future" in seen.value.hint


def test_a_module_that_exits_is_a_load_error() -> None:
    with pytest.raises(LoadError, match=r"called sys\.exit\(3\)"):
        load(source({"shot.py": "import sys\nsys.exit(3)\n"}))


def test_a_function_that_is_not_there_is_told_with_its_neighbour() -> None:
    with pytest.raises(LoadError, match="no function find_hit") as seen:
        load(source({"shot.py": "def find_hits(): pass\n"}, name="find_hit"))
    assert "find_hits" in seen.value.hint
    with pytest.raises(LoadError, match="is a int, not a function"):
        load(source({"shot.py": "run = 3\n"}))
    with pytest.raises(LoadError, match="no module other"):
        load(source({"shot.py": ""}, "other"))


def test_a_load_that_failed_leaves_nothing_behind() -> None:
    with pytest.raises(LoadError):
        load(source({"shot.py": "import helper\n1 / 0\n", "helper.py": ""}))
    assert "shot" not in sys.modules
    assert "helper" not in sys.modules
    assert loading._active is None


def pickled(value: Any, *, python: str = PYTHON, files: dict[str, str] | None = None) -> Code:
    return Code(kind="pickle", name="run", blob=cloudpickle.dumps(value), python=python, files=files or {})


def test_a_pickled_closure_is_called() -> None:
    factor = 3
    assert load(pickled(lambda x: x * factor)).function(2) == 6


def test_a_pickle_of_another_python_is_refused_with_both_versions() -> None:
    with pytest.raises(LoadError, match=rf"Python 3\.9 and cannot be opened by Python {PYTHON}"):
        load(pickled(lambda: 1, python="3.9"))
    assert load(pickled(lambda: 1, python=f"{PYTHON}.99")).function() == 1


def test_a_pickle_that_does_not_open_is_a_load_error() -> None:
    with pytest.raises(LoadError, match="run cannot be loaded"):
        load(Code(kind="pickle", name="run", blob=b"garbage", python=PYTHON))
    with pytest.raises(LoadError, match="not a function"):
        load(pickled(3))


def test_a_traceback_of_a_pickled_function_shows_its_lines() -> None:
    text = "def run():\n    raise ValueError('bad shot')  # here\n"
    space: dict[str, Any] = {}
    exec(compile("\n" * 9 + text, "/home/user/notebook.py", "exec"), space)
    loaded = load(pickled(space["run"], files={"run.py": text}))
    with pytest.raises(ValueError, match="bad shot") as seen:
        loaded.function()
    shown = "".join(traceback.format_exception(seen.value))
    assert 'File "/home/user/notebook.py", line 11, in run' in shown
    assert "# here" in shown


def test_the_source_beside_a_pickle_does_not_become_a_module() -> None:
    load(pickled(lambda: 1, files={"colorsys.py": "def colorsys(): pass\n"}))
    assert hasattr(importlib.import_module("colorsys"), "rgb_to_hsv")
