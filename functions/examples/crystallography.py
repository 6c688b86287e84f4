"""Hit finding in serial crystallography: which frames of a run caught a crystal?

A run-stop event names a file with all frames. The run is fanned out by frame: each frame is searched for Bragg spots,
and one with enough spots is a hit. The results join to a hit rate, and when that passes a threshold the hits with
most spots go on to ``index_hits`` (in ``indexing.py``): a chain by name, across files that do not know each other.

The file is an ``.npz`` with ``frames`` (frame, y, x; photon counts) and, if there is one, ``mask`` (y, x; True where a
pixel is good). Pixels of the masked value are left out as well.
"""

from __future__ import annotations

from dataclasses import dataclass
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
class RunReport:
    """The answer: the hits of a run. ``index_hits`` adds its lattice."""

    run: str
    frames: int
    hits: list[int]
    hit_rate: float
    spots_by_frame: list[int]


@dataclass(frozen=True)
class ToIndex:
    """What is passed on when the hit rate is worth it: the report so far, and the hits with most spots."""

    report: RunReport
    hits: list[FrameSpots]


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
        ctx.call("index_hits", ToIndex(report=report, hits=best))
    return report


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


def scattering_vectors(spots: Array, stop: RunStop) -> Array:
    """Return q = (s1 - s0) / wavelength of each spot in 1/angstrom: s0 is the beam, along z, s1 leads to the spot."""
    x = (spots[:, 0] - stop.beam_center_px[0]) * stop.pixel_mm
    y = (spots[:, 1] - stop.beam_center_px[1]) * stop.pixel_mm
    ray = np.stack([x, y, np.full_like(x, stop.distance_mm)], axis=1)
    unit = ray / np.linalg.norm(ray, axis=1, keepdims=True)
    q: Array = (unit - np.array([0.0, 0.0, 1.0])) / stop.wavelength_angstrom
    return q
