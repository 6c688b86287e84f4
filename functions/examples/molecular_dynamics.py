"""Lennard-Jones molecular dynamics: energies of a given configuration, and a run at constant energy from a lattice.

Everything is in reduced units: lengths in sigma, energies in epsilon, time in sigma sqrt(m / epsilon), temperature in
epsilon / k. Pairs beyond the cut-off do not interact ("plain truncation": nothing is shifted or smoothed). The formulas
are those of M. P. Allen and D. J. Tildesley, Computer Simulation of Liquids (2nd edition, 2017), chapters 1, 2 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace import Context, function, on

SKIN = 0.4  # pairs are listed this far beyond the cut-off, so that a list serves several steps
PROGRESS_STEPS = 250

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Pairs = tuple[Indices, Indices, Array]  # i, j, and what to take from x_i - x_j to meet the nearest image


@dataclass(frozen=True)
class Configuration:
    """Positions to take the energy of: an XYZ file, the side of the periodic cube, and the cut-off."""

    uri: str
    box: float
    cutoff: float


@dataclass(frozen=True)
class Energies:
    """Energy and virial (sum of r.f over pairs) of a configuration.

    ``long_range_correction`` is the energy to add for the pairs beyond the cut-off, were the fluid uniform there.
    """

    n: int
    energy: float
    virial: float
    long_range_correction: float


@dataclass(frozen=True)
class Simulation:
    """A run at constant energy from a face-centred cubic lattice of 4 cells^3 particles."""

    cells: int = 4
    density: float = 0.8442
    temperature: float = 1.44
    dt: float = 0.002
    steps: int = 3000
    equilibration_steps: int = 1000
    cutoff: float = 2.5
    seed: int = 1


@dataclass(frozen=True)
class Averages:
    """What a run gave. Means are taken after the equilibration; the start is the lattice with its first momenta.

    ``energy_change_max`` is the largest departure of the total energy per particle from its start: how well the
    integration kept what it must keep.
    """

    n: int
    steps: int
    start_potential_per_particle: float
    start_pressure: float
    energy_per_particle: float
    energy_change_max: float
    temperature: float
    potential_per_particle: float
    pressure: float


@on(type="org.headrace.example.md.configuration", deadline="30s")
@function(timeout="20s", retries=1)
def lj_energy(configuration: Configuration, ctx: Context) -> Energies:
    """Return the energy and virial of a configuration, with periodic boundaries and the minimum image."""
    box, cutoff = configuration.box, configuration.cutoff
    positions = read_xyz(ctx.stage(configuration.uri))
    check_reach(box, cutoff)
    energy, virial, _ = interact(positions, neighbours(positions, box, cutoff), cutoff)
    n = positions.shape[1]
    return Energies(n=n, energy=energy, virial=virial, long_range_correction=tail_energy(n, n / box**3, cutoff))


@on(type="org.headrace.example.md.requested", deadline="60s")
@function(timeout="120s", retries=1)
def lj_dynamics(simulation: Simulation, ctx: Context) -> Averages:
    """Run the dynamics with the velocity Verlet scheme, and return the averages of state."""
    s = simulation
    if s.cells < 1 or not 0 <= s.equilibration_steps < s.steps or s.dt <= 0 or s.density <= 0 or s.temperature < 0:
        raise ValueError(f"{s} cannot be run: cells, density and dt above zero, equilibration_steps below steps")
    positions, box = fcc_lattice(s.cells, s.density)
    reach = s.cutoff + SKIN
    check_reach(box, reach)
    n, volume = positions.shape[1], box**3
    momenta = thermal_momenta(n, s.temperature, np.random.default_rng(s.seed))
    origin, pairs = positions.copy(), neighbours(positions, box, reach)
    potential, virial, force = interact(positions, pairs, s.cutoff)
    track = np.empty((s.steps + 1, 3))  # potential, kinetic, pressure
    track[0] = state(potential, virial, momenta, volume)
    for step in range(1, s.steps + 1):
        momenta += 0.5 * s.dt * force
        positions += s.dt * momenta
        moved = positions - origin
        if np.einsum("ij,ij->j", moved, moved).max() > (SKIN / 2) ** 2:  # two may have met half-way
            positions %= box
            origin, pairs = positions.copy(), neighbours(positions, box, reach)
        potential, virial, force = interact(positions, pairs, s.cutoff)
        momenta += 0.5 * s.dt * force
        track[step] = state(potential, virial, momenta, volume)
        if step % PROGRESS_STEPS == 0:
            ctx.progress(step / s.steps, f"step {step} of {s.steps}")
    energy = (track[:, 0] + track[:, 1]) / n
    settled = track[s.equilibration_steps :]
    return Averages(
        n=n,
        steps=s.steps,
        start_potential_per_particle=float(track[0, 0]) / n,
        start_pressure=float(track[0, 2]),
        energy_per_particle=float(energy[0]),
        energy_change_max=float(np.abs(energy - energy[0]).max()),
        temperature=temperature(float(settled[:, 1].mean()), n),
        potential_per_particle=float(settled[:, 0].mean()) / n,
        pressure=float(settled[:, 2].mean()),
    )


def read_xyz(path: Path) -> Array:
    """Return the positions of an XYZ file, shape (3, n): a count, a line that is skipped, then name, x, y, z."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = int(lines[0])
    rows = [[float(word) for word in line.split()[1:4]] for line in lines[2 : 2 + count]]
    if len(rows) != count or any(len(row) != 3 for row in rows):
        raise ValueError(f"the XYZ file promises {count} particles and holds {len(rows)} lines of x, y, z")
    return np.array(rows).T.copy()


def check_reach(box: float, reach: float) -> None:
    """Raise ValueError where a pair could meet twice: the nearest image is the only one within half a box."""
    if not 0 < reach <= box / 2:
        raise ValueError(
            f"the reach of {reach} (cut-off and skin) must be over zero and at most {box / 2:.4f}, half a box"
        )


def fcc_lattice(cells: int, density: float) -> tuple[Array, float]:
    """Return the positions, shape (3, n), of a face-centred cubic lattice and the side of its box."""
    box = (4 * cells**3 / density) ** (1 / 3)
    corner = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij")).reshape(3, -1, 1)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]).T.reshape(3, 1, 4)
    return (corner + basis).reshape(3, -1) * (box / cells), box


def thermal_momenta(n: int, wanted: float, rng: np.random.Generator) -> Array:
    """Return normal momenta, shape (3, n), with zero sum, scaled to the wanted temperature."""
    momenta = rng.normal(size=(3, n))
    momenta -= momenta.mean(axis=1, keepdims=True)
    scaled: Array = momenta * np.sqrt(wanted / temperature(0.5 * float((momenta**2).sum()), n))
    return scaled


def temperature(kinetic: float, n: int) -> float:
    """Return the temperature of a kinetic energy: 2 K over the 3 n - 3 degrees of freedom (the momentum is fixed)."""
    return 2 * kinetic / (3 * n - 3)


def state(potential: float, virial: float, momenta: Array, volume: float) -> tuple[float, float, float]:
    """Return potential, kinetic energy and pressure: P = (2 K + W) / 3 V with the virial W = sum of r.f."""
    kinetic = 0.5 * float((momenta**2).sum())
    return potential, kinetic, (2 * kinetic + virial) / (3 * volume)


def tail_energy(n: int, density: float, cutoff: float) -> float:
    """Return the long-range correction 8/3 pi n density (1/3 cutoff^-9 - cutoff^-3)."""
    return 8 / 3 * np.pi * n * density * (cutoff**-9 / 3 - cutoff**-3)


def interact(positions: Array, pairs: Pairs, cutoff: float) -> tuple[float, float, Array]:
    """Return the energy, the virial and the forces of u(r) = 4 (r^-12 - r^-6) over the listed pairs."""
    i, j, image = pairs
    apart = differences(positions, i, j) - image
    inverse = 1 / np.einsum("ij,ij->j", apart, apart)
    inverse[inverse <= cutoff**-2] = 0.0  # beyond the cut-off there is neither energy nor force
    six = inverse * inverse * inverse
    virial = 24 * six * (2 * six - 1)
    pull = apart * (virial * inverse)
    n = positions.shape[1]
    force = np.stack([np.bincount(i, axis, n) - np.bincount(j, axis, n) for axis in pull])
    return float(4 * (six * (six - 1)).sum()), float(virial.sum()), force


def differences(positions: Array, i: Indices, j: Indices) -> Array:
    """Return x_i - x_j; axis by axis, which NumPy does several times faster than all axes at once."""
    return np.stack([axis.take(i) - axis.take(j) for axis in positions])


def neighbours(positions: Array, box: float, reach: float) -> Pairs:
    """Return every pair (each once) that may be nearer than ``reach``: all pairs, or those of adjoining cells."""
    n, side = positions.shape[1], int(box // reach)
    if side < 4 or n < 1000:  # so few pairs that sorting them into cells costs more
        i, j = np.triu_indices(n, 1)
    else:
        i, j = adjoining(positions % box, box / side, side)
    apart = differences(positions, i, j)
    image = box * np.round(apart / box)
    apart -= image
    near = np.flatnonzero(np.einsum("ij,ij->j", apart, apart) < reach**2)
    return i[near], j[near], image[:, near]


def adjoining(positions: Array, width: float, side: int) -> tuple[Indices, Indices]:
    """Return the pairs of particles in the same or adjoining cells of a ``side``^3 grid (at least 3), each once."""
    cell = np.minimum((positions / width).astype(np.intp), side - 1)
    number = (cell[0] * side + cell[1]) * side + cell[2]
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(side**3 + 1))
    first: list[Indices] = []
    second: list[Indices] = []
    for shift in np.ndindex(3, 3, 3):
        if shift < (1, 1, 1):
            continue  # the opposite shift finds these pairs
        x, y, z = ((cell[axis] + shift[axis] - 1) % side for axis in range(3))
        other = (x * side + y) * side + z
        begin, count = starts[other], starts[other + 1] - starts[other]
        i = np.repeat(np.arange(len(number)), count)
        within = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
        j = order[np.repeat(begin, count) + within]
        keep = slice(None) if shift != (1, 1, 1) else i < j
        first.append(i[keep])
        second.append(j[keep])
    return np.concatenate(first), np.concatenate(second)
