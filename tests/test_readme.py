"""The README is true: its first function works when pasted, and its settings are those that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from infra import settings
from tests.platforms import UpProcess

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """Return the code block that follows a marker."""
    found = re.search(rf"<!-- first-function: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {name}"
    return found[1]


def between(name: str) -> str:
    return README.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].strip()


def test_the_first_function_works_when_pasted(shared_platform: UpProcess, tmp_path: Path) -> None:
    (tmp_path / "hits.py").write_text(block("hits.py"))
    environ = {
        **os.environ,
        "HEADRACE_URL": shared_platform.url,
        "HEADRACE_TOKEN": shared_platform.token,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ran = subprocess.run(
        ["sh", "-ec", block("commands")], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    promised = re.search(r"It prints `(.*?)`", README)
    assert promised
    assert ran.stdout.splitlines()[-1] == promised[1]


def test_the_first_function_fits_on_a_screen() -> None:
    assert len([line for line in block("hits.py").splitlines() if line.strip()]) <= 20


def test_every_setting_is_in_the_readme() -> None:
    assert between("settings") == settings.table(), "run: python -m tests.test_readme"


def test_every_command_is_in_the_readme() -> None:
    told = README.partition("## Commands")[2].partition("## Words")[0]
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "headrace.cli", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    names = re.findall(r"^│ ([a-z]+)  +[A-Z]", shown, re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"`(headrace )?{name}\b", told)] == []


def main() -> None:
    """Write the settings into the README."""
    head, _, rest = README.partition("<!-- settings -->\n")
    tail = rest.partition("<!-- /settings -->")[2]
    (ROOT / "README.md").write_text(f"{head}<!-- settings -->\n{settings.table()}\n<!-- /settings -->{tail}")


if __name__ == "__main__":
    main()
