"""Lennard-Jones dynamics at constant energy, on a GPU where there is one: a plain script that needs NumPy alone.

    python3 lj_md.py --density 0.8442 --temperature 1.44 --result result.json

The start is a face-centred cubic lattice of 4 cells^3 particles with random momenta of the given temperature; the
scheme is velocity Verlet, pairs beyond the cut-off do not interact. Everything is in reduced units: lengths in sigma,
energies in epsilon, time in sigma sqrt(m / epsilon), temperature in epsilon / k. The arrays are those of CuPy or
PyTorch where one of them finds a GPU, else NumPy's; the start is the same on all. The formulas are those of M. P. Allen
and D. J. Tildesley, Computer Simulation of Liquids (2nd edition, 2017), chapters 1, 2 and 5.

Exit codes: 0 done, 2 wrong usage, 3 the backend that was asked for is not there, 4 the energy was not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

BACKENDS = ("cupy", "torch", "numpy")  # the first one that finds its device is taken
SKIN = 0.4  # pairs are listed this far beyond the cut-off, so that a list serves several steps
PAIRS_AT_ONCE_MAX = 8_000_000  # of those looked at for a list: bounds the memory
TOLD_TIMES = 20
PROGRESS = "HEADRACE_PROGRESS"  # names a file, where somebody wants to know how far the program is
SERIES_POINTS_MAX = 300

NO_BACKEND = 3
ENERGY_NOT_KEPT = 4


@dataclass(frozen=True)
class Parameters:
    """What is simulated; see the text at the top of this file for the units."""

    density: float
    temperature: float
    cells: int = 4
    steps: int = 3000
    equilibration_steps: int = 1000
    dt: float = 0.002
    cutoff: float = 2.5
    seed: int = 1

    def wrong(self) -> str:
        """Return what makes this impossible to run; empty where it can be."""
        if not 0 <= self.equilibration_steps < self.steps or self.cells < 1 or self.temperature < 0:
            return "cells and temperature must not be negative, and equilibration_steps must be below steps"
        if min(self.density, self.dt, self.cutoff) <= 0:
            return "density, dt and cutoff must be above zero"
        half_box = (4 * self.cells**3 / self.density) ** (1 / 3) / 2
        if self.cutoff + SKIN > half_box:
            return f"the cut-off and the skin reach {self.cutoff + SKIN:.3f}, beyond half a box ({half_box:.3f})"
        return ""


class Arrays(NamedTuple):
    """A library of arrays: its module ``xp``, its name, and the device it works on."""

    xp: Any
    name: str
    device: str

    def host(self, array: Any) -> np.ndarray[Any, Any]:
        """Return an array as one of NumPy's."""
        if self.name == "cupy":
            return np.asarray(array.get())
        return np.asarray(array.cpu() if self.name == "torch" else array)

    def scattered(self, i: Any, j: Any, pull: Any, n: int) -> Any:
        """Return the force on each of ``n`` particles from the pull of ``i`` on ``j``, pair by pair."""
        if self.name == "torch":
            zero = self.xp.zeros((3, n), dtype=pull.dtype)
            return zero.index_add_(1, i, pull).index_add_(1, j, -pull)
        count = self.xp.bincount
        return self.xp.stack([count(i, axis, n) - count(j, axis, n) for axis in pull])


def arrays(wanted: str = "auto") -> Arrays:
    """Return the arrays to work with: those that were asked for, or the first that find a GPU.

    Raises:
        ImportError: what was asked for is not there.
    """
    for name in BACKENDS if wanted == "auto" else (wanted,):
        try:
            return {"cupy": _cupy, "torch": _torch, "numpy": _numpy}[name](must=wanted != "auto")
        except Exception as error:  # a GPU library without its GPU fails in ways of its own
            if wanted != "auto":
                raise ImportError(f"{name} cannot be used here: {type(error).__name__}: {error}") from error
    raise ImportError("NumPy cannot be used here")


def _cupy(*, must: bool) -> Arrays:
    xp = importlib.import_module("cupy")
    return Arrays(xp, "cupy", str(xp.cuda.runtime.getDeviceProperties(0)["name"].decode()))


def _torch(*, must: bool) -> Arrays:
    xp = importlib.import_module("torch")
    if xp.cuda.is_available():
        xp.set_default_device("cuda")
        return Arrays(xp, "torch", str(xp.cuda.get_device_name(0)))
    if not must:
        raise ImportError("it finds no GPU")  # on a CPU it is no faster than NumPy
    return Arrays(xp, "torch", "cpu")


def _numpy(*, must: bool) -> Arrays:
    return Arrays(np, "numpy", "cpu")


# ---------------------------------------------------------------- physics


class Pairs(NamedTuple):
    """Every pair near enough, each once: ``i``, ``j``, and what to take from x_i - x_j to meet the nearest image."""

    i: Any
    j: Any
    image: Any


def lattice(cells: int, density: float) -> tuple[np.ndarray[Any, Any], float]:
    """Return the positions, shape (3, n), of a face-centred cubic lattice and the side of its box."""
    box = (4 * cells**3 / density) ** (1 / 3)
    corner = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij")).reshape(3, -1, 1)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]).T.reshape(3, 1, 4)
    return (corner + basis).reshape(3, -1) * (box / cells), box


def thermal(n: int, temperature: float, seed: int) -> np.ndarray[Any, Any]:
    """Return normal momenta, shape (3, n), with zero sum, scaled to a temperature (2 K over 3 n - 3)."""
    momenta = np.random.default_rng(seed).normal(size=(3, n))
    momenta -= momenta.mean(axis=1, keepdims=True)
    return np.asarray(momenta * np.sqrt(temperature * (3 * n - 3) / (momenta**2).sum()))


def pairs_within(on: Arrays, positions: Any, box: float, reach: float) -> Pairs:
    """Return the pairs nearer than ``reach``, found among all pairs, some rows of them at a time."""
    xp, n = on.xp, positions.shape[1]
    rows = max(1, PAIRS_AT_ONCE_MAX // n)
    every = xp.arange(n)
    found: list[tuple[Any, Any]] = []
    for first in range(0, n, rows):
        some = every[first : first + rows]
        squared = 0.0
        for axis in positions:
            apart = axis[first : first + rows, None] - axis[None, first:]
            apart = apart - box * xp.round(apart / box)
            squared = squared + apart * apart
        near = (squared < reach * reach) & (some[:, None] < every[None, first:])
        i, j = near.nonzero(as_tuple=True) if on.name == "torch" else near.nonzero()
        found.append((i + first, j + first))
    i, j = (xp.concatenate([part[k] for part in found]) for k in (0, 1))
    return Pairs(i, j, box * xp.round(differences(on, positions, i, j) / box))


def differences(on: Arrays, positions: Any, i: Any, j: Any) -> Any:
    """Return x_i - x_j; axis by axis, which is several times faster than all axes at once."""
    return on.xp.stack([axis.take(i) - axis.take(j) for axis in positions])


def interact(on: Arrays, positions: Any, pairs: Pairs, cutoff: float) -> tuple[Any, Any, Any]:
    """Return the energy, the virial and the forces of u(r) = 4 (r^-12 - r^-6) over the listed pairs."""
    apart = differences(on, positions, pairs.i, pairs.j) - pairs.image
    inverse = 1 / (apart * apart).sum(0)
    inverse[inverse <= cutoff**-2] = 0.0  # beyond the cut-off there is neither energy nor force
    six = inverse * inverse * inverse
    virial = 24 * six * (2 * six - 1)
    force = on.scattered(pairs.i, pairs.j, apart * (virial * inverse), positions.shape[1])
    return 4 * (six * (six - 1)).sum(), virial.sum(), force


def simulate(on: Arrays, p: Parameters) -> np.ndarray[Any, Any]:
    """Return potential and kinetic energy and virial of every step, the start included: shape (steps + 1, 3)."""
    start, box = lattice(p.cells, p.density)
    n, reach = start.shape[1], p.cutoff + SKIN
    positions, momenta = on.xp.asarray(start), on.xp.asarray(thermal(n, p.temperature, p.seed))
    origin, pairs = positions + 0.0, pairs_within(on, positions, box, reach)
    potential, virial, force = interact(on, positions, pairs, p.cutoff)
    track, recent = np.empty((p.steps + 1, 3)), [on.xp.stack([potential, 0.5 * (momenta**2).sum(), virial])]
    every, written, began = max(1, p.steps // TOLD_TIMES), 0, time.perf_counter()
    for step in range(1, p.steps + 1):
        momenta = momenta + 0.5 * p.dt * force
        positions = positions + p.dt * momenta
        moved = positions - origin
        if float((moved * moved).sum(0).max()) > (SKIN / 2) ** 2:  # two may have met half-way
            positions = positions % box
            origin, pairs = positions + 0.0, pairs_within(on, positions, box, reach)
        potential, virial, force = interact(on, positions, pairs, p.cutoff)
        momenta = momenta + 0.5 * p.dt * force
        recent.append(on.xp.stack([potential, 0.5 * (momenta**2).sum(), virial]))
        if step % every == 0 or step == p.steps:  # what a GPU has counted is fetched now and then only
            track[written : step + 1] = on.host(on.xp.stack(recent))
            written, recent = step + 1, []
            energy = (track[step, 0] + track[step, 1]) / n
            say(f"step {step} of {p.steps}, energy {energy:.5f}, {time.perf_counter() - began:.1f} s")
            tell(step / p.steps, f"step {step} of {p.steps} on {on.name}")
    return track


def averages(track: np.ndarray[Any, Any], p: Parameters) -> dict[str, Any]:
    """Return what a run gave. Means are taken after the equilibration; ``energy_per_particle`` is that of the start.

    ``energy_change_max`` is the largest departure of the total energy per particle from its start: how well the
    integration kept what it must keep.
    """
    n = 4 * p.cells**3
    potential, kinetic, virial = track.T
    pressure = (2 * kinetic + virial) / (3 * n / p.density)
    energy, settled = (potential + kinetic) / n, slice(p.equilibration_steps, None)
    shown = np.unique(np.linspace(0, p.steps, min(p.steps + 1, SERIES_POINTS_MAX)).astype(int))
    return {
        "n": n,
        "start_potential_per_particle": float(potential[0] / n),
        "energy_per_particle": float(energy[0]),
        "energy_change_max": float(np.abs(energy - energy[0]).max()),
        "temperature": float(2 * kinetic[settled].mean() / (3 * n - 3)),
        "potential_per_particle": float(potential[settled].mean() / n),
        "pressure": float(pressure[settled].mean()),
        "series": {
            "time": [round(float(step * p.dt), 6) for step in shown],
            "potential": [round(float(x), 6) for x in potential[shown] / n],
            "kinetic": [round(float(x), 6) for x in kinetic[shown] / n],
        },
    }


# ---------------------------------------------------------------- the script


def say(text: str) -> None:
    """Print a line at once: the job's output is looked at while it runs."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def tell(fraction: float, note: str) -> None:
    """Write how far the program is where a platform asked for it: one line, a number from 0 to 1 and a few words."""
    path = os.environ.get(PROGRESS)
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(f"{fraction:.3f} {note}\n")


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line says, write the result, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    for name in ("cells", "steps", "equilibration_steps", "dt", "cutoff", "seed"):
        given = getattr(Parameters, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(given), default=given)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    parser.add_argument("--drift-max", type=float, default=0.03, help="of the total energy per particle")
    parser.add_argument("--result", default="result.json")
    chosen = vars(parser.parse_args(words))
    backend, drift_max, result = (chosen.pop(name) for name in ("backend", "drift_max", "result"))
    p = Parameters(**chosen)
    if p.wrong():
        parser.error(p.wrong())
    try:
        on = arrays(backend)
    except ImportError as error:
        say(str(error))
        return NO_BACKEND
    n = 4 * p.cells**3
    say(f"{n} particles, {p.steps} steps on {on.name} ({on.device})")
    began = time.perf_counter()
    found = averages(simulate(on, p), p)
    took_s = time.perf_counter() - began
    found |= {"parameters": asdict(p), "backend": on.name, "device": on.device, "took_s": round(took_s, 3)}
    with open(f"{result}.new", "w", encoding="utf-8") as file:
        json.dump(found, file)
    os.replace(f"{result}.new", result)
    drift = found["energy_change_max"]
    say(f"done in {took_s:.1f} s, {p.steps / took_s:.0f} steps/s; the energy changed by at most {drift:.5f}")
    if not drift <= drift_max:  # nor if it is not a number
        say(f"the energy per particle may change by {drift_max} at most: take a smaller --dt than {p.dt}")
        return ENERGY_NOT_KEPT
    return 0


if __name__ == "__main__":
    sys.exit(main())
