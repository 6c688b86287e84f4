"""Hit finding in serial crystallography: which frames of a run caught a crystal, and what is its unit cell?

A run-stop event names a file with all frames. The run is fanned out by frame: each frame is searched for Bragg spots,
and one with enough spots is a hit. The results join to a hit rate, and when that passes a threshold the brightest hits
are indexed: beam time is then well spent, and the cell says on what.

The file is an ``.npz`` with ``frames`` (frame, y, x; photon counts) and, if there is one, ``mask`` (y, x; True where a
pixel is good). Pixels of the masked value are left out as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace import Context, function, on

SIGMAS = 5.0  # a pixel is strong when it stands this many standard deviations above its background
CLIP_SIGMAS = 3.0  # pixels this far above the background are left out when the background is taken again
BACKGROUND_HALF_PX = 5  # the background is the mean of a square with this half-width
BACKGROUND_PASSES = 3
SPOT_PIXELS_MIN = 2  # a single hot pixel is not a spot
HIT_SPOTS_MIN = 15
INDEX_AT_HIT_RATE = 0.1
INDEX_FRAMES_MAX = 5
INDEX_SPOTS_MAX = 40
AXIS_ANGSTROM = (30.0, 80.0)  # where cell axes are looked for
AXIS_STEP_ANGSTROM = 1.0
AXES_TRIED_MAX = 8
AXES_APART_ANGSTROM = 6.0
WHOLE_WITHIN = 0.15  # a spot fits an axis when its index is this near to a whole number
FITTING_MIN = 0.8  # of the spots, for an axis to be believed

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RunStop:
    """A run that has just stopped: its file and the geometry of the detector (flat, normal to the beam)."""

    run: str
    uri: str
    pixel_mm: float
    distance_mm: float
    wavelength_angstrom: float
    beam_center_px: tuple[float, float]
    masked_value: int = 65535


@dataclass(frozen=True)
class FrameOfRun:
    """One member of the fan-out."""

    stop: RunStop
    frame: int


@dataclass(frozen=True)
class FrameSpots:
    """The spots of one frame. ``q`` holds their scattering vectors in 1/angstrom, brightest first, for hits only."""

    run: str
    frame: int
    spots: int
    hit: bool
    q: list[tuple[float, float, float]]


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


@dataclass(frozen=True)
class RunReport:
    """The answer: the hits of a run and, when they were worth indexing, its lattice."""

    run: str
    frames: int
    hits: list[int]
    hit_rate: float
    spots_by_frame: list[int]
    lattice: Lattice | None = None


@dataclass(frozen=True)
class ToIndex:
    """What is passed on when the hit rate is worth it: the report so far, and the hits with most spots."""

    report: RunReport
    best: list[FrameSpots]


@on(type="org.headrace.example.run.stop", deadline="60s")
@function(timeout="20s", retries=1)
def run_stopped(stop: RunStop, ctx: Context) -> dict[str, int]:
    """Fan the run out by frame; ``hit_rate`` joins the results."""
    frames, _ = load_run(ctx.stage(stop.uri))
    ctx.map(find_spots, (FrameOfRun(stop=stop, frame=n) for n in range(len(frames))), then=hit_rate)
    return {"frames": len(frames)}


@function(timeout="30s", retries=1)
def find_spots(member: FrameOfRun, ctx: Context) -> FrameSpots:
    """Find the Bragg spots of one frame and decide whether it is a hit."""
    stop = member.stop
    frames, mask = load_run(ctx.stage(stop.uri))
    image = frames[member.frame]
    good = (image != stop.masked_value) if mask is None else mask & (image != stop.masked_value)
    strong, above = strong_pixels(image, good)
    spots = centroids(strong, above)
    hit = len(spots) >= HIT_SPOTS_MIN
    vectors: list[tuple[float, float, float]] = []
    if hit:
        brightest = spots[np.argsort(-spots[:, 2])]
        vectors = [(round(x, 6), round(y, 6), round(z, 6)) for x, y, z in scattering_vectors(brightest, stop).tolist()]
    return FrameSpots(run=stop.run, frame=member.frame, spots=len(spots), hit=hit, q=vectors)


@function(timeout="30s", retries=1)
def hit_rate(results: list[FrameSpots], ctx: Context) -> RunReport:
    """Join the frames to a hit rate, and chain the indexing of the best hits when the rate is worth it."""
    hits = [result for result in results if result.hit]
    report = RunReport(
        run=results[0].run if results else "",
        frames=len(results),
        hits=[result.frame for result in hits],
        hit_rate=round(len(hits) / len(results), 4) if results else 0.0,
        spots_by_frame=[result.spots for result in results],
    )
    ctx.log.info("run %s: %d hits in %d frames", report.run, len(hits), report.frames)
    if hits and report.hit_rate >= INDEX_AT_HIT_RATE:
        best = sorted(hits, key=lambda result: -result.spots)[:INDEX_FRAMES_MAX]
        ctx.call(index_hits, ToIndex(report=report, best=best))
    return report


@function(timeout="60s", retries=1)
def index_hits(todo: ToIndex, ctx: Context) -> RunReport:
    """Find the cell axes of the best hits and how far their spots reach."""
    indexed: list[Indexed] = []
    for number, result in enumerate(todo.best, start=1):
        found = index_frame(np.array(result.q[:INDEX_SPOTS_MAX]), result.frame)
        if found is not None:
            indexed.append(found)
        ctx.progress(number / len(todo.best), f"{len(indexed)} of {number} frames indexed")
    reach = np.concatenate([np.linalg.norm(np.array(result.q), axis=1) for result in todo.best])
    lattice = Lattice(
        frames=indexed,
        a_angstrom=median([x.a_angstrom for x in indexed]),
        b_angstrom=median([x.b_angstrom for x in indexed]),
        angle_deg=median([x.angle_deg for x in indexed]),
        resolution_angstrom=round(1.0 / float(np.quantile(reach, 0.95)), 2),
    )
    return replace(todo.report, lattice=lattice)


def median(values: list[float]) -> float | None:
    """Return the median to two digits, or None of nothing."""
    return round(float(np.median(values)), 2) if values else None


# ---------------------------------------------------------------- spots


def load_run(path: Path) -> tuple[NDArray[np.uint16], Mask | None]:
    """Read the frames and the mask; a warm child keeps the last file, as all frames of a run come from the same one."""
    about = path.stat()
    return _load(str(path), about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=1)
def _load(path: str, _mtime_ns: int, _size: int) -> tuple[NDArray[np.uint16], Mask | None]:
    with np.load(path) as file:
        return file["frames"], file["mask"].astype(bool) if "mask" in file else None


def box_sum(image: Array, half: int) -> Array:
    """Return the sum over a square around each pixel, cut at the edges, from one table of running sums."""
    table = np.pad(image.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    rows, columns = (np.arange(n) for n in image.shape)
    top, bottom = np.clip(rows - half, 0, None), np.clip(rows + half + 1, None, image.shape[0])
    left, right = np.clip(columns - half, 0, None), np.clip(columns + half + 1, None, image.shape[1])
    total: Array = (
        table[np.ix_(bottom, right)]
        - table[np.ix_(top, right)]
        - table[np.ix_(bottom, left)]
        + table[np.ix_(top, left)]
    )
    return total


def strong_pixels(image: NDArray[np.uint16], good: Mask) -> tuple[Mask, Array]:
    """Return the pixels over ``SIGMAS`` and every pixel's counts above its background.

    Photon counts follow Poisson's law, so sigma is the root of the background. The background is the mean of the good
    pixels around, taken again without those that stood out, so that neither spots nor hot pixels lift it.
    """
    counts = np.where(good, image, 0).astype(np.float64)
    used = good
    for _ in range(BACKGROUND_PASSES):
        share = np.maximum(box_sum(used.astype(np.float64), BACKGROUND_HALF_PX), 1.0)
        background = box_sum(counts * used, BACKGROUND_HALF_PX) / share
        sigma = np.sqrt(np.maximum(background, 1.0))
        used = good & (counts <= background + CLIP_SIGMAS * sigma)
    return good & (counts > background + SIGMAS * sigma), counts - background


def centroids(strong: Mask, above: Array) -> Array:
    """Return x, y (pixels) and summed counts of each connected group (8 neighbours) of enough strong pixels."""
    ys, xs = np.nonzero(strong)
    group = connected(ys.tolist(), xs.tolist())
    _, member, size = np.unique(group, return_inverse=True, return_counts=True)
    weight = above[ys, xs]
    total = np.bincount(member, weight)
    x, y = np.bincount(member, weight * xs) / total, np.bincount(member, weight * ys) / total
    return np.stack([x, y, total], axis=1)[size >= SPOT_PIXELS_MIN]


def connected(ys: list[int], xs: list[int]) -> NDArray[np.int64]:
    """Return a group number for each pixel, by union-find; pixels come row by row, so earlier neighbours suffice."""
    number = {pixel: n for n, pixel in enumerate(zip(ys, xs, strict=True))}
    parent = list(range(len(number)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for (y, x), n in number.items():
        for neighbour in ((y, x - 1), (y - 1, x - 1), (y - 1, x), (y - 1, x + 1)):
            other = number.get(neighbour)
            if other is not None:
                parent[root(n)] = root(other)
    return np.array([root(n) for n in range(len(parent))], dtype=np.int64)


# ---------------------------------------------------------------- the lattice


def scattering_vectors(spots: Array, stop: RunStop) -> Array:
    """Return q = (s1 - s0) / wavelength of each spot in 1/angstrom, with the beam s0 along z; |q| = 2 sin(theta) / wavelength."""
    x = (spots[:, 0] - stop.beam_center_px[0]) * stop.pixel_mm
    y = (spots[:, 1] - stop.beam_center_px[1]) * stop.pixel_mm
    ray = np.stack([x, y, np.full_like(x, stop.distance_mm)], axis=1)
    unit = ray / np.linalg.norm(ray, axis=1, keepdims=True)
    q: Array = (unit - np.array([0.0, 0.0, 1.0])) / stop.wavelength_angstrom
    return q


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
        if fitting >= FITTING_MIN and all(angle_deg(axis, known) > 20.0 for known in axes):
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
        axis = np.linalg.lstsq(q[inlier], np.round(index[inlier]), rcond=None)[0]
    return axis, float(np.mean(fits(q, axis)))


def fits(q: Array, axis: Array) -> Mask:
    """Return for each spot whether its index along the axis is nearly whole."""
    index = q @ axis
    near: Mask = np.abs(index - np.round(index)) < WHOLE_WITHIN
    return near


def angle_deg(a: Array, b: Array) -> float:
    """Return the angle between two axes, 0 to 90 degrees: the sign of an axis has no meaning."""
    cosine = abs(float(a @ b)) / float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


def shortest_pair(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the two shortest vectors of the plane lattice of ``a`` and ``b`` (Lagrange's reduction), shortest first."""
    while True:
        if a @ a > b @ b:
            a, b = b, a
        whole = round(float(a @ b) / float(a @ a))
        if whole == 0:
            return a, b
        b = b - whole * a
