"""Triage of transient alerts: is this notice worth telescope time, and how well is it placed on the sky?

Three forms are read: GCN notices in JSON (the core schema's words: ``alert_tense``, ``alert_type``, ``ra_dec_error``),
LIGO-Virgo-KAGRA alerts in JSON (``superevent_id``), and VOEvents in XML. What is worth it goes on to
``plan_pointings`` (in ``pointing.py``). Tests, injections and commanded triggers never start real work, and a
retraction is told as one, so that whoever follows the alert stops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from xml.etree import ElementTree

from headrace import Context, Event, function, on

AREA_DEG2_MAX = 100.0  # more than this takes a night to cover
SNR_MIN = 5.0
CONTAINMENT = 0.9  # the probability inside ``ra_dec_error`` where a notice does not say: the core schema's default
NOT_REAL = {"test", "injection", "commanded"}  # tenses of the core schema, and VOEvent's role "test"
NOT_NOW = {"archival", "planned", "prediction", "utility"}
NOT_COSMIC = {  # classes of on-board and ground classifiers for what is no astrophysical transient
    "BELOW_HORIZON",
    "DISTANT_PARTICLES",
    "ERROR",
    "LOCAL_PARTICLES",
    "SOLAR_FLARE",
    "TERRESTRIAL",
    "TGF",
    "UNRELIABLE_LOCATION",
}


@dataclass(frozen=True)
class Alert:
    """What the three forms have in common. The radius ``error_deg`` holds ``containment`` of the probability."""

    name: str
    tense: str = "current"
    retraction: bool = False
    at: str | None = None
    ra: float | None = None
    dec: float | None = None
    error_deg: float | None = None
    containment: float = CONTAINMENT
    snr: float | None = None
    significant: bool = True
    classified: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer: follow it, watch for better notices, ignore it, or withdraw what was started for it.

    ``radius90_deg`` and ``area90_deg2`` hold 90 % of the probability; ``at`` is the time of the notice, in UTC.
    """

    alert: str
    action: Literal["follow", "watch", "ignore", "withdraw"]
    reason: str
    at: str | None = None
    ra: float | None = None
    dec: float | None = None
    radius90_deg: float | None = None
    area90_deg2: float | None = None


@on(type="prefix:org.headrace.example.alert", deadline="60s")
@function(timeout="10s", retries=1)
def triage_alert(event: Event, ctx: Context) -> Verdict:
    """Read the notice, judge it, and chain the planning of pointings where it is worth following."""
    verdict = judge(read_alert(event.data))
    ctx.log.info("%s: %s, for %s", verdict.alert, verdict.action, verdict.reason)
    if verdict.action == "follow":
        ctx.call("plan_pointings", verdict)
    return verdict


def judge(alert: Alert) -> Verdict:
    """Return the verdict. What forbids work is asked before what speaks for it."""
    radius = area = None
    if alert.error_deg is not None:
        radius = radius_holding(0.9, alert.error_deg, alert.containment)
        area = cap_area_deg2(radius)

    def verdict(action: Literal["follow", "watch", "ignore", "withdraw"], reason: str) -> Verdict:
        return Verdict(
            alert=alert.name,
            action=action,
            reason=reason,
            at=alert.at,
            ra=alert.ra,
            dec=alert.dec,
            radius90_deg=None if radius is None else round(radius, 6),
            area90_deg2=None if area is None else round(area, 6),
        )

    if alert.retraction:
        return verdict("withdraw", f"a {alert.tense} alert was retracted" if alert.tense in NOT_REAL else "retracted")
    if alert.tense in NOT_REAL:
        return verdict("ignore", f"it is not real: {alert.tense}")
    if alert.classified is not None and alert.classified.upper() in NOT_COSMIC:
        return verdict("ignore", f"it is classified as {alert.classified}")
    if alert.tense in NOT_NOW:
        return verdict("watch", f"it is not about now: {alert.tense}")
    if not alert.significant or (alert.snr is not None and alert.snr < SNR_MIN):
        return verdict("watch", "the detection is not significant")
    if alert.ra is None or alert.dec is None or area is None or alert.at is None:
        return verdict("watch", "there is no position with an error and a time yet")
    if area > AREA_DEG2_MAX:
        return verdict("watch", f"the position is too uncertain: over {AREA_DEG2_MAX:.0f} square degrees")
    return verdict("follow", "it is real, current, significant and well placed")


def radius_holding(share: float, radius: float, containment: float) -> float:
    """Return the radius that holds ``share`` of a round normal distribution, given one that holds ``containment``.

    The probability inside r is 1 - exp(-r^2 / 2 sigma^2), so radii go as the root of -log(1 - probability).
    """
    if not 0 < containment < 1:
        raise ValueError(f"containment_probability: {containment} is not between 0 and 1")
    return radius * math.sqrt(math.log(1 - share) / math.log(1 - containment))


def cap_area_deg2(radius_deg: float) -> float:
    """Return the area of a spherical cap, 2 pi (1 - cos r) steradians, in square degrees; exact for tiny radii too."""
    return 4 * math.pi * math.sin(math.radians(min(radius_deg, 180.0)) / 2) ** 2 * (180 / math.pi) ** 2


# ---------------------------------------------------------------- reading


def read_alert(data: Any) -> Alert:
    """Return the alert in a notice of any of the three forms.

    Raises:
        ValueError: the data is none of them, or a field cannot be what it is.
    """
    if isinstance(data, str | bytes):
        return read_voevent(data)
    if isinstance(data, dict) and "superevent_id" in data:
        return read_superevent(data)
    if isinstance(data, dict) and data.keys() & {"alert_datetime", "trigger_time", "alert_type"}:
        return read_notice(data)
    raise ValueError("this is neither a GCN notice, nor a gravitational-wave alert, nor a VOEvent")


def read_notice(data: dict[str, Any]) -> Alert:
    """Read a GCN notice. An error given as an ellipse becomes the circle of the same area."""
    error = data.get("ra_dec_error")
    if isinstance(error, list):
        error = math.sqrt(error[0] * error[min(1, len(error) - 1)]) if error else None
    classes = data.get("classification") or {}
    name = data.get("id") or data.get("event_name") or data.get("ref_ID")
    return Alert(
        name=first(name or f"{data.get('instrument', 'notice')} {data.get('trigger_time', '')}"),
        tense=str(data.get("alert_tense", "current")).lower(),
        retraction=str(data.get("alert_type", "")).lower() == "retraction",
        at=utc(data.get("alert_datetime") or data.get("trigger_time")),
        ra=number(data.get("ra"), "ra", 0, 360),
        dec=number(data.get("dec"), "dec", -90, 90),
        error_deg=number(error, "ra_dec_error", 0, 180),
        containment=number(data.get("containment_probability"), "containment_probability", 0, 1) or CONTAINMENT,
        snr=number(data.get("image_snr"), "image_snr", -math.inf, math.inf),
        classified=max(classes, key=lambda name: float(classes[name])) if classes else None,
    )


def read_superevent(data: dict[str, Any]) -> Alert:
    """Read a gravitational-wave alert; its position is a sky map, which is not read here.

    Names of mock and test events begin with M and T before the S of a superevent.
    """
    name, event = str(data["superevent_id"]), data.get("event") or {}
    return Alert(
        name=name,
        tense="current" if name.startswith("S") else "test",
        retraction=str(data.get("alert_type", "")).lower() == "retraction",
        at=utc(data.get("time_created")),
        significant=bool(event.get("significant", True)),
    )


def read_voevent(data: str | bytes) -> Alert:
    """Read a VOEvent of any version, with or without a namespace."""
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("the VOEvent declares entities, which no alert needs; it is not read")
    try:
        # Without entities nothing can be pulled in or blown up, which is what the lint rule warns of.
        root = ElementTree.fromstring(data)  # noqa: S314 - see above
    except ElementTree.ParseError as error:
        raise ValueError(f"this is not well-formed XML: {error}") from error
    if not root.tag.endswith("VOEvent"):
        raise ValueError(f"this is XML, but not a VOEvent: <{root.tag}>")
    params = {str(p.get("name")): str(p.get("value", "")) for p in root.iter("Param")}
    role = root.get("role", "observation").lower()
    if params.get("HardwareInj", "0").lower() in {"1", "true"}:
        role = "injection"
    cites = {str(cite.get("cite", "")).lower() for cite in root.iter("EventIVORN")}
    return Alert(
        name=root.get("ivorn", "VOEvent"),
        tense="current" if role == "observation" else role,
        retraction="retraction" in cites or params.get("AlertType", "").lower() == "retraction",
        at=utc(root.findtext("Who/Date") or root.findtext(".//ISOTime")),
        ra=number(root.findtext(".//C1"), "C1", 0, 360),
        dec=number(root.findtext(".//C2"), "C2", -90, 90),
        error_deg=number(root.findtext(".//Error2Radius"), "Error2Radius", 0, 180),
    )


def first(value: Any) -> str:
    """Return the one name, or the first of several."""
    return str(value[0]) if isinstance(value, list) else str(value)


def number(value: Any, what: str, low: float, high: float) -> float | None:
    """Return a number of a notice, or None where there is none."""
    if value is None or value == "":
        return None
    result = float(value)
    if not low <= result <= high:
        raise ValueError(f"{what}: {value!r} is not between {low} and {high}")
    return result


def utc(text: str | None) -> str | None:
    """Return an ISO 8601 time as RFC 3339 in UTC; notices that name no zone mean UTC."""
    if not text:
        return None
    instant = datetime.fromisoformat(text.strip())
    instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    return instant.isoformat().replace("+00:00", "Z")
