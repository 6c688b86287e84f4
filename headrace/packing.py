"""Code by value: a function and the helpers beside it, made ready to travel.

A function of a file travels as source: the file and what it imports from its own folder, readable on the other side. A
lambda, a closure or a function typed at a prompt travels as a pickle, its source beside it for reading. Both are opened
in a worker's child only.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cloudpickle

from headrace.errors import BadRequest, HeadraceError, LoadError
from headrace.failures import error_text, user_traceback
from headrace.model import Code
from headrace.sdk import Declaration, declaration
from headrace.siblings import check_size, gather, is_local, root_of

_PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_process = threading.RLock()  # sys.path, sys.modules and cloudpickle's list of modules belong to the whole process


class Packed(NamedTuple):
    """A function of a user's file, ready to be registered."""

    declaration: Declaration
    code: Code
    doc: str


def pack(fn: Callable[..., Any]) -> Code:
    """Return the code of a function by value.

    A function that its module can be asked for by name travels as source. What was changed in its module after the
    import does not travel; pass such things in as the payload.

    Raises:
        BadRequest: it uses something that cannot travel, such as an open file.
        TooLarge: the code holds more than 4 MiB.
    """
    with _process:
        module = sys.modules.get(getattr(fn, "__module__", None) or "")
        name = None if module is None or not is_local(module) else _name_in(module, fn)
        root = None if module is None or name is None else root_of(module)
        if module is None or name is None or root is None:
            return _pickled(fn)
        return Code(
            kind="source",
            module=module.__name__,
            name=name,
            files=gather(root, module.__name__),
            python=_PYTHON_VERSION,
        )


def pack_file(path: str | Path) -> list[Packed]:
    """Load a user's file in this process and return every function that it declares, in the order of the file.

    The file is loaded under its own name with its folder first on ``sys.path``; both are as before when this returns.
    Declared functions that it takes over from its own helpers (``from steps import find_hits``) are among them.

    Raises:
        BadRequest: there is no such file, it declares nothing, or its name cannot be a module's.
        LoadError: the file raised when it was loaded; ``traceback`` holds the user's frames.
        TooLarge: its code holds more than 4 MiB.
    """
    path = _python_file(path)
    with _process, _as_in_a_fresh_process(path) as known:
        module = _load(path)
        added = [name for name in list(sys.modules) if name not in known]
        found = [_packed(path, module, name, fn, added) for name, fn in _declared(module, path.parent).items()]
    if not found:
        raise BadRequest(
            f"{path.name} declares no function",
            hint="Put @headrace.function (or @headrace.on(...)) above the functions that Headrace should run.",
        )
    names = [each.declaration.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise BadRequest(
            f"{path.name} declares two functions called {twice}", hint='Give one of them @function(name="...").'
        )
    return found


def pickled(value: object, code: Code | None = None) -> bytes:
    """Pickle a value for a worker's child: what the user's own modules define travels along by value.

    Modules that ``code`` brings as source are left out: they can be imported there.

    Raises:
        BadRequest: the value holds something that cannot travel.
    """
    with _process, _by_value(code.files if code else {}):
        try:
            blob: bytes = cloudpickle.dumps(value)
        except Exception as error:  # the pickling of user's objects runs the user's code, which may raise anything
            raise BadRequest(
                f"a value cannot travel: {error_text(error)}",
                hint="Open files, locks and connections stay where they are: open them inside the function.",
            ) from error
    return blob


# ---------------------------------------------------------------- a function


def _name_in(module: ModuleType, fn: object) -> str | None:
    """Return the name by which ``module`` gives out ``fn``, if it does."""
    qualname = str(getattr(fn, "__qualname__", ""))
    if qualname and "<" not in qualname:
        try:
            if attrgetter(qualname)(module) is fn:
                return qualname
        except AttributeError:
            pass
    return next((name for name, each in vars(module).items() if each is fn), None)


def _pickled(fn: Callable[..., Any]) -> Code:
    name = str(getattr(fn, "__qualname__", type(fn).__qualname__))
    blob = pickled(fn)
    try:
        files = {f"{re.sub('[^A-Za-z0-9_]+', '_', name).strip('_')}.py": textwrap.dedent(inspect.getsource(fn))}
    except (OSError, TypeError):
        files = {}  # typed at a prompt without a history, or made by something other than def: there is none to read
    check_size(len(blob) + sum(len(text.encode()) for text in files.values()), name)
    return Code(kind="pickle", name=name, blob=blob, files=files, python=_PYTHON_VERSION)


@contextmanager
def _by_value(shipped: dict[str, str]) -> Iterator[None]:
    """Let cloudpickle carry the contents of the user's own modules, except those that travel as files."""
    added = []
    try:
        for module in _own_modules():
            place = module.__name__.replace(".", "/")
            if f"{place}.py" not in shipped and f"{place}/__init__.py" not in shipped:
                cloudpickle.register_pickle_by_value(module)
                added.append(module)
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


_own: tuple[list[str], list[ModuleType]] = ([], [])


def _own_modules() -> list[ModuleType]:
    """Return the user's own modules that cloudpickle would name only; looked for again when others are imported."""
    global _own
    names = list(sys.modules)
    if names != _own[0]:
        _own = names, [module for name in names if _is_own(module := sys.modules[name]) and module.__name__ == name]
    return [module for module in _own[1] if module.__name__ not in cloudpickle.list_registry_pickle_by_value()]


def _is_own(module: object, folder: Path | None = None) -> bool:
    """Return whether the module is the user's, or lies in ``folder`` (a shipped example may be installed)."""
    return isinstance(module, ModuleType) and (is_local(module) or (folder is not None and root_of(module) == folder))


# ---------------------------------------------------------------- a file


def _python_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise BadRequest(f"there is no file {path}", hint="Name a Python file that declares functions.")
    path = path.resolve()
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise BadRequest(
            f"{path.name} is not the name of a Python module",
            hint="Call it NAME.py, where NAME holds letters, digits and underscores and does not begin with a digit.",
        )
    if path.stem in sys.stdlib_module_names - {"test"} or path.stem == "headrace":  # nobody imports Python's own tests
        raise BadRequest(
            f"{path.name} is named like the module {path.stem}, which it would hide",
            hint=f"Rename it, for instance to my_{path.name}.",
        )
    return path


@contextmanager
def _as_in_a_fresh_process(path: Path) -> Iterator[frozenset[str]]:
    """Put the file's folder first on the path and aside all modules that its neighbours are named like.

    Otherwise the ``helpers`` of a file deployed before would be taken for the ``helpers`` beside this one. Yields the
    names of the modules that stay.
    """
    folder = path.parent
    near = {path.stem} | {each.stem for each in folder.iterdir() if each.suffix == ".py" or each.is_dir()}
    aside = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in near and _is_own(module)}
    for name in aside:
        del sys.modules[name]
    known = frozenset(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield known
    finally:
        with suppress(ValueError):  # the file may have put the path in order itself
            sys.path.remove(str(folder))
        added = [(name, module) for name, module in list(sys.modules.items()) if name not in known]
        for name in [name for name, module in added if name in aside or _is_own(module, folder)]:
            del sys.modules[name]
        sys.modules.update(aside)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BadRequest(f"{path.name} is not a Python file", hint="Call it NAME.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    importlib.invalidate_caches()
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may raise anything, sys.exit() included
        raise LoadError(
            f"{path.name} cannot be loaded: {error if isinstance(error, HeadraceError) else error_text(error)}",
            hint=getattr(error, "hint", "") or "Run it with Python itself to see the same error.",
            traceback=user_traceback(error),
        ) from error
    return module


def _declared(module: ModuleType, folder: Path) -> dict[str, Callable[..., Any]]:
    """Return the declared functions of the user's own that the module names, each once."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in vars(module).items():
        home = sys.modules.get(getattr(value, "__module__", None) or "")
        if (
            declaration(value) is not None
            and _is_own(home, folder)
            and all(value is not each for each in found.values())
        ):
            found[name] = value
    return found


def _packed(path: Path, module: ModuleType, name: str, fn: Callable[..., Any], added: list[str]) -> Packed:
    declared = declaration(fn)
    if declared is None:
        raise BadRequest(f"{name} is not declared", hint="Put @headrace.function above it.")
    if fn.__module__ == module.__name__:
        files = gather(path.parent, module.__name__, added)
        code = Code(kind="source", module=module.__name__, name=name, files=files, python=_PYTHON_VERSION)
    else:
        code = pack(fn)
    return Packed(declared, code, inspect.getdoc(fn) or "")
