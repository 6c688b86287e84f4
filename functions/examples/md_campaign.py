"""From the end of a run to a simulation of what was measured: stage, reduce, simulate at a site, compare, draw.

    run stop -> md_campaign (stage, reduce, submit) -> the job -> md_compare (check, figure) -> the answer
                                                    -> md_failed, where the job failed -> an answer that says so

The event brings the state of the fluid by reference. Its density and temperature are what the simulation starts from:
``campaign/lj_md.py``, which takes a GPU where it finds one and needs NumPy alone. Reduced units throughout, see there.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace import Context, JobAttributes, JobEnd, JobSpec, Resources, function, on

PROGRAM = "lj_md.py"
RESULT = "result.json"

# What the simulation must give where it starts as this reference does; ``data/molecular_dynamics/reference.json``.
# Energies are per particle; the first two follow from the start alone, the others are means after the equilibration.
REFERENCE_AT = {"density": (0.8442, 1e-6), "temperature": (1.44, 1e-6), "cutoff": (2.5, 0.0)}
REFERENCE = {
    "start_potential_per_particle": (-6.773368053, 1e-3),
    "energy_per_particle": (-4.62181, 1e-2),  # of 256 particles; the momentum that is fixed weighs less in more
    "energy_change_max": (0.0, 0.03),
    "temperature": (0.708, 0.03),
    "potential_per_particle": (-5.688, 0.05),
    "pressure": (0.62, 0.3),
}


@dataclass(frozen=True)
class RunStop:
    """The end of a run: an NPZ file with ``positions`` and ``momenta``, shape (3, n), and the side of the ``box``.

    The rest says how large a simulation is wanted, and with how many GPUs.
    """

    run: str
    uri: str
    gpus: int = 1
    cells: int = 4
    steps: int = 3000


@dataclass(frozen=True)
class Report:
    """The answer. ``agrees`` is None where the reference is of another state; ``off`` names what does not agree.

    ``backend`` and ``device`` are what the simulation ran on, the figure is a PNG of its energies. ``failed`` says why
    there is no energy, and is empty where there is.
    """

    energy: float | None
    agrees: bool | None
    figure: str | None
    backend: str
    device: str
    site: str
    queue_s: float
    run_s: float
    off: list[str]
    failed: str = ""


@on(type="org.headrace.example.md.run.stop", deadline="120s")
@function(timeout="30s", retries=2)
def md_campaign(stop: RunStop, ctx: Context) -> None:
    """Stage the state, reduce it to density and temperature, and submit the simulation of that."""
    density, temperature = reduce_state(ctx.stage(stop.uri))
    ctx.log.info("%s: density %.4f, temperature %.4f", stop.run, density, temperature)
    program = ctx.store(program_text().encode(), PROGRAM)
    settings = {"density": density, "temperature": temperature, "cells": stop.cells, "steps": stop.steps}
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    equilibration = ["--equilibration-steps", str(stop.steps // 3)]
    job = JobSpec(
        executable="python3",
        arguments=[PROGRAM, *options, *equilibration, "--result", RESULT],
        inputs={PROGRAM: program},
        outputs=[RESULT],
        resources=Resources(cpu_cores_per_process=1, gpu_cores_per_process=stop.gpus),
        attributes=JobAttributes(duration="5m"),
    )
    ctx.submit(job, then=md_compare, on_failure=md_failed)


@function(timeout="30s", retries=2)
def md_compare(end: JobEnd, ctx: Context) -> Report:
    """Compare what the simulation gave with the reference, and draw its energies."""
    found = json.loads(ctx.stage(end.outputs[RESULT]).read_text(encoding="utf-8"))
    off = departures(found)
    return Report(
        energy=found["energy_per_particle"],
        agrees=None if off is None else not off,
        figure=ctx.store(draw(found), "energies.png"),
        backend=found["backend"],
        device=found["device"],
        site=end.site,
        queue_s=end.time_s.queue,
        run_s=end.time_s.run,
        off=off or [],
    )


@function(timeout="10s", retries=2)
def md_failed(end: JobEnd) -> Report:
    """Answer with what became of a simulation that did not come to its end."""
    said = f"{end.reason or end.state}, exit code {end.exit_code}. {end.last_lines[-200:]}".strip()
    return Report(
        energy=None,
        agrees=None,
        figure=None,
        backend="",
        device="",
        site=end.site,
        queue_s=end.time_s.queue,
        run_s=end.time_s.run,
        off=[],
        failed=said,
    )


def reduce_state(path: Path) -> tuple[float, float]:
    """Return density and temperature: n / box^3, and 2 K over the 3 n - 3 degrees of freedom (the momentum is fixed).

    Raises:
        ValueError: the file does not hold the state of two particles or more.
    """
    with np.load(path) as state:
        positions, momenta, box = state["positions"], state["momenta"], float(state["box"])
    n = positions.shape[-1]
    if positions.shape != (3, n) or momenta.shape != (3, n) or n < 2 or box <= 0:
        raise ValueError(f"positions {positions.shape} and momenta {momenta.shape} in a box of {box} are no state")
    drift = momenta.mean(axis=1, keepdims=True)
    return n / box**3, float(((momenta - drift) ** 2).sum()) / (3 * n - 3)


def departures(found: dict[str, Any]) -> list[str] | None:
    """Return what does not agree with the reference, None where the reference is of another state."""
    at = found["parameters"]
    if any(abs(at[name] - value) > tolerance for name, (value, tolerance) in REFERENCE_AT.items()):
        return None
    return [
        f"{name} is {found[name]:.6g}, the reference {value:.6g} within {tolerance:g}"
        for name, (value, tolerance) in REFERENCE.items()
        if not abs(found[name] - value) <= tolerance
    ]


def draw(found: dict[str, Any]) -> bytes:
    """Return a PNG of the energies per particle over time."""
    from campaign import figure  # beside this file, whose folder is the root of what travels with it

    at, series = found["parameters"], found["series"]
    total = [p + k for p, k in zip(series["potential"], series["kinetic"], strict=True)]
    png: bytes = figure.chart(
        series["time"],
        {"potential": series["potential"], "total": total, "kinetic": series["kinetic"]},
        title=f"energy per particle, density {at['density']:.4f}, T {at['temperature']:.3f}",
        x_label=f"time, {found['n']} particles on {found['backend']}",
    )
    return png


def program_text() -> str:
    """Return the program of the job, which has travelled with this file."""
    from campaign import lj_md

    return inspect.getsource(lj_md)
