"""From code by value to something that can be called. Happens in a worker's child and nowhere else.

The files of a version become modules that live in memory. A child may hold several versions whose files have the same
names, so each keeps its own modules; the ones in ``sys.modules`` are exchanged when another version is activated, so
that an import inside a function body also finds the module of its own version. What is installed stays shared.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec
from operator import attrgetter
from pathlib import PurePosixPath
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from headrace.errors import LoadError
from headrace.failures import error_text, user_traceback
from headrace.model import Code
from headrace.sdk import declaration

_PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

_active: Bundle | None = None


class Loaded(NamedTuple):
    """A function that is ready to be called while its ``bundle`` is active."""

    function: Callable[..., Any]
    bundle: Bundle


def load(code: Code) -> Loaded:
    """Load a function from its code and leave its modules active.

    Raises:
        LoadError: it needs another Python, a file cannot be run, or there is no such function in it.
    """
    if code.kind == "pickle":
        _check_python(code)
    # The files of a pickle are for reading only: a function called `random` must not become a module of that name.
    bundle = Bundle({} if code.kind == "pickle" else code.files)
    bundle.activate()
    try:
        function = _unpickled(code, bundle) if code.kind == "pickle" else _imported(code, bundle)
        if not callable(function):
            raise LoadError(
                f"{code.name} in {code.module or 'the pickle'} is a {type(function).__name__}, not a function",
                hint="Register something that can be called.",
            )
    except BaseException:
        bundle.deactivate()
        raise
    return Loaded(function, bundle)


def _check_python(code: Code) -> None:
    made_with = ".".join(code.python.split(".")[:2])
    if made_with and made_with != _PYTHON_VERSION:
        raise LoadError(
            f"{code.name} was pickled by Python {made_with} and cannot be opened by Python {_PYTHON_VERSION}",
            hint=f"Register it from Python {_PYTHON_VERSION}, or put it into a file: source travels between versions.",
        )


def _unpickled(code: Code, bundle: Bundle) -> Any:
    import cloudpickle  # here, so that only who opens pickles holds an unpickler

    try:
        function = cloudpickle.loads(code.blob)
    except BaseException as error:  # unpickling runs what the user's classes say, sys.exit() included
        raise _not_loaded(code.name, error) from error
    for path, lines in _source_lines(code, function):
        bundle.show(path, lines)
    return function


def _imported(code: Code, bundle: Bundle) -> Any:
    if code.module not in bundle.modules:
        raise LoadError(
            f"there is no module {code.module} among the files {', '.join(sorted(code.files)) or '(none)'}",
            hint="Deploy the file that defines the function.",
        )
    try:
        module = importlib.import_module(code.module)
    except BaseException as error:  # the user's module may raise anything, sys.exit() included
        raise _not_loaded(bundle.modules[code.module].path, error) from error
    try:
        return attrgetter(code.name)(module)
    except AttributeError:
        pass
    for value in vars(module).values():
        declared = declaration(value)
        if declared is not None and declared.name == code.name:
            return value
    near = difflib.get_close_matches(code.name, [name for name in vars(module) if not name.startswith("_")], n=1)
    raise LoadError(
        f"{bundle.modules[code.module].path} has no function {code.name}",
        hint=f"Did you mean {near[0]}?" if near else "Deploy the file that defines it.",
    )


def _not_loaded(what: str, error: BaseException) -> LoadError:
    said = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else error_text(error)
    hint = "Run the file with Python itself to see the same error."
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"Install {error.name.partition('.')[0]} where functions run, or deploy it beside the function."
    return LoadError(f"{what} cannot be loaded: {said}", hint=hint, traceback=user_traceback(error))


def _source_lines(code: Code, function: object) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of a pickled function by the path that its frames name, which is on the user's machine."""
    made = getattr(function, "__code__", None)
    if not isinstance(made, CodeType) or len(code.files) != 1:
        return
    (text,) = code.files.values()
    lines = text.splitlines(keepends=True)
    first = made.co_firstlineno - 1
    if not any(re.search(rf"\bdef {re.escape(made.co_name)}\b|\blambda\b", line) for line in lines[first : first + 20]):
        lines = ["\n"] * first + lines  # only the function itself came along: move it to where it was
    yield made.co_filename, lines


# ---------------------------------------------------------------- modules in memory


class _Source(NamedTuple):
    """Where a module of a bundle is: the path tracebacks show, its text, and whether it is a package."""

    path: str
    text: str
    is_package: bool


class Bundle(MetaPathFinder, InspectLoader):
    """The files of one version as importable modules. One bundle of a process is active at a time."""

    def __init__(self, files: dict[str, str]) -> None:
        self.modules = _modules(files)
        self._roots = frozenset(name for name in self.modules if "." not in name)
        self._kept: dict[str, ModuleType] = {}
        self._hidden: dict[str, ModuleType] = {}
        self._lines = {each.path: each.text.splitlines(keepends=True) for each in self.modules.values()}

    def show(self, path: str, lines: list[str]) -> None:
        """Let tracebacks print these lines for frames of ``path`` while the bundle is active."""
        self._lines[path] = lines
        linecache.cache[path] = (1, None, lines, path)

    def activate(self) -> None:
        """Make imports find these files first, and put away the modules of the bundle that was active."""
        global _active
        if _active is self:
            return
        if _active is not None:
            _active.deactivate()
        self._hidden = self._take()
        sys.modules.update(self._kept)
        sys.meta_path.insert(0, self)
        for path, lines in self._lines.items():
            linecache.cache[path] = (1, None, lines, path)  # without a time stamp it is never looked for on disk
        _active = self

    def deactivate(self) -> None:
        """Put everything back as it was before ``activate``; modules of these files are kept for the next time."""
        global _active
        if _active is not self:
            return
        self._kept = self._take()
        sys.modules.update(self._hidden)
        sys.meta_path.remove(self)
        for path in self._lines:
            linecache.cache.pop(path, None)
        _active = None

    def _take(self) -> dict[str, ModuleType]:
        """Take all modules out of ``sys.modules`` whose names begin like ours."""
        if not self._roots:
            return {}
        taken = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in self._roots}
        for name in taken:
            del sys.modules[name]
        return taken

    # ------------------------------------------------------------ what the import system asks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that is among the files."""
        source = self.modules.get(fullname)
        if source is None:
            return None
        spec = ModuleSpec(fullname, self, origin=source.path, is_package=source.is_package)
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(str(PurePosixPath(source.path).parent))
        return spec

    def get_source(self, fullname: str) -> str:
        """Return the text of a module."""
        source = self.modules.get(fullname)
        if source is None:
            raise ImportError(f"{fullname} is not among the files", name=fullname)
        return source.text

    def is_package(self, fullname: str) -> bool:
        """Return whether a module is a folder of others."""
        return fullname in self.modules and self.modules[fullname].is_package

    def get_code(self, fullname: str) -> CodeType:
        """Return the compiled text of a module."""
        path = self.modules[fullname].path
        return compile(self.get_source(fullname), path, "exec", dont_inherit=True)


def _modules(files: dict[str, str]) -> dict[str, _Source]:
    """Return the module that each file is, by dotted name. Folders without ``__init__.py`` are packages too."""
    found: dict[str, _Source] = {}
    for key, text in files.items():
        path = PurePosixPath(key)
        parts = path.with_suffix("").parts
        is_package = parts[-1:] == ("__init__",)
        parts = parts[:-1] if is_package else parts
        if path.suffix != ".py" or not parts or not all(part.isidentifier() for part in parts):
            continue
        _check_root(parts[0], key)
        found[".".join(parts)] = _Source(str(path), text, is_package)
        for depth in range(1, len(parts)):
            folder = parts[:depth]
            found.setdefault(".".join(folder), _Source(f"{'/'.join(folder)}/__init__.py", "", True))
    return found


def _check_root(name: str, key: str) -> None:
    """Refuse a module that would stand in for one of Python's own that are always there, or for ours."""
    if name == "headrace" or BuiltinImporter.find_spec(name) or FrozenImporter.find_spec(name):
        raise LoadError(
            f"{key} is named like the module {name}, which it would hide", hint=f"Rename it, for instance to my_{name}."
        )
