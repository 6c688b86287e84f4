"""A test that cannot run says so; where everything has to be installed, that is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = """
import pytest

def test_needs_something():
    pytest.skip("needs what is not here")
"""

WHOLE = """
import pytest

pytest.importorskip("a_module_that_nobody_has", reason="needs what is not here")

def test_needs_something():
    pass
"""


RIGHT = """
import pytest

def test_needs_a_right():
    pytest.skip("not permitted here: this user may not mount")
"""


@pytest.mark.parametrize(
    ("source", "ci", "code"),
    [(INSIDE, "", 0), (INSIDE, "true", 1), (WHOLE, "", 0), (WHOLE, "true", 1), (RIGHT, "", 0), (RIGHT, "true", 0)],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_skip_is_a_failure_where_everything_has_to_be_installed(
    tmp_path: Path, source: str, ci: str, code: int, workers: str
) -> None:
    (tmp_path / "test_sample.py").write_text(source)
    root = Path(__file__).parent.parent
    given = ["-p", "tests.conftest", "-c", os.devnull, "--rootdir", str(tmp_path), "-n", workers, str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *given],
        cwd=root,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    # A file that is skipped as a whole leaves no test at all (5), one that fails so is an error of collection (2).
    assert ran.returncode in ({0, 5} if code == 0 else {1, 2}), ran.stdout
    assert ("CI=true does not allow" in ran.stdout) == bool(code)
