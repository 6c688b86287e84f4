"""Which files of the user's own folder a module needs, so that its helpers travel with it.

The imports are read from the text and followed from file to file. That finds what a function imports only when it
runs, and gives the same files, hence the same version, whatever else the process happens to have imported.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from headrace.errors import BadRequest, TooLarge

CODE_BYTES_MAX = 4 * 1024 * 1024

_PYTHON = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")}
_INSTALLED = {"site-packages", "dist-packages"}
_HEADRACE = Path(__file__).resolve().parent


def is_local(module: ModuleType) -> bool:
    """Return whether this is a module of the user's own: neither installed nor Python's, ours or ``__main__``."""
    if module.__name__ == "__main__":
        return False
    home = _home(module)
    return home is not None and _is_own(home)


@cache
def _is_own(home: Path) -> bool:
    if _INSTALLED.intersection(home.parts):
        return False
    return not any(home.is_relative_to(place) for place in (*_PYTHON, _HEADRACE))


def _home(module: ModuleType) -> Path | None:
    """Return the file of a module, or the folder of a package that has none."""
    file = getattr(module, "__file__", None)
    if not file:
        try:
            folders = list(getattr(module, "__path__", None) or [])
        except KeyError:  # a namespace package asks its parent for its path, which may be gone
            return None
        file = folders[0] if folders else None
    return _resolved(file) if isinstance(file, str) else None


@cache
def _resolved(file: str) -> Path:
    return Path(file).resolve()


def root_of(module: ModuleType) -> Path | None:
    """Return the folder from which ``module`` is imported, or None if its name and its file do not fit together."""
    path = _home(module)
    if path is None or path.suffix != ".py":
        return None
    parts = module.__name__.split(".")
    root = path.parents[len(parts)] if path.name == "__init__.py" else path.parents[len(parts) - 1]
    return root if path in _candidates(root, parts) else None


def gather(root: Path, name: str, loaded: Iterable[str] = ()) -> dict[str, str]:
    """Return the text of module ``name`` and of all it imports below ``root``, by path relative to ``root``.

    Args:
        root: the folder from which the module is imported.
        name: its dotted name.
        loaded: further modules to take along where they lie below ``root``, such as those imported by a computed name.

    Raises:
        TooLarge: the files together hold more than 4 MiB.
        BadRequest: a file is not text.
    """
    files: dict[str, str] = {}
    size = 0
    todo = [*_with_parents(name), *(each for other in loaded for each in _with_parents(other))]
    while todo:
        dotted = todo.pop()
        path = _find(root, dotted)
        key = path.relative_to(root).as_posix() if path else ""
        if path is None or key in files:
            continue
        files[key] = _read(path)
        size += len(files[key].encode())
        check_size(size, f"{name} and the modules it imports from {root}", f"The last one read was {key}.")
        todo += _imported(files[key], dotted, is_package=path.name == "__init__.py")
    return dict(sorted(files.items()))


def check_size(size_bytes: int, what: str, which: str = "") -> None:
    """Raise TooLarge if code of this size cannot travel."""
    if size_bytes > CODE_BYTES_MAX:
        raise TooLarge(
            f"{what}: more than {CODE_BYTES_MAX // 1024**2} MiB of code. {which}".rstrip(),
            hint="Keep data out of the code: read it from a file with ctx.stage(uri), or pass it in as the payload.",
        )


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not text: {error}", hint="Save it as UTF-8.") from error


def _with_parents(dotted: str) -> list[str]:
    """Return "a", "a.b" and "a.b.c" for "a.b.c": importing a module imports the packages around it."""
    parts = dotted.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _candidates(root: Path, parts: list[str]) -> tuple[Path, Path]:
    """Return where Python looks for a module, in its order: a package wins over a file of the same name."""
    place = root.joinpath(*parts)
    return place / "__init__.py", place.with_name(place.name + ".py")


def _find(root: Path, dotted: str) -> Path | None:
    """Return the file below ``root`` that an import of ``dotted`` means, or None where it means something else."""
    parts = dotted.split(".")
    if not all(parts) or parts[0] == "headrace":
        return None
    top = sys.modules.get(parts[0])
    if isinstance(top, ModuleType) and _home(top) not in (*_candidates(root, parts[:1]), root / parts[0]):
        return None  # Python already knows another module of this name, and that is the one the file got
    candidates = _candidates(root, parts)
    known = sys.modules.get(dotted)
    home = _home(known) if isinstance(known, ModuleType) else None
    return home if home in candidates else next((path for path in candidates if path.is_file()), None)


def _imported(text: str, name: str, *, is_package: bool) -> Iterator[str]:
    """Yield the dotted names that a module's text imports, with the packages around them."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return  # an import of it would have failed; it is taken along only because somebody names it
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            if base:
                yield from _with_parents(base)
            for alias in node.names:
                yield f"{base}.{alias.name}" if base else alias.name
