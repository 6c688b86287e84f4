"""Between-shot spectral analysis of a tokamak: is a tearing mode growing, and which modes does the shot hold?

A shot-done event names a file with fluctuation-imaging counts of a few time windows, each on a coarse 32x32 and a fine
128x128 grid of channels by time. A 2-D FFT of a window gives its power over wavenumber and frequency. The coarse grid
is enough for the flag: the power of the tearing mode over the local median. A flagged shot chains the fine grid, whose
Nyquist frequency (250 kHz instead of 62.5 kHz) is high enough for the Alfven eigenmode.

The fine analysis can also say how far noise moves the frequency: it repeats itself with as much noise again, some
hundred times. Where that does not fit before the next shot, it has two cheaper variants, on the first 64 and the first
32 points of both axes: the route's ``on_late="degrade"`` has the best one answer that is still in time, and the full
one follow. Half the points are a quarter of the work and half the resolution, and get half as many resamples.

The file is an ``.npz`` with ``counts32`` and ``counts128``, both of shape (window, channel, time), in digitiser counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace import Context, function, on

FLAG_RATIO = 20.0  # a mode stands out when its power is this many times the local median
FULL_POINTS = 128  # of each axis of the fine grid
MIN_RESAMPLES = 20  # fewer tell no spread
NEAR_K_BINS = 4  # "local" is the neighbourhood of this many wavenumber bins ...
NEAR_F_BINS = 10  # ... by this many frequency bins to each side

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shot:
    """A shot that has just ended: where its counts are, the axes of both grids, and the tearing mode to watch.

    Wavenumbers are cycles per metre, positive where a wave travels towards higher channel numbers.
    """

    shot: int
    uri: str
    sample_rate_hz: float
    channel_spacing_m: float
    coarse_sample_rate_hz: float
    coarse_spacing_m: float
    tearing_k_per_m: float = 1.5625
    tearing_f_hz: float = 11718.75
    resamples: int = 0


@dataclass(frozen=True)
class Peak:
    """The strongest wave of one window above the coarse grid's Nyquist frequency.

    ``f_spread_khz`` is how far its frequency moves when as much noise as there is comes on top (half the distance of
    the 16th and the 84th percentile), where the shot asks for resamples.
    """

    window: int
    k_per_m: float
    f_khz: float
    power_over_median: float
    f_spread_khz: float | None = None


@dataclass(frozen=True)
class Eigenmode:
    """The Alfven eigenmode of a shot, window by window; ``chirp_khz_per_window`` is the slope of its frequency.

    ``points`` is how many points of each axis it was found on.
    """

    points: int
    k_per_m: float
    chirp_khz_per_window: float
    peaks: list[Peak]


@dataclass(frozen=True)
class ShotReport:
    """The answer: the flag from the coarse grid and, for a flagged shot, the eigenmode from the fine one.

    ``tearing_over_median`` is the tearing mode's power over the local median, by window; the mode is there from
    ``onset_window`` on.
    """

    shot: int
    flagged: bool
    onset_window: int | None
    tearing_k_per_m: float
    tearing_f_hz: float
    tearing_over_median: list[float]
    eigenmode: Eigenmode | None = None


@dataclass(frozen=True)
class FlaggedShot:
    """What is passed on to the analysis of the fine grid."""

    shot: Shot
    report: ShotReport


@on(type="org.headrace.example.shot.done", deadline="60s", on_late="degrade")
@function(timeout="20s", retries=1)
def shot_done(shot: Shot, ctx: Context) -> ShotReport:
    """Raise the flag if the tearing mode stands out on the coarse grid, and chain the fine analysis of such a shot."""
    with np.load(ctx.stage(shot.uri)) as file:
        power = travelling_power(file["counts32"])
    channels, samples = power.shape[1:]
    k_bin = round(shot.tearing_k_per_m * channels * shot.coarse_spacing_m)
    f_bin = round(shot.tearing_f_hz * samples / shot.coarse_sample_rate_hz)
    ratios = [over_median(window, k_bin, f_bin) for window in power]
    above = [number for number, ratio in enumerate(ratios) if ratio >= FLAG_RATIO]
    report = ShotReport(
        shot=shot.shot,
        flagged=bool(above),
        onset_window=above[0] if above else None,
        tearing_k_per_m=k_bin / (channels * shot.coarse_spacing_m),
        tearing_f_hz=f_bin * shot.coarse_sample_rate_hz / samples,
        tearing_over_median=[round(ratio, 1) for ratio in ratios],
    )
    if report.flagged:
        ctx.log.warning("shot %d: tearing mode from window %d on", shot.shot, above[0])
        ctx.progress(0.2, "flagged: the fine grid follows")
        ctx.call(shot_modes, FlaggedShot(shot=shot, report=report))
    return report


@function(timeout="60s", retries=1)
def shot_modes_64(flagged: FlaggedShot, ctx: Context) -> ShotReport:
    """Find the eigenmode on the first 64 points of each axis: half the resolution for an eighth of the work."""
    return with_modes(flagged, ctx, 64)


@function(timeout="60s", retries=1)
def shot_modes_32(flagged: FlaggedShot, ctx: Context) -> ShotReport:
    """Find the eigenmode on the first 32 points of each axis: good enough to tell that and about where it is."""
    return with_modes(flagged, ctx, 32)


@function(timeout="120s", retries=1, variants=[shot_modes_64, shot_modes_32])
def shot_modes(flagged: FlaggedShot, ctx: Context) -> ShotReport:
    """Find the eigenmode of each window on the fine grid: its wavenumber, its frequency, and how fast it chirps."""
    return with_modes(flagged, ctx, FULL_POINTS)


def with_modes(flagged: FlaggedShot, ctx: Context, points: int) -> ShotReport:
    """Return the report with the eigenmode as the first ``points`` of each axis show it."""
    shot = flagged.shot
    with np.load(ctx.stage(shot.uri)) as file:
        counts = file["counts128"][:, :points, :points]
    above_hz = shot.coarse_sample_rate_hz / 2  # what lies below could be seen on the coarse grid already
    peaks: list[Peak] = []
    for number, window in enumerate(counts):
        peak = strongest_peak(window, number, shot.sample_rate_hz, shot.channel_spacing_m, above_hz)
        if peak is not None and shot.resamples > 0:
            resamples = max(MIN_RESAMPLES, shot.resamples * points // FULL_POINTS)
            spread_hz = frequency_spread_hz(window, shot.sample_rate_hz, above_hz, resamples)
            peak = replace(peak, f_spread_khz=round(spread_hz / 1e3, 3))
        if peak is not None:
            peaks.append(peak)
        ctx.progress((number + 1) / len(counts), f"{points} points")
    return replace(flagged.report, eigenmode=eigenmode(peaks, points) if peaks else None)


def eigenmode(peaks: list[Peak], points: int) -> Eigenmode:
    """Join the peaks of the windows: the median wavenumber, and the slope of a line through the frequencies."""
    windows, frequencies = [p.window for p in peaks], [p.f_khz for p in peaks]
    slope = float(np.polyfit(windows, frequencies, 1)[0]) if len(peaks) > 1 else 0.0
    return Eigenmode(
        points=points,
        k_per_m=float(np.median([p.k_per_m for p in peaks])),
        chirp_khz_per_window=round(slope, 3),
        peaks=peaks,
    )


def travelling_power(counts: NDArray[np.int16]) -> Array:
    """Return the power of waves ``cos(2 pi (k y - f t))`` in each window: index [window, k, f] in FFT bin order.

    A forward FFT along time has such a wave at -f, so the frequency axis is turned round.
    """
    centred = counts - counts.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(centred)) ** 2
    turned: Array = power[:, :, -np.arange(power.shape[2])]
    return turned


def over_median(power: Array, k_bin: int, f_bin: int) -> float:
    """Return the power at one bin over the median of its neighbourhood (the axes wrap round, as an FFT's do)."""
    k = np.arange(k_bin - NEAR_K_BINS, k_bin + NEAR_K_BINS + 1) % power.shape[0]
    f = np.arange(f_bin - NEAR_F_BINS, f_bin + NEAR_F_BINS + 1) % power.shape[1]
    median = float(np.median(power[np.ix_(k, f)]))
    return float(power[k_bin, f_bin]) / median if median > 0 else 0.0


def strongest_peak(
    counts: NDArray[np.int16], window: int, sample_rate_hz: float, spacing_m: float, above_hz: float
) -> Peak | None:
    """Return the strongest wave of one window with a frequency over ``above_hz``, or None where none stands out.

    Along time a Hann window is applied, for which the frequency between two bins follows from the two largest
    amplitudes: with a = larger neighbour / peak it lies (2a - 1) / (a + 1) bins from the peak, on the neighbour's side
    (T. Grandke, IEEE Trans. Instrum. Meas. 32, 350, 1983).
    """
    channels, samples = counts.shape
    spectrum = np.fft.fft2((counts - counts.mean()) * hann(samples))[:, -np.arange(samples)]
    power = np.abs(spectrum) ** 2
    bin_hz = sample_rate_hz / samples
    low = int(above_hz / bin_hz) + 1
    band = power[1 : channels // 2, low : samples // 2 - 1]
    if band.size == 0:
        return None
    k_bin, f_bin = (int(n) for n in np.unravel_index(int(band.argmax()), band.shape))
    k_bin, f_bin = k_bin + 1, f_bin + low
    ratio = over_median(power, k_bin, f_bin)
    if ratio < FLAG_RATIO:
        return None
    frequency_hz = between_bins(np.abs(spectrum[k_bin, f_bin - 1 : f_bin + 2]), f_bin) * bin_hz
    return Peak(
        window=window,
        k_per_m=k_bin / (channels * spacing_m),
        f_khz=round(frequency_hz / 1e3, 3),
        power_over_median=round(ratio, 1),
    )


def frequency_spread_hz(
    counts: NDArray[np.int16], sample_rate_hz: float, above_hz: float, resamples: int, seed: int = 1
) -> float:
    """Return how far the frequency of the strongest wave moves when as much noise as there is comes on top.

    Every resample is searched anew: where the noise is strong, another wave may win.
    """
    samples = counts.shape[1]
    bin_hz = sample_rate_hz / samples
    low = int(above_hz / bin_hz) + 1
    rng = np.random.default_rng(seed)
    noise = float(np.std(counts - np.roll(counts, 1, axis=0))) / np.sqrt(2)
    found = []
    for _ in range(resamples):
        again = counts - counts.mean() + noise * rng.standard_normal(counts.shape)
        amplitude = np.abs(np.fft.fft2(again * hann(samples))[1 : len(counts) // 2, -np.arange(samples)])
        band = amplitude[:, low : samples // 2 - 1]
        k_bin, f_bin = (int(n) for n in np.unravel_index(int(band.argmax()), band.shape))
        f_bin += low
        found.append(between_bins(amplitude[k_bin, f_bin - 1 : f_bin + 2], f_bin) * bin_hz)
    below, above = np.percentile(found, [16, 84])
    return float(above - below) / 2


def hann(samples: int) -> Array:
    """Return the Hann window."""
    window: Array = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(samples) / samples)
    return window


def between_bins(amplitudes: Array, f_bin: int) -> float:
    """Return where between the bins a frequency lies, from the amplitudes of its bin and of both neighbours."""
    before, peak, after = (float(each) for each in amplitudes)
    a = max(before, after) / peak
    return f_bin + (1.0 if after > before else -1.0) * (2 * a - 1) / (a + 1)
