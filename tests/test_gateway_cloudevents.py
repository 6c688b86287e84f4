"""Reading CloudEvents: the official cases, the HTTP binding, and what must be refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from gateway.cloudevents import BATCH, STRUCTURED, Received, deadline_of, read_events
from gateway.media import check_json, parse_media, read_payload
from gateway.problems import Unreadable
from headrace.errors import BadRequest, TooLarge
from headrace.wire import BYTES, JSON, NOTHING

DATA = Path(__file__).parent / "data" / "cloudevents"


def cases(file: str) -> list[Any]:
    found = json.loads((DATA / file).read_bytes())
    return [pytest.param(case, id=case["id"]) for case in found.get("tests") or found.get("vectors") or found["cases"]]


GOLDEN = json.loads((DATA / "golden.json").read_bytes())


def read(content_type: str | None, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> list[Received]:
    return read_events(content_type, headers, body, events_max=500)


def structured(**attributes: Any) -> Received:
    event = {"specversion": "1.0", "id": "e-1", "source": "/s", "type": "t", **attributes}
    [found] = read(STRUCTURED, json.dumps({k: v for k, v in event.items() if v is not ...}).encode())
    return found


def binary(body: bytes = b"", content_type: str | None = None, **attributes: str) -> Received:
    given_ = {"specversion": "1.0", "id": "e-1", "source": "/s", "type": "t", **attributes}
    [found] = read(content_type, body, [(f"ce-{k}", v) for k, v in given_.items()])
    return found


def same(found: Received, wanted: dict[str, Any]) -> None:
    """Compare an event with a golden one; times as instants, binary and URI values as the text they came as."""
    event = found.event
    for name, value in wanted.items():
        if name in ("id", "source", "type", "subject", "dataschema"):
            assert getattr(event, name) == value
        elif name == "time":
            assert event.time is not None
            assert datetime.fromisoformat(event.time) == datetime.fromisoformat(value)
        elif name == "datacontenttype":
            if found.payload is not NOTHING:
                assert found.payload.type == value
        elif name == "data":
            text = found.payload.body.decode()
            assert (json.loads(text) if found.payload.type == JSON else text) == value
        elif name != "specversion":
            assert event.extensions[name] == (value.removeprefix("base64:") if isinstance(value, str) else value)


@pytest.mark.parametrize("case", cases("valid-events.json"))
def test_every_valid_event_of_the_official_cases_is_read(case: dict[str, Any]) -> None:
    [found] = read(STRUCTURED, json.dumps(case["event"]).encode())
    same(found, GOLDEN["events"][case["sampleId"]])


@pytest.mark.parametrize("case", cases("invalid-events.json"))
def test_every_invalid_event_of_the_official_cases_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        read(STRUCTURED, json.dumps(case["event"]).encode())


@pytest.mark.parametrize("case", cases("valid-batches.json"))
def test_every_valid_batch_of_the_official_cases_is_read(case: dict[str, Any]) -> None:
    found = read(BATCH, json.dumps(case["batch"]).encode())
    wanted = GOLDEN["batches"][case["sampleId"]]
    assert len(found) == len(wanted)
    for one, name in zip(found, wanted, strict=True):
        same(one, GOLDEN["events"][name])


@pytest.mark.parametrize("case", cases("invalid-batches.json"))
def test_every_invalid_batch_of_the_official_cases_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        read(BATCH, json.dumps(case["batch"]).encode())


@pytest.mark.parametrize("case", cases("http_raw_vectors.json"))
def test_every_raw_request_is_read_or_refused_as_the_http_binding_says(case: dict[str, Any]) -> None:
    headers = [(name, value) for name, value in case["request"]["headers"]]
    content_type = next((v for n, v in headers if n.lower() == "content-type"), None)
    body = base64.b64decode(case["request"]["body_base64"])
    if case["expect"]["status"] == "4xx":
        with pytest.raises(BadRequest):
            read(content_type, body, headers)
        return
    found = read(content_type, body, headers)
    assert len(found) == len(case["expect"]["events"])
    for one, wanted in zip(found, case["expect"]["events"], strict=True):
        same(one, wanted["attributes"])
        if "data_json" in wanted:
            assert json.loads(one.payload.body) == wanted["data_json"]
        if "data_text" in wanted:
            assert one.payload.body.decode() == wanted["data_text"]
        if "data_base64" in wanted:
            assert one.payload.body == base64.b64decode(wanted["data_base64"])
        if wanted.get("data", ...) is None:
            assert one.payload is NOTHING


@pytest.mark.parametrize("case", [c for c in cases("malformed_bodies.json") if c.id != "dup-keys"])
def test_every_malformed_body_is_refused_in_every_mode(case: dict[str, Any]) -> None:
    body = base64.b64decode(case["body_base64"])
    with pytest.raises(BadRequest):
        read_payload(case["content_type"], body)
    with pytest.raises(BadRequest):
        binary(body, case["content_type"])
    for mode in (STRUCTURED, BATCH):
        with pytest.raises(BadRequest):
            read(mode, body)


def test_of_members_with_the_same_name_the_last_one_counts() -> None:
    [found] = read(STRUCTURED, b'{"specversion":"1.0","id":"a","id":"b","source":"/s","type":"t"}')
    assert found.event.id == "b"


@pytest.mark.parametrize("name", ["id", "source", "type", "specversion"])
@pytest.mark.parametrize("mode", [binary, structured])
def test_a_missing_attribute_is_named(name: str, mode: Any) -> None:
    with pytest.raises(BadRequest, match=f"attribute {name} is"):
        mode(**{name: "" if mode is binary else ...})


def test_a_batch_names_the_event_that_is_wrong() -> None:
    good = {"specversion": "1.0", "id": "a", "source": "/s", "type": "t"}
    with pytest.raises(BadRequest, match="event 1: the attribute id is missing"):
        read(BATCH, json.dumps([good, {**good, "id": None}]).encode())


def test_a_batch_over_the_limit_is_too_large() -> None:
    with pytest.raises(TooLarge, match="501"):
        read(BATCH, json.dumps([{}] * 501).encode())


def test_a_request_without_any_ce_header_is_told_how_to_send_one() -> None:
    with pytest.raises(BadRequest, match="not a CloudEvent") as refused:
        read("application/json", b"{}")
    assert "/v1/triggers/" in refused.value.hint


@pytest.mark.parametrize(
    "content_type", ["application/cloudevents+avro", "application/cloudevents", "application/cloudevents-batch+avro"]
)
def test_an_unknown_event_format_is_unreadable(content_type: str) -> None:
    with pytest.raises(Unreadable):
        read(content_type, b"{}")


def test_structured_json_in_another_charset_is_unreadable() -> None:
    with pytest.raises(Unreadable):
        read(STRUCTURED + "; charset=utf-16", b"{}")


def test_the_content_type_decides_the_mode_whatever_the_headers_say() -> None:
    body = json.dumps({"specversion": "1.0", "id": "inside", "source": "/s", "type": "t"}).encode()
    [found] = read(STRUCTURED, body, [("ce-id", "outside"), ("ce-specversion", "1.0")])
    assert found.event.id == "inside"


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("Euro%20%E2%82%AC", "Euro €"),
        ('"quoted"', "quoted"),
        (r'"a \"b\" \\ c"', r'a "b" \ c'),
        ("%2520", "%20"),
        ("100%", "100%"),
        ("plain", "plain"),
    ],
)
def test_a_header_value_is_unquoted_and_decoded_once(sent: str, seen: str) -> None:
    assert binary(subject=sent).event.subject == seen


@pytest.mark.parametrize("sent", ["a%0d%0aSet-Cookie:x", "a%00", "%7f", "%C2%85", "%EF%BF%BF", "\udcff", "%FF"])
def test_control_characters_and_what_is_no_text_are_refused(sent: str) -> None:
    with pytest.raises(BadRequest):
        binary(id=sent)


@pytest.mark.parametrize("name", ["my_ext", "my.ext", "ext-a", "", "data", "data_base64", "é"])
def test_a_header_that_is_no_attribute_name_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="cannot be the name"):
        binary(b"", None, **{name: "x"})


def test_a_header_that_comes_twice_is_refused() -> None:
    with pytest.raises(BadRequest, match="twice"):
        read(None, b"", [("ce-id", "a"), ("CE-ID", "b")])


def test_a_binary_event_must_not_carry_its_content_type_twice() -> None:
    with pytest.raises(BadRequest, match="ce-datacontenttype"):
        binary(b"{}", "application/json", datacontenttype="application/json")


@pytest.mark.parametrize("value", [1.5, {"a": 1}, [1], 2**31, -(2**31) - 1])
def test_an_extension_is_text_a_32_bit_number_or_a_truth_value(value: object) -> None:
    with pytest.raises(BadRequest):
        structured(myext=value)


@pytest.mark.parametrize("value", ["text", 7, True, False, -(2**31), 2**31 - 1, ""])
def test_extensions_are_kept_as_they_are(value: object) -> None:
    assert structured(myext=value).event.extensions == {"myext": value}


@pytest.mark.parametrize(
    "attributes",
    [
        {"id": "x" * 1025},
        {"myext": "x" * 4097},
        {f"ext{n}": "x" for n in range(65)},
        {f"ext{n}": "x" * 4096 for n in range(9)},
    ],
)
def test_attributes_have_a_limit(attributes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"limit|more than"):
        structured(**attributes)


@pytest.mark.parametrize("coded", ["AAE", "A A=", "AAEC/w==\n", "!!!!", 5, ["AAEC"]])
def test_data_that_is_not_base64_is_refused(coded: object) -> None:
    with pytest.raises(BadRequest, match="base64"):
        structured(data_base64=coded)


def test_json_in_base64_is_checked_like_any_json() -> None:
    with pytest.raises(BadRequest, match="not JSON"):
        structured(datacontenttype="application/json", data_base64=base64.b64encode(b"{").decode())
    found = structured(datacontenttype="application/json", data_base64=base64.b64encode(b"{}").decode())
    assert (found.payload.type, found.payload.body) == (JSON, b"{}")


def test_bytes_without_a_content_type_are_bytes() -> None:
    assert structured(data_base64="AAE=").payload.type == BYTES
    assert binary(b"\x00\x01").payload.type == BYTES


def test_data_of_null_is_no_data() -> None:
    assert structured(data=None).payload is NOTHING
    assert structured(data=None, data_base64="AAE=").payload.body == b"\x00\x01"


def test_text_data_comes_out_as_text_and_other_data_must_be_text() -> None:
    assert structured(datacontenttype="text/plain", data="grün").payload.body == "grün".encode()
    with pytest.raises(BadRequest, match="data is not text"):
        structured(datacontenttype="text/plain", data={"a": 1})


def test_json_data_is_handed_on_byte_for_byte() -> None:
    body = b'{"specversion":"1.0","id":"a","source":"/s","type":"t","data": {"x":1.0e5,  "y":123456789012345678}}'
    [found] = read(STRUCTURED, body)
    assert found.payload.body == b'{"x":1.0e5,  "y":123456789012345678}'
    assert found.payload.size == len(found.payload.body)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("application/json; charset=UTF-8", JSON),
        ("Application/JSON", JSON),
        ("text/json", JSON),
        ("application/geo+json", "application/geo+json"),
        ("text/plain; charset=latin-1", "text/plain; charset=latin-1"),
        ("IMAGE/PNG", "image/png"),
    ],
)
def test_spellings_of_a_content_type_are_made_equal(text: str, full: str) -> None:
    assert parse_media(text).full == full


@pytest.mark.parametrize("text", ["json", "a/b/c", "application/json\r\nX: y", "x/y; " + "z" * 300, "/", "a/"])
def test_what_is_no_content_type_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="content type"):
        parse_media(text)


@pytest.mark.parametrize("body", [b"1e999", b"9" * 5000, b"NaN", b'"\xff"', b"{} {}", b"", b"[1,]", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        check_json(body)


def test_large_json_is_checked_too() -> None:
    filler = b'"' + b"x" * 100_000 + b'"'
    check_json(b"[" + filler + b"]")
    for bad in (b"[" + filler, b"[" + filler + b',"\xff"]', b"[" + filler + b",NaN]"):
        with pytest.raises(BadRequest):
            check_json(bad)


def test_no_content_type_and_no_body_is_no_data() -> None:
    assert read_payload(None, b"") is NOTHING
    assert read_payload("", b"") is NOTHING
    assert read_payload("application/octet-stream", b"") is NOTHING
    assert read_payload("text/plain", b"").body == b""


@pytest.mark.parametrize(
    ("extensions", "wanted"),
    [
        ({}, None),
        ({"deadline": "60s"}, 160.0),
        ({"expirytime": "1970-01-01T00:02:00Z"}, 120.0),
        ({"deadline": "60s", "expirytime": "1970-01-01T00:02:00Z"}, 120.0),
        ({"deadline": "1970-01-01T00:03:20Z"}, 200.0),
    ],
)
def test_the_deadline_of_an_event_is_the_earlier_one_it_names(extensions: dict[str, Any], wanted: float | None) -> None:
    assert deadline_of(structured(**extensions).event, 100.0) == wanted


@pytest.mark.parametrize("extensions", [{"deadline": "soon"}, {"deadline": 60}, {"expirytime": "60s"}])
def test_a_deadline_that_is_none_is_refused(extensions: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        deadline_of(structured(**extensions).event, 100.0)


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Cn")), min_size=1, max_size=40)


@given(
    identity=TEXT,
    subject=TEXT,
    ext=TEXT,
    data=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9)),
)
def test_events_of_the_official_sdk_are_read_in_both_modes(
    identity: str, subject: str, ext: str, data: dict[str, Any]
) -> None:
    made = CloudEvent(
        attributes={
            "id": identity,
            "source": "/sdk",
            "type": "org.example",
            "subject": subject,
            "myext": ext,
            "datacontenttype": "application/json",
        },
        data=data,
    )
    for message in (to_binary_event(made), to_structured_event(made)):
        headers = dict(message.headers)
        content_type = next(v for k, v in headers.items() if k.lower() == "content-type")
        [found] = read(content_type, message.body, list(headers.items()))
        assert (found.event.id, found.event.subject) == (identity, subject)
        assert found.event.extensions == {"myext": ext}
        assert json.loads(found.payload.body) == data


@given(body=st.binary(max_size=200), content_type=st.sampled_from([STRUCTURED, BATCH, JSON, "text/xml", "a/b", None]))
def test_no_bytes_lead_to_anything_but_an_event_or_a_refusal(body: bytes, content_type: str | None) -> None:
    headers = [("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t"), ("ce-specversion", "1.0")]
    with suppress(BadRequest):
        read(content_type, body, headers)
