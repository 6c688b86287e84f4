from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import cloudpickle
import msgspec
import numpy as np
import pytest

from headrace.binding import Binding
from headrace.context import Context
from headrace.errors import LoadError, UserError
from headrace.model import Event
from headrace.wire import BYTES, ITEMS, JSON, PICKLE, EventMeta, Payload, encode

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTheTypeChecker

META = EventMeta(id="7", source="beamline", type="org.example.shot", subject="s", extensions={"qosclass": "fast"})


@dataclass
class Frame:
    shot: int
    uri: str = ""


class Shape(msgspec.Struct):
    rows: int


class Named(TypedDict):
    name: str


class NoPort:
    def say(self, level: str, text: str) -> None: ...

    def progress(self, fraction: float, note: str) -> None: ...

    def stage(self, uri: str) -> Path:
        return Path(uri)

    def store(self, content: Path | bytes, name: str) -> str:
        return name


def context() -> Context:
    return Context(run_id="r1", invocation_id="i1", attempt=1, deadline=None, port=NoPort())


def call(fn: Callable[..., Any], body: bytes = b"null", kind: str = JSON, event: EventMeta | None = None) -> Payload:
    return Binding(fn).invoke(type=kind, body=body, event=event, context=context())


def value(fn: Callable[..., Any], body: bytes = b"null", kind: str = JSON, event: EventMeta | None = None) -> Any:
    result = call(fn, body, kind, event)
    return msgspec.json.decode(result.body) if result.type == JSON else result.body


def test_a_function_without_annotation_gets_decoded_json() -> None:
    assert value(lambda data: data, b'{"a":[1,2.5,null]}') == {"a": [1, 2.5, None]}


def test_a_function_without_annotation_gets_bytes_of_every_other_content_type() -> None:
    assert value(lambda data: [type(data).__name__, len(data)], b"\xff\x00", BYTES) == ["bytes", 2]
    assert value(lambda data: type(data).__name__, b"a,b", "text/csv") == "bytes"


def test_an_empty_body_is_null() -> None:
    assert value(lambda data: data is None, b"") is True


def test_content_types_that_end_in_json_are_json() -> None:
    assert value(lambda data: data["x"], b'{"x":1}', "application/geo+json; charset=utf-8") == 1


def test_a_function_may_take_nothing() -> None:
    assert value(lambda: 3, b'{"a":1}') == 3


def test_the_payload_is_decoded_into_the_annotated_type() -> None:
    def data_class(frame: Frame) -> list[Any]:
        return [type(frame).__name__, frame.shot]

    def struct(shape: Shape) -> int:
        return shape.rows

    def typed_dict(named: Named) -> str:
        return named["name"]

    def listed(frames: list[Frame]) -> int:
        return sum(frame.shot for frame in frames)

    def array(xs: np.ndarray) -> Any:
        return (xs * 2).sum()

    def optional(frame: Frame | None) -> bool:
        return frame is None

    assert value(data_class, b'{"shot":3}') == ["Frame", 3]
    assert value(struct, b'{"rows":4,"unknown":1}') == 4
    assert value(typed_dict, b'{"name":"x"}') == "x"
    assert value(listed, b'[{"shot":1},{"shot":2}]') == 3
    assert value(array, b"[1,2,3]") == 12
    assert value(optional, b"null") is True


def test_a_mismatch_names_the_function_the_parameter_and_the_field() -> None:
    def find_hits(frames: list[Frame]) -> None: ...

    with pytest.raises(
        UserError, match=r"find_hits: .*`frames`.*Expected `int`, got `str` - at `\$\[1\]\.shot`"
    ) as seen:
        call(find_hits, b'[{"shot":1},{"shot":"two"}]')
    assert not seen.value.retry
    assert seen.value.hint


def test_a_missing_field_is_named() -> None:
    def find_hits(frame: Frame) -> None: ...

    with pytest.raises(UserError, match="missing required field `shot`"):
        call(find_hits, b'{"uri":"x"}')


def test_what_is_not_json_is_told_so() -> None:
    with pytest.raises(UserError, match="it is not JSON"):
        call(lambda data: data, b"{broken")
    with pytest.raises(UserError):
        call(lambda data: data, b"[" * 100_000)


def test_text_is_given_to_who_asks_for_it() -> None:
    def words(text: str) -> int:
        return len(text.split())

    assert value(words, b"a b c", "text/plain") == 3
    assert value(words, "ä ö".encode("latin-1"), "text/plain; charset=ISO-8859-1") == 2
    assert value(words, b'"a b"') == 2
    with pytest.raises(UserError, match="text/plain; charset=utf-8, but it is not"):
        call(words, b"\xff", "text/plain; charset=utf-8")
    with pytest.raises(UserError, match="application/octet-stream"):
        call(words, b"a b", BYTES)


def test_bytes_are_given_to_who_asks_for_them_whatever_the_content_type() -> None:
    def size(raw: bytes) -> int:
        return len(raw)

    def either(raw: bytes | dict[str, int]) -> str:
        return type(raw).__name__

    assert value(size, b'{"a":1}') == 7
    assert value(size, b"\x00\x01", BYTES) == 2
    assert value(either, b'{"a":1}') == "dict"
    assert value(either, b"xyz", BYTES) == "bytes"


def test_data_of_another_content_type_does_not_fit_a_typed_function() -> None:
    def rows(shape: Shape) -> None: ...

    with pytest.raises(UserError, match="`Shape`, got data of the content type text/csv") as seen:
        call(rows, b"1,2", "text/csv")
    assert "application/json" in seen.value.hint


def test_a_function_that_asks_for_the_event_gets_all_of_it() -> None:
    def whole(event: Event) -> Any:
        return [event.id, event.source, event.type, event.subject, event.data, event.extensions, event.datacontenttype]

    assert value(whole, b'{"x":1}', event=META) == [
        "7", "beamline", "org.example.shot", "s", {"x": 1}, {"qosclass": "fast"}, "application/json",
    ]  # fmt: skip


def test_the_data_of_an_event_is_json_text_or_bytes() -> None:
    def data(event: Event) -> Any:
        return type(event.data).__name__

    assert value(data, b"{}", event=META) == "dict"
    assert value(data, b"<xml/>", "text/xml", META) == "str"
    assert value(data, b"<xml/>", "application/xml", META) == "bytes"


def test_a_function_that_asks_for_the_event_cannot_be_a_follow_up() -> None:
    def whole(event: Event) -> None: ...

    with pytest.raises(UserError, match="takes a whole event, but was started by another function"):
        call(whole, b"{}")


def test_the_context_goes_to_the_parameter_called_ctx_or_annotated_so() -> None:
    def by_name(data: Any, ctx: Any) -> Any:
        return [data, ctx.run_id]

    def by_type(c: Context, data: int) -> Any:
        return [data, c.run_id]

    def optional(data: int, here: Context | None = None) -> Any:
        return [data, here.run_id if here else None]

    def by_keyword(data: int, *, ctx: Context) -> Any:
        return [data, ctx.run_id]

    def alone(ctx: Context) -> Any:
        return [1, ctx.run_id]

    for fn in (by_name, by_type, optional, by_keyword, alone):
        assert Binding(fn).wants_context
        assert value(fn, b"1") == [1, "r1"], fn.__name__
    assert not Binding(lambda data: data).wants_context


def test_parameters_with_defaults_keep_them() -> None:
    def scaled(data: int, factor: int = 3, ctx: Any = None, *, offset: int = 1) -> Any:
        return [data * factor + offset, ctx.run_id]

    assert value(scaled, b"2") == [7, "r1"]


def test_a_second_payload_is_refused_before_anything_runs() -> None:
    def two(shot: int, energy: float, ctx: Context) -> None:
        raise AssertionError

    with pytest.raises(LoadError, match=r"two takes the parameters shot, energy.*one payload") as seen:
        call(two, b"1")
    assert "dataclass" in seen.value.hint


def test_a_type_that_json_cannot_make_is_told_so() -> None:
    def opened(path: Path) -> None: ...

    with pytest.raises(LoadError, match="`Path` cannot be made from JSON"):
        call(opened, b'"x"')


def test_an_annotation_for_the_type_checker_only_is_told_so() -> None:
    def exact(amount: OnlyForTheTypeChecker) -> None: ...

    with pytest.raises(LoadError, match=r"OnlyForTheTypeChecker.*`amount`"):
        call(exact, b"1")


def test_decorated_partial_and_callable_objects_are_called_like_functions() -> None:
    def plain(frame: Frame, ctx: Context) -> Any:
        return [frame.shot, ctx.run_id]

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    class Model:
        def __call__(self, frame: Frame) -> int:
            return frame.shot

    def scaled(factor: int, frame: Frame) -> int:
        return factor * frame.shot

    assert value(wrapped, b'{"shot":1}') == [1, "r1"]
    assert value(Model(), b'{"shot":2}') == 2
    assert value(functools.partial(scaled, 3), b'{"shot":2}') == 6
    assert value(len, b"[1,2]") == 2
    assert value(max, b"[1,2]") == 2


def test_the_results_of_a_map_are_decoded_one_by_one() -> None:
    def total(frames: list[Frame]) -> int:
        return sum(frame.shot for frame in frames)

    def plain(results: Any) -> Any:
        return [r if not isinstance(r, bytes) else r.decode() for r in results]

    def raw(results: list[bytes]) -> int:
        return len(b"".join(results))

    json = encode([(JSON, b'{"shot":1}'), (JSON, b'{"shot":5}')])
    mixed = encode([(JSON, b"[1]"), (BYTES, b"xyz")])
    assert value(total, json, ITEMS) == 6
    assert value(plain, mixed, ITEMS) == [[1], "xyz"]
    assert value(raw, mixed, ITEMS) == 6
    with pytest.raises(UserError, match=r"at `\$\[1\]\.shot`"):
        call(total, encode([(JSON, b'{"shot":1}'), (JSON, b'{"shot":null}')]), ITEMS)
    with pytest.raises(UserError, match="in member 1"):
        call(total, encode([(JSON, b'{"shot":1}'), (BYTES, b"xyz")]), ITEMS)
    with pytest.raises(UserError, match="results of a map"):
        call(lambda_taking_dict, json, ITEMS)


def lambda_taking_dict(data: dict[str, int]) -> None: ...


def test_pickled_arguments_are_passed_as_they_were() -> None:
    def area(width: float, height: float = 2.0, *, unit: str) -> tuple[float, str]:
        return width * height, unit

    result = call(area, cloudpickle.dumps(((3.0,), {"unit": "m"})), PICKLE)
    assert result.type == PICKLE
    assert cloudpickle.loads(result.body) == (6.0, "m")


def test_pickled_arguments_leave_the_context_to_the_platform() -> None:
    def here(a: int, ctx: Any = None) -> Any:
        return a, ctx if isinstance(ctx, str) else ctx.run_id

    assert cloudpickle.loads(call(here, cloudpickle.dumps(((1,), {})), PICKLE).body) == (1, "r1")
    assert cloudpickle.loads(call(here, cloudpickle.dumps(((1, "mine"), {})), PICKLE).body) == (1, "mine")


def test_pickled_arguments_that_do_not_open_are_a_users_error() -> None:
    with pytest.raises(UserError, match="arguments cannot be unpickled here"):
        call(lambda a: a, b"not a pickle", PICKLE)
    with pytest.raises(UserError, match="returned what cannot be pickled"):
        call(lambda: (n for n in [1]), cloudpickle.dumps(((), {})), PICKLE)


def test_an_async_function_is_awaited_and_its_loop_stays() -> None:
    loops: list[Any] = []
    left: list[asyncio.Task[None]] = []

    async def slow(data: int) -> int:
        loops.append(asyncio.get_running_loop())
        left.append(asyncio.get_running_loop().create_task(asyncio.sleep(3600)))
        await asyncio.sleep(0)
        return data + 1

    binding = Binding(slow)
    for n in (1, 2):
        assert msgspec.json.decode(binding.invoke(type=JSON, body=b"%d" % n, event=None, context=None).body) == n + 1
    assert loops[0] is loops[1]
    assert all(task.cancelled() for task in left)


async def test_an_async_function_can_be_called_where_a_loop_is_running() -> None:
    async def slow(data: int) -> int:
        await asyncio.sleep(0)
        return data + 1

    assert value(slow, b"1") == 2


def test_what_a_body_raises_comes_out_as_it_is() -> None:
    def broken(data: Any) -> None:
        raise ZeroDivisionError("the detector was off")

    with pytest.raises(ZeroDivisionError, match="detector"):
        call(broken)


def test_a_return_value_that_json_cannot_say_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"returned what cannot be sent.*object") as seen:
        call(lambda data: object())
    assert not seen.value.retry


def test_bytes_are_returned_as_bytes() -> None:
    assert call(lambda data: b"\x00\xff").type == BYTES
