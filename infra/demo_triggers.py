"""What the demo sends, and the answer that is known for each: the inputs that ship with the example functions.

The known answers are those of ``functions/examples/data``; they stand beside the inputs and are never sent along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from functions import examples

EXAMPLES = Path(examples.__file__).parent
DATA = EXAMPLES / "data"
FUNCTION_FILES = tuple(
    EXAMPLES / f"{name}.py"
    for name in ("fusion", "crystallography", "indexing", "molecular_dynamics", "alerts", "pointing", "md_campaign")
)
STATE = DATA / "molecular_dynamics/state_0042.npz"
SHOTS = (900001, 900002)
RESAMPLES = 4000  # some seconds for 128 points, and some tenths for 32
HURRY = "16s"  # no time for all of them
LATTICE_AXIS_ANGSTROM = 57.98  # of the cell that run0001 was made with; two of its axes are this long
_TYPE = "org.headrace.example"


@dataclass(frozen=True)
class Near:
    """A number that an answer must come this near to; a list of numbers is compared one by one."""

    value: float | Sequence[float]
    tolerance: float

    def meets(self, found: object) -> bool:
        """Return whether ``found`` is a number, or a list of as many numbers, within the tolerance."""
        wanted = [self.value] if isinstance(self.value, int | float) else list(self.value)
        given = found if isinstance(found, list) else [found]
        return len(given) == len(wanted) and all(
            isinstance(x, int | float) and math.isclose(x, y, rel_tol=0.0, abs_tol=self.tolerance)
            for x, y in zip(given, wanted, strict=True)
        )


@dataclass(frozen=True)
class Begins:
    """A text of which only the beginning is known."""

    value: str

    def meets(self, found: object) -> bool:
        """Return whether ``found`` is a text that begins so and goes on."""
        return isinstance(found, str) and found.startswith(self.value) and len(found) > len(self.value)


@dataclass(frozen=True)
class Trigger:
    """One trigger: what is sent, the route that must take it, and what must stand in the answer.

    ``by_name`` sends the body to the route's own address, as an instrument does that knows nothing of CloudEvents.
    ``expected`` maps the path of a part ("eigenmode.peaks.*.f_khz") to its value; ``lesser`` does so for the answers of
    variants, by level, where they are coarser. ``deadline`` is the event's own.
    """

    title: str
    route: str
    type: str
    data: Any
    expected: Mapping[str, object]
    content_type: str | None = None
    by_name: bool = False
    deadline: str | None = None
    lesser: Mapping[int, Mapping[str, object]] = field(default_factory=dict)

    def wrong(self, answer: object, level: int = 0) -> str:
        """Return the first part of the answer that is not as it is known to be; empty where all are.

        Args:
            answer: what came.
            level: of the variant that it is from.
        """
        for path, wanted in self.lesser.get(level, self.expected).items():
            found = part(answer, path)
            if not (wanted.meets(found) if isinstance(wanted, Near | Begins) else found == wanted):
                shown = wanted.value if isinstance(wanted, Near | Begins) else wanted
                return f"{path} is {found!r}, but should be {shown!r}"
        return ""


def part(answer: object, path: str) -> object:
    """Return a part of a JSON answer by its dotted path, or None where it is not there.

    "*" takes the rest of the path of each member of a list, and "#" is the length of a list.
    """
    name, _, rest = path.partition(".")
    if name == "*":
        return [part(each, rest) for each in answer] if isinstance(answer, list) else None
    if name == "#":
        return len(answer) if isinstance(answer, list) else None
    found = answer.get(name) if isinstance(answer, dict) else None
    return part(found, rest) if rest else found


def inputs() -> dict[str, Path]:
    """Return the files to upload, by the name that ``triggers`` knows them by."""
    known = _known("molecular_dynamics/reference.json")
    return {f"shot_{number}": DATA / f"fusion/shot_{number}.npz" for number in SHOTS} | {
        "run0001": DATA / "crystallography/run0001.npz",
        "configuration": DATA / "molecular_dynamics" / known["periodic4"]["file"],
        "state": STATE,
    }


def triggers(uris: Mapping[str, str]) -> list[Trigger]:
    """Return all triggers; ``uris`` says where each of the ``inputs`` was uploaded to."""
    return [
        *(_shot(number, uris[f"shot_{number}"]) for number in SHOTS),
        _hurried(SHOTS[0], uris[f"shot_{SHOTS[0]}"]),
        _run_stop(uris["run0001"]),
        *(_energy(cutoff, uris["configuration"]) for cutoff in (3, 4)),
        _dynamics(),
        campaign(uris["state"], gpus=0),
        *(_notice(name, expected) for name, expected in _known("notices/expected.json").items()),
    ]


def _known(path: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((DATA / path).read_text(encoding="utf-8"))
    return known


def _shot(number: int, uri: str) -> Trigger:
    known = _known(f"fusion/shot_{number}.json")
    tearing, eigenmode = known["tearing"], known["eigenmode"]
    axes = ("sample_rate_hz", "channel_spacing_m", "coarse_sample_rate_hz", "coarse_spacing_m")
    onset = tearing["onset_window"]
    expected: dict[str, object] = {
        "flagged": onset is not None,
        "onset_window": onset,
        "tearing_k_per_m": Near(tearing["k_per_m"], 1e-6),
        "tearing_f_hz": Near(tearing["f_hz"], 1e-3),
    }
    if onset is None:
        expected["eigenmode"] = None  # a quiet shot does not chain the fine analysis
    else:
        expected["eigenmode.k_per_m"] = Near(eigenmode["k_per_m"], 1e-6)
        expected["eigenmode.chirp_khz_per_window"] = Near(eigenmode["chirp_hz_per_window"] / 1e3, 0.05)
        expected["eigenmode.peaks.*.f_khz"] = Near([w["eigenmode_khz"] for w in known["windows"]], 0.1)
    return Trigger(
        title=f"tokamak shot {number}",
        route="shot_done",
        type=f"{_TYPE}.shot.done",
        data={"shot": number, "uri": uri} | {axis: known[axis] for axis in axes},
        expected=expected,
    )


def _hurried(number: int, uri: str) -> Trigger:
    """Return a shot with too little time for the full analysis: a variant answers, and the full one follows."""
    plain, known = _shot(number, uri), _known(f"fusion/shot_{number}.json")
    eigenmode, frequencies_khz = known["eigenmode"], [window["eigenmode_khz"] for window in known["windows"]]
    lesser = {
        level: {
            **plain.expected,
            "eigenmode.points": points,  # half the points make a bin of the wavenumber twice as wide
            "eigenmode.k_per_m": Near(eigenmode["k_per_m"], 0.5 / (points * known["channel_spacing_m"]) + 1e-6),
            "eigenmode.chirp_khz_per_window": Near(eigenmode["chirp_hz_per_window"] / 1e3, chirp_khz),
            "eigenmode.peaks.*.f_khz": Near(frequencies_khz, khz),
        }
        for level, points, khz, chirp_khz in ((1, 64, 0.2, 0.05), (2, 32, 1.2, 0.2))
    }
    return replace(
        plain,
        title=f"tokamak shot {number} in a hurry",
        data=plain.data | {"resamples": RESAMPLES},
        expected={**plain.expected, "eigenmode.points": 128},
        deadline=HURRY,
        lesser=lesser,
    )


def _run_stop(uri: str) -> Trigger:
    known = _known("crystallography/run0001.json")
    geometry = ("pixel_mm", "distance_mm", "wavelength_angstrom", "beam_center_px", "masked_value")
    return Trigger(
        title="crystallography run0001",
        route="run_stopped",
        type=f"{_TYPE}.run.stop",
        data={"run": known["name"], "uri": uri} | {key: known[key] for key in geometry},
        expected={
            "frames": len(known["frames"]),
            "hits": known["hits"],
            "lattice.a_angstrom": Near(LATTICE_AXIS_ANGSTROM, 0.2),
            "lattice.b_angstrom": Near(LATTICE_AXIS_ANGSTROM, 0.2),
            "lattice.angle_deg": Near(90.0, 0.3),
        },
    )


def _energy(cutoff: int, uri: str) -> Trigger:
    known = _known("molecular_dynamics/reference.json")["periodic4"]
    values, tolerance = known[f"cutoff_{cutoff}"], known["tolerance"]
    return Trigger(
        title=f"Lennard-Jones energy, cut-off {cutoff}",
        route="lj_energy",
        type=f"{_TYPE}.md.configuration",
        data={"uri": uri, "box": known["box"], "cutoff": cutoff},
        expected={
            "n": known["n"],
            "energy": Near(values["energy"], tolerance),
            "virial": Near(values["virial_sum_r_dot_f"], tolerance),
            "long_range_correction": Near(values["long_range_correction"], tolerance),
        },
    )


def _dynamics() -> Trigger:
    reference = _known("molecular_dynamics/reference.json")
    known, melt = reference["nve"], reference["fcc_melt"]
    allowed = known["tolerances"]
    return Trigger(
        title=f"Lennard-Jones dynamics, {known['steps']} steps",
        route="lj_dynamics",
        type=f"{_TYPE}.md.requested",
        data={"steps": known["steps"], "dt": known["dt"], "cutoff": known["cutoff"], "seed": 1},
        expected={
            "n": known["n"],
            "start_potential_per_particle": Near(melt["energy_per_particle"], melt["tolerance"]),
            "energy_per_particle": Near(known["energy_per_particle"], 1e-5),
            "energy_change_max": Near(0.0, allowed["energy_change"]),
            "temperature": Near(known["mean_temperature_steps_1000_3000"], allowed["temperature"]),
            "potential_per_particle": Near(known["mean_potential_per_particle"], allowed["potential"]),
            "pressure": Near(known["mean_pressure"], allowed["pressure"]),
        },
    )


def campaign(uri: str, *, gpus: int, cells: int = 4, deadline: str | None = None) -> Trigger:
    """Return the end of a run that is followed by a simulation at a site; ``uri`` is that of the ``STATE``.

    Args:
        uri: where the state was uploaded to.
        gpus: for the simulation.
        cells: along each axis of its lattice, four particles in each.
        deadline: of the event; the route's if not given.
    """
    known = _known("molecular_dynamics/reference.json")["nve"]
    on = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
    return Trigger(
        title=f"run 42, {4 * cells**3} particles, {on}",
        route="md_campaign",
        type=f"{_TYPE}.md.run.stop",
        data={"run": "42", "uri": uri, "gpus": gpus, "cells": cells},
        expected={
            "energy": Near(known["energy_per_particle"], 0.01),
            "agrees": True,
            "off.#": 0,
            "failed": "",
            "figure": Begins("blob:"),
        },
        deadline=deadline,
    )


def _notice(name: str, known: Mapping[str, Any]) -> Trigger:
    body = (DATA / "notices" / name).read_bytes()
    expected: dict[str, object] = {"action": known["action"]}
    if "area90_deg2" in known:
        expected["area90_deg2"] = Near(known["area90_deg2"], 0.01 * known["area90_deg2"] + 1e-6)
    if known["action"] == "follow":
        expected |= {"plan.site": known["site"], "plan.fields.#": known["fields"]}
    else:
        expected["plan"] = None
    is_json = name.endswith(".json")
    return Trigger(
        title=f"alert {Path(name).stem}",
        route="triage_alert",
        type=f"{_TYPE}.alert.notice",
        data=json.loads(body) if is_json else body,
        expected=expected,
        content_type=None if is_json else "application/xml",
        by_name=not is_json,
    )


@dataclass(frozen=True)
class Show:
    """What a demo deploys, uploads and sends: ``triggers`` is given where each of the ``inputs`` went."""

    files: Sequence[Path]
    inputs: Callable[[], Mapping[str, Path]]
    triggers: Callable[[Mapping[str, str]], Sequence[Trigger]]


EVERYTHING = Show(FUNCTION_FILES, inputs, triggers)
