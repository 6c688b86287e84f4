"""How a payload becomes the arguments of a function, and what it returns becomes a payload.

A function takes one payload, and a context if it names one. Annotated ``Event`` it gets the whole event; otherwise the
event's data, decoded into the annotated type. The same code runs in a worker's child and in ``headrace.testing``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

from headrace.context import Context, to_payload
from headrace.coroutines import settle
from headrace.data import Mismatch, Read, Unusable, accepted, data_of, is_event, reader
from headrace.errors import BadRequest, LoadError, UserError
from headrace.failures import error_text
from headrace.media import essence
from headrace.model import Event
from headrace.wire import PICKLE, EventMeta, Payload


class _Shape(NamedTuple):
    """Which arguments an ordinary call passes: ``payload`` or ``context``, by position and by name."""

    by_position: tuple[str, ...]
    by_name: dict[str, str]
    payload: inspect.Parameter | None
    context: inspect.Parameter | None


class Binding:
    """A function, and how it is called. Made once per function, for looking at a signature costs more than a call."""

    def __init__(self, function: Callable[..., Any], name: str = "") -> None:
        """Look at the signature of ``function``; ``name`` is what errors call it.

        Nothing is refused here: a function of any shape may be called with pickled arguments.
        """
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.takes_event = False
        self._signature = _signature(function)
        self._shape, self._refused = self._look()
        self._read: Read | None = None
        self.wants_context = self._shape.context is not None
        payload = self._shape.payload
        if payload is not None and self._refused is None:
            try:
                hint = self._hint(payload)
                self.takes_event = is_event(hint)
                self._read = None if self.takes_event else reader(hint)
            except LoadError as error:
                self._refused = error
            except Unusable as error:
                self._refused = self._no_such_type(error)

    def invoke(
        self,
        *,
        type: str,  # noqa: A002 - the content type, called so in every message
        body: bytes,
        event: EventMeta | None,
        context: Context | None,
    ) -> Payload:
        """Call the function with this payload and return what it returned.

        Args:
            type: the content type of the body.
            body: the payload, or the data of the event.
            event: the attributes of the event; None for what another function started.
            context: handed to the function; needed only if it ``wants_context``.

        Raises:
            UserError: the data does not fit the function, or what it returned cannot be sent.
            LoadError: the function cannot be called with one payload, or the type of its payload is not known.
            BaseException: whatever the body raises, as it is.
        """
        if type == PICKLE:
            args, kwargs = self._unpickled(body, context)
            return self._pickled(settle(self.function(*args, **kwargs)))
        if self._refused is not None:
            raise self._refused
        given: dict[str, Any] = {"context": context, "payload": None}
        if self._shape.payload is not None:
            given["payload"] = self._payload(type, body, event)
        by_name = {key: given[role] for key, role in self._shape.by_name.items()}
        value = settle(self.function(*(given[role] for role in self._shape.by_position), **by_name))
        try:
            return to_payload(value)
        except BadRequest as error:
            raise self._unsendable(error) from error

    # ------------------------------------------------------------ the signature

    def _look(self) -> tuple[_Shape, LoadError | None]:
        by_position: list[str] = []
        by_name: dict[str, str] = {}
        payload: inspect.Parameter | None = None
        context: inspect.Parameter | None = None
        surplus: list[str] = []
        skipped = False
        for parameter in self._signature.parameters.values():
            if context is None and self._is_context(parameter):
                context, role = parameter, "context"
            elif payload is None and parameter.kind is not parameter.VAR_KEYWORD:
                payload, role = parameter, "payload"
            else:
                variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                if parameter.default is parameter.empty and (payload is None or not variadic):
                    surplus.append(str(parameter))
                skipped = True
                continue
            if parameter.kind is parameter.KEYWORD_ONLY or (skipped and parameter.kind is not parameter.VAR_POSITIONAL):
                by_name[parameter.name] = role
            else:
                by_position.append(role)
        return _Shape(tuple(by_position), by_name, payload, context), self._refusal(payload, surplus)

    def _refusal(self, payload: inspect.Parameter | None, surplus: list[str]) -> LoadError | None:
        if not surplus:
            return None
        taken = ", ".join([*([payload.name] if payload else []), *surplus])
        return LoadError(
            f"{self.name} takes the parameters {taken}; a function takes one payload, and ctx if it names one",
            hint="Take one dict or dataclass with all of it, or give the other parameters defaults.",
        )

    def _is_context(self, parameter: inspect.Parameter) -> bool:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return False
        if parameter.name == "ctx":
            return True
        text = parameter.annotation
        if isinstance(text, str) and "Context" not in text:
            return False  # resolving a string costs a moment and may fail for reasons that are told elsewhere
        try:
            hint = self._hint(parameter)
        except LoadError:
            return False
        return hint is Context or Context in getattr(hint, "__args__", ())

    def _hint(self, parameter: inspect.Parameter) -> Any:
        annotation = parameter.annotation
        if annotation is parameter.empty:
            return Any
        holder = SimpleNamespace(__annotations__={"it": annotation})
        try:
            return get_type_hints(holder, _globals_of(self.function), _locals_of(self.function), include_extras=True)[
                "it"
            ]
        except Exception as error:
            # A name that is imported for the type checker only is not there when the function runs.
            known = {"Event": Event, "Context": Context}.get(str(annotation).rpartition(".")[2])
            if known is not None:
                return known
            raise LoadError(
                f"{self.name}: the annotation {annotation!r} of its parameter `{parameter.name}` is not known: {error}",
                hint="Import it where the function's module is loaded, not only for the type checker.",
            ) from error

    def _named(self) -> str:
        payload = self._shape.payload
        return f"`{payload.name}`" if payload else "`data`"

    # ------------------------------------------------------------ ordinary payloads

    def _payload(self, content_type: str, body: bytes, event: EventMeta | None) -> Any:
        if self.takes_event and event is None:
            raise UserError(
                f"{self.name} takes a whole event, but was started by another function, which passes on data only",
                hint=f"Annotate {self._named()} with the type of the data, such as dict.",
                transient=False,
            )
        try:
            if self._read is not None:
                return self._read(content_type, body)
            return None if event is None else _event(event, content_type, data_of(content_type, body))
        except Mismatch as error:
            raise UserError(
                f"{self.name}: the data does not fit its parameter {self._named()}: {error}",
                hint=error.hint,
                transient=False,
            ) from error
        except Unusable as error:
            raise self._no_such_type(error) from error

    def _no_such_type(self, error: Unusable) -> LoadError:
        return LoadError(
            f"{self.name}: the type of its parameter {self._named()} cannot be used: {error}",
            hint=f"Annotate it as {accepted()}, or leave the annotation away.",
        )

    def _unsendable(self, error: BadRequest) -> UserError:
        return UserError(f"{self.name} returned what cannot be sent: {error}", hint=error.hint, transient=False)

    # ------------------------------------------------------------ pickled calls, as the executor makes them

    def _unpickled(self, body: bytes, context: Context | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        import cloudpickle  # here, so that whoever imports this module for its types holds no unpickler

        try:
            args, kwargs = cloudpickle.loads(body)
        except Exception as error:  # unpickling runs constructors of the user's, which may raise anything
            raise UserError(
                f"{self.name}: its arguments cannot be unpickled here: {error_text(error)}",
                hint="Classes and modules that the arguments use must be installed here, or travel with the function.",
                transient=False,
            ) from error
        parameter = self._shape.context
        if parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY and not self._given(args, kwargs):
            kwargs = {**kwargs, parameter.name: context}
        return args, kwargs

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether the caller passed something for the context already, or what cannot be passed at all."""
        try:
            bound = self._signature.bind_partial(*args, **kwargs)
        except TypeError:
            return True  # the call itself says best what is wrong
        return self._shape.context is not None and self._shape.context.name in bound.arguments

    def _pickled(self, value: object) -> Payload:
        import cloudpickle

        try:
            body: bytes = cloudpickle.dumps(value)
        except Exception as error:  # as above: pickling runs the user's __reduce__
            raise UserError(
                f"{self.name} returned what cannot be pickled: {error_text(error)}",
                hint="Return plain data, not open files, locks or connections.",
                transient=False,
            ) from error
        return Payload(type=PICKLE, body=body, size=len(body))


def _event(meta: EventMeta, content_type: str, data: Any) -> Event:
    return Event(
        id=meta.id,
        source=meta.source,
        type=meta.type,
        subject=meta.subject,
        time=meta.time,
        datacontenttype=essence(content_type),
        dataschema=meta.dataschema,
        data=data,
        extensions=meta.extensions,
    )


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        # Some builtins tell no signature; they are called with the payload alone.
        payload = inspect.Parameter("data", inspect.Parameter.POSITIONAL_ONLY)
        return inspect.Signature([payload])


def _inner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if hasattr(function, "__globals__") or isinstance(function, type) else type(function).__call__


def _globals_of(function: Callable[..., Any]) -> dict[str, Any]:
    return getattr(_inner(function), "__globals__", {})


def _locals_of(function: Callable[..., Any]) -> dict[str, Any]:
    inner = _inner(function)
    return dict(inspect.getclosurevars(inner).nonlocals) if inspect.isfunction(inner) else {}
