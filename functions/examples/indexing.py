"""Indexing of crystallography stills: the axes of the unit cell from the spots of single frames, the cell unknown.

``index_hits`` takes the hits that ``hit_rate`` (in ``crystallography.py``) thought worth it, and completes its report.
Long axes are not looked for: their spots lie too near to one another on a small detector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace import Context, function

SPOTS_MAX = 40  # the brightest of a frame; more make the search longer and not better
AXIS_ANGSTROM = (30.0, 80.0)  # where cell axes are looked for
AXIS_STEP_ANGSTROM = 1.0
AXES_TRIED_MAX = 8
AXES_APART_ANGSTROM = 6.0
AXES_ANGLE_MIN_DEG = 20.0
WHOLE_WITHIN = 0.15  # a spot fits an axis when its index is this near to a whole number
FITTING_MIN = 0.8  # of the spots, for an axis to be believed

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Hit:
    """One frame: the scattering vectors of its spots in 1/angstrom, brightest first."""

    frame: int
    q: list[tuple[float, float, float]]


@dataclass(frozen=True)
class ToIndex:
    """The hits to index, and the report of their run, which is passed through."""

    report: dict[str, Any]
    hits: list[Hit]


@dataclass(frozen=True)
class Indexed:
    """Two axes of the crystal in one frame: lengths, the angle between them, and the share of spots that fit both."""

    frame: int
    a_angstrom: float
    b_angstrom: float
    angle_deg: float
    fitting: float


@dataclass(frozen=True)
class Lattice:
    """What indexing found: medians over the frames that could be indexed, None where none could.

    ``resolution_angstrom`` is the spacing d = 1/|q| that 95 % of the spots are coarser than.
    """

    frames: list[Indexed]
    a_angstrom: float | None
    b_angstrom: float | None
    angle_deg: float | None
    resolution_angstrom: float


@function(timeout="60s", retries=1)
def index_hits(todo: ToIndex, ctx: Context) -> dict[str, Any]:
    """Find the cell axes of the hits and how far their spots reach; return the report with this ``lattice``."""
    indexed: list[Indexed] = []
    for number, hit in enumerate(todo.hits, start=1):
        found = index_frame(np.array(hit.q[:SPOTS_MAX]), hit.frame)
        if found is not None:
            indexed.append(found)
        ctx.progress(number / len(todo.hits), f"{len(indexed)} of {number} frames indexed")
    reach = np.concatenate([np.linalg.norm(np.array(hit.q), axis=1) for hit in todo.hits])
    lattice = Lattice(
        frames=indexed,
        a_angstrom=median([x.a_angstrom for x in indexed]),
        b_angstrom=median([x.b_angstrom for x in indexed]),
        angle_deg=median([x.angle_deg for x in indexed]),
        resolution_angstrom=round(1.0 / float(np.quantile(reach, 0.95)), 2),
    )
    return {**todo.report, "lattice": lattice}


def median(values: list[float]) -> float | None:
    """Return the median to two digits, or None of nothing."""
    return round(float(np.median(values)), 2) if values else None


def index_frame(q: Array, frame: int) -> Indexed | None:
    """Find the two shortest cell axes within reach in one still, without knowing the cell; None where there are none.

    An axis v of the crystal has a whole number q.v for every spot (Laue's condition), so the mean of cos(2 pi q.v) over
    the spots is near one there. It is scanned over directions and lengths, as in the one-dimensional search of
    I. Steller, R. Bolotovsky and M. G. Rossmann, J. Appl. Cryst. 30, 1036 (1997), and the best are refined by least
    squares. Two axes that the spots fit span a plane lattice; Lagrange's reduction gives its shortest pair.
    """
    lengths, directions, score = scan_axes(q)
    axes: list[Array] = []
    for _ in range(AXES_TRIED_MAX):
        length, direction = np.unravel_index(int(score.argmax()), score.shape)
        best: Array = lengths[length] * directions[direction]
        axis, fitting = refine_axis(q, best)
        if fitting >= FITTING_MIN and all(angle_deg(axis, known) > AXES_ANGLE_MIN_DEG for known in axes):
            axes.append(axis)
        if len(axes) == 2:
            a, b = shortest_pair(axes[0], axes[1])
            return Indexed(
                frame=frame,
                a_angstrom=round(float(np.linalg.norm(a)), 2),
                b_angstrom=round(float(np.linalg.norm(b)), 2),
                angle_deg=round(angle_deg(a, b), 2),
                fitting=round(float(np.mean(fits(q, a) & fits(q, b))), 3),
            )
        # Leave out what lies near this axis; v and -v are the same one, hence the absolute value.
        apart = lengths[:, None] ** 2 + best @ best - 2 * np.outer(lengths, np.abs(directions @ best))
        score[apart < AXES_APART_ANGSTROM**2] = -1.0
    return None


def scan_axes(q: Array) -> tuple[Array, Array, NDArray[np.float32]]:
    """Return lengths in angstrom, directions, and the mean of cos(2 pi q.v) at each [length, direction]."""
    low, high = AXIS_ANGSTROM
    step = 1.5 * AXIS_STEP_ANGSTROM / high  # radians between neighbouring directions
    count = int(2 * np.pi / step**2)
    z = (np.arange(count) + 0.5) / count
    turn = np.pi * (1 + 5**0.5) * np.arange(count)  # Fibonacci's spiral covers the half sphere evenly
    flat = np.sqrt(1 - z * z)
    directions = np.stack([flat * np.cos(turn), flat * np.sin(turn), z], axis=1)
    lengths = np.arange(low, high + AXIS_STEP_ANGSTROM / 2, AXIS_STEP_ANGSTROM)
    along = directions @ q.T
    phase = np.exp(2j * np.pi * along * low).astype(np.complex64)
    turned = np.exp(2j * np.pi * along * AXIS_STEP_ANGSTROM).astype(np.complex64)
    score = np.empty((len(lengths), count), dtype=np.float32)
    for row in score:
        row[:] = phase.real.mean(axis=1)
        phase *= turned  # one product a step instead of one exponential
    return lengths, directions, score


def refine_axis(q: Array, axis: Array) -> tuple[Array, float]:
    """Fit the axis to the whole numbers that its spots are nearest to; return it and the share of spots that fit."""
    for _ in range(5):
        index = q @ axis
        inlier = np.abs(index - np.round(index)) < 0.25
        if inlier.sum() < 6:
            break
        axis = np.linalg.lstsq(q[inlier], np.round(index[inlier]), rcond=None)[0].astype(np.float64)
    return axis, float(np.mean(fits(q, axis)))


def fits(q: Array, axis: Array) -> NDArray[np.bool_]:
    """Return for each spot whether its index along the axis is nearly whole."""
    index = q @ axis
    near: NDArray[np.bool_] = np.abs(index - np.round(index)) < WHOLE_WITHIN
    return near


def angle_deg(a: Array, b: Array) -> float:
    """Return the angle between two axes, 0 to 90 degrees: the sign of an axis has no meaning."""
    cosine = abs(float(a @ b)) / float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


def shortest_pair(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the two shortest vectors of the plane lattice of ``a`` and ``b``, shortest first: Lagrange's reduction."""
    while True:
        if a @ a > b @ b:
            a, b = b, a
        whole = round(float(a @ b) / float(a @ a))
        if whole == 0:
            return a, b
        b = b - whole * a
