"""Where and when to point: an alert's region of the sky as telescope fields, and the site that can see it first.

``plan_pointings`` completes the verdict of ``triage_alert`` (in ``alerts.py``). Altitudes are good to half a degree,
which is enough for "above 30 degrees at night": precession since 2000, refraction and the Moon are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headrace import Context, function

SITES = {  # latitude and longitude in degrees, north and east positive
    "La Palma": (28.7606, -17.8816),
    "Cerro Paranal": (-24.6272, -70.4042),
    "Siding Spring": (-31.2733, 149.0644),
}
FIELD_RADIUS_DEG = 1.0
ALTITUDE_DEG_MIN = 30.0  # below two air masses
SUN_ALTITUDE_DEG_MAX = -18.0  # astronomical night
AHEAD_H = 24.0
STEP_MINUTES = 5.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """The first site that can observe, from when, for how long, and the centres of its fields, likeliest first."""

    site: str
    begins: str
    hours: float
    fields: list[tuple[float, float]]


@dataclass(frozen=True)
class FollowUp:
    """A verdict with its plan; the first fields are the verdict's own."""

    alert: str
    action: Literal["follow", "watch"]
    reason: str
    at: str
    ra: float
    dec: float
    radius90_deg: float
    area90_deg2: float
    plan: Plan | None = None


@function(timeout="10s", retries=1)
def plan_pointings(verdict: FollowUp, ctx: Context) -> FollowUp:
    """Add the plan; a target that no site can see in the next day is not followed, but watched."""
    at = datetime.fromisoformat(verdict.at).astimezone(UTC)
    found = first_site(verdict.ra, verdict.dec, at)
    if found is None:
        reason = f"no site sees it at night above {ALTITUDE_DEG_MIN:.0f} degrees in the next {AHEAD_H:.0f} hours"
        return replace(verdict, action="watch", reason=reason)
    site, begins, hours = found
    fields = tile(verdict.ra, verdict.dec, verdict.radius90_deg)
    ctx.log.info("%s: %d fields from %s, from %s on", verdict.alert, len(fields), site, begins.isoformat())
    plan = Plan(site=site, begins=begins.isoformat().replace("+00:00", "Z"), hours=hours, fields=fields)
    return replace(verdict, plan=plan)


def first_site(ra: float, dec: float, at: datetime) -> tuple[str, datetime, float] | None:
    """Return the site that can observe the position first, when it begins, and for how many hours until ``AHEAD_H``."""
    minutes = np.arange(0.0, AHEAD_H * 60, STEP_MINUTES)
    days = at.timestamp() / 86400 + 2440587.5 - 2451545.0 + minutes / 1440  # since 2000 January 1, 12 h
    sun_ra, sun_dec = sun(days)
    best: tuple[str, datetime, float] | None = None
    for site, (latitude, longitude) in SITES.items():
        up = altitude(ra, dec, latitude, longitude, days) >= ALTITUDE_DEG_MIN
        dark = altitude(sun_ra, sun_dec, latitude, longitude, days) <= SUN_ALTITUDE_DEG_MAX
        good = np.flatnonzero(up & dark)
        if len(good) == 0:
            continue
        begins = at + timedelta(minutes=float(minutes[good[0]]))
        if best is None or begins < best[1]:
            best = site, begins, round(len(good) * STEP_MINUTES / 60, 2)
    return best


def altitude(ra: Array | float, dec: Array | float, latitude: float, longitude: float, days: Array) -> Array:
    """Return the altitude in degrees at each time, in days since J2000.

    Sidereal time at Greenwich is 280.46061837 + 360.98564736629 d degrees (J. Meeus, Astronomical Algorithms,
    equation 12.4 without its terms of century squared).
    """
    hour_angle = np.radians((280.46061837 + 360.98564736629 * days + longitude - ra) % 360)
    phi, delta = np.radians(latitude), np.radians(dec)
    sine = np.sin(phi) * np.sin(delta) + np.cos(phi) * np.cos(delta) * np.cos(hour_angle)
    result: Array = np.degrees(np.arcsin(np.clip(sine, -1, 1)))
    return result


def sun(days: Array) -> tuple[Array, Array]:
    """Return right ascension and declination of the Sun in degrees, to an arc minute between 1800 and 2200.

    The series is that of the U.S. Naval Observatory, "Computing approximate solar coordinates".
    """
    anomaly = np.radians(357.529 + 0.98560028 * days)
    longitude = np.radians(280.459 + 0.98564736 * days + 1.915 * np.sin(anomaly) + 0.020 * np.sin(2 * anomaly))
    tilt = np.radians(23.439 - 0.00000036 * days)
    ra = np.degrees(np.arctan2(np.cos(tilt) * np.sin(longitude), np.cos(longitude))) % 360
    return ra, np.degrees(np.arcsin(np.sin(tilt) * np.sin(longitude)))


def tile(ra: float, dec: float, radius_deg: float) -> list[tuple[float, float]]:
    """Return centres (ra, dec in degrees) of round fields that cover a disc without gaps, from the middle outwards.

    A hexagonal grid with a spacing of sqrt(3) field radii leaves nothing of a plane uncovered. It is laid on the sphere
    by the azimuthal equidistant projection, which brings no two points farther apart than they are in the plane.
    """
    if radius_deg <= FIELD_RADIUS_DEG:
        return [(round(ra, 4), round(dec, 4))]
    spacing = math.sqrt(3) * FIELD_RADIUS_DEG
    reach = math.ceil(2 * (radius_deg + FIELD_RADIUS_DEG) / spacing)
    steps = np.arange(-reach, reach + 1)
    a, b = (grid.ravel() for grid in np.meshgrid(steps, steps))
    x, y = spacing * (a + b / 2), spacing * (math.sqrt(3) / 2) * b
    distance = np.hypot(x, y)
    inside = np.flatnonzero(distance < radius_deg + FIELD_RADIUS_DEG)
    order = inside[np.argsort(distance[inside], kind="stable")]
    return from_plane(ra, dec, np.radians(x[order]), np.radians(y[order]))


def from_plane(ra: float, dec: float, x: Array, y: Array) -> list[tuple[float, float]]:
    """Return the sky positions of points of the plane around (ra, dec): x to the east, y to the north, in radians."""
    c, delta = np.hypot(x, y), math.radians(dec)
    share = np.sinc(c / math.pi)  # sin(c) / c, and 1 in the middle
    north = np.arcsin(np.clip(np.cos(c) * math.sin(delta) + y * share * math.cos(delta), -1, 1))
    east = np.arctan2(x * share, np.cos(c) * math.cos(delta) - y * share * math.sin(delta))
    return [
        (round(float(right) % 360, 4), round(float(up), 4))
        for right, up in zip(ra + np.degrees(east), np.degrees(north), strict=True)
    ]
