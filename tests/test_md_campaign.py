"""The flagship: a run stop, a simulation at a site, an answer with a figure; and its program by itself."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functions.examples import md_campaign, molecular_dynamics
from functions.examples.campaign import figure, lj_md
from headrace.loading import load
from headrace.packing import pack_file
from headrace.testing import Bench
from headrace.trace import Trace
from tests.sites import Here

EXAMPLES = Path(md_campaign.__file__).parent
STATE = EXAMPLES / "data/molecular_dynamics/state_0042.npz"
SHORT = lj_md.Parameters(density=0.8442, temperature=1.44, steps=60, equilibration_steps=20)


def program(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program as a site does: with Python alone, and nothing of ours on the path."""
    script = folder / "lj_md.py"
    script.write_text(Path(lj_md.__file__).read_text())
    return subprocess.run(
        [sys.executable, "-I", str(script), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---------------------------------------------------------------- the program


def test_the_program_runs_where_only_numpy_is_and_agrees_with_the_reference(tmp_path: Path) -> None:
    ran = program("--density", "0.8442", "--temperature", "1.44", "--backend", "numpy", folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("\nstep ") == lj_md.TOLD_TIMES
    found = json.loads((tmp_path / "result.json").read_text())
    assert md_campaign.departures(found) == []
    assert (found["backend"], found["n"], found["parameters"]["steps"]) == ("numpy", 256, 3000)
    assert {len(line) for line in found["series"].values()} == {lj_md.SERIES_POINTS_MAX}


def test_the_program_does_the_physics_of_the_example_functions() -> None:
    track = lj_md.simulate(lj_md.arrays("numpy"), SHORT)
    positions, box = molecular_dynamics.fcc_lattice(4, 0.8442)
    pairs = molecular_dynamics.neighbours(positions, box, 2.9)
    energy, virial, _ = molecular_dynamics.interact(positions, pairs, 2.5)
    assert track[0, 0] == pytest.approx(energy, rel=1e-12)
    assert track[0, 2] == pytest.approx(virial, rel=1e-12)
    kinetic = 0.5 * float((molecular_dynamics.thermal_momenta(256, 1.44, np.random.default_rng(1)) ** 2).sum())
    assert track[0, 1] == pytest.approx(kinetic, rel=1e-12)


def test_pairs_are_the_same_however_many_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on = lj_md.arrays("numpy")
    positions, box = lj_md.lattice(4, 0.8442)
    positions += np.random.default_rng(3).normal(scale=0.1, size=positions.shape)
    whole = lj_md.pairs_within(on, positions, box, 2.9)
    monkeypatch.setattr(lj_md, "PAIRS_AT_ONCE_MAX", 256 * 7)
    parts = lj_md.pairs_within(on, positions, box, 2.9)
    i, j, _ = molecular_dynamics.neighbours(positions, box, 2.9)
    assert set(zip(whole.i, whole.j, strict=True)) == set(zip(i, j, strict=True))
    assert set(zip(parts.i, parts.j, strict=True)) == set(zip(i, j, strict=True))
    assert len(parts.i) == len(whole.i) == len(i)


def backends() -> list[str]:
    """Return the backends that can be used here: NumPy, and others where they are installed."""
    found = []
    for name in lj_md.BACKENDS:
        with suppress(ImportError):
            found.append(lj_md.arrays(name).name)
    return found


@pytest.mark.parametrize("name", backends())
def test_every_backend_does_the_steps_of_the_example_function(name: str) -> None:
    made = lj_md.averages(lj_md.simulate(lj_md.arrays(name), SHORT), SHORT)
    simulation = {"steps": SHORT.steps, "equilibration_steps": SHORT.equilibration_steps}
    known = Bench(molecular_dynamics).fire("lj_dynamics", simulation).result()
    for value in (
        "start_potential_per_particle",
        "energy_per_particle",
        "energy_change_max",
        "temperature",
        "pressure",
    ):
        assert made[value] == pytest.approx(known[value], rel=1e-9), value


def test_numpy_is_taken_where_nothing_finds_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*, must: bool) -> lj_md.Arrays:
        raise RuntimeError("no driver")

    monkeypatch.setattr(lj_md, "_cupy", missing)
    monkeypatch.setattr(lj_md, "_torch", missing)
    assert lj_md.arrays().name == "numpy"
    with pytest.raises(ImportError, match="cupy cannot be used here: RuntimeError: no driver"):
        lj_md.arrays("cupy")


def test_an_energy_that_is_not_kept_is_a_failure_that_says_so(tmp_path: Path) -> None:
    words = ("--density", "0.8442", "--temperature", "1.44", "--steps", "40", "--equilibration-steps", "10")
    ran = program(*words, "--dt", "0.05", "--backend", "numpy", folder=tmp_path)
    assert ran.returncode == lj_md.ENERGY_NOT_KEPT, ran.stderr
    assert "take a smaller --dt than 0.05" in ran.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--density", "0.8", "--temperature", "1", "--cells", "2"], "beyond half a box"),
        (["--density", "-1", "--temperature", "1"], "must be above zero"),
        (["--density", "1", "--temperature", "1", "--steps", "5"], "below steps"),
    ],
)
def test_what_cannot_be_run_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    ran = program(*words, folder=tmp_path)
    assert (ran.returncode, said in ran.stderr) == (2, True), ran.stderr


# ---------------------------------------------------------------- reducing, comparing, drawing


def test_the_state_is_reduced_to_what_the_reference_starts_from() -> None:
    density, temperature = md_campaign.reduce_state(STATE)
    assert density == pytest.approx(0.8442, abs=1e-9)
    assert temperature == pytest.approx(1.44, abs=1e-9)


def test_a_flow_of_the_whole_fluid_is_no_temperature(tmp_path: Path) -> None:
    with np.load(STATE) as state:
        np.savez(tmp_path / "moving.npz", positions=state["positions"], momenta=state["momenta"] + 5, box=state["box"])
    assert md_campaign.reduce_state(tmp_path / "moving.npz")[1] == pytest.approx(1.44, abs=1e-9)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", positions=np.zeros((2, 8)), momenta=np.zeros((3, 8)), box=np.array(2.0))
    with pytest.raises(ValueError, match="are no state"):
        md_campaign.reduce_state(tmp_path / "flat.npz")


def test_the_reference_is_that_of_the_shipped_file() -> None:
    known = json.loads((EXAMPLES / "data/molecular_dynamics/reference.json").read_text())
    nve, melt, tolerance = known["nve"], known["fcc_melt"], known["nve"]["tolerances"]
    assert {
        "start_potential_per_particle": (melt["energy_per_particle"], melt["tolerance"]),
        "energy_per_particle": (nve["energy_per_particle"], 1e-2),
        "energy_change_max": (0.0, tolerance["energy_change"]),
        "temperature": (nve["mean_temperature_steps_1000_3000"], tolerance["temperature"]),
        "potential_per_particle": (nve["mean_potential_per_particle"], tolerance["potential"]),
        "pressure": (nve["mean_pressure"], tolerance["pressure"]),
    } == md_campaign.REFERENCE


def found(**changes: Any) -> dict[str, Any]:
    values = {name: value for name, (value, _) in md_campaign.REFERENCE.items()}
    return values | {"parameters": {"density": 0.8442, "temperature": 1.44, "cutoff": 2.5}} | changes


@pytest.mark.parametrize("name", md_campaign.REFERENCE)
def test_every_value_is_compared(name: str) -> None:
    value, tolerance = md_campaign.REFERENCE[name]
    assert md_campaign.departures(found()) == []
    assert md_campaign.departures(found(**{name: value + 0.9 * tolerance})) == []
    for wrong in (value + 1.1 * tolerance, float("nan")):
        (said,) = md_campaign.departures(found(**{name: wrong})) or []
        assert said.startswith(f"{name} is ")


def test_another_state_is_not_compared() -> None:
    assert md_campaign.departures(found(parameters={"density": 0.7, "temperature": 1.44, "cutoff": 2.5})) is None


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    """Read a PNG of eight bits of red, green and blue, checking every part of it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        name, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(name + body),)
        parts[name] = body
        at += 12 + size
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert (depth, colour, list(parts)) == (8, 2, [b"IHDR", b"IDAT", b"IEND"])
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_a_line_goes_where_its_values_are() -> None:
    image = pixels(figure.chart([0, 1, 2], {"up": [0.0, 5.0, 10.0]}, title="t", x_label="x"))
    assert image.shape == (figure.HEIGHT, figure.WIDTH, 3)
    plot = image[figure.TOP + 1 : figure.HEIGHT - figure.BOTTOM, figure.LEFT + 2 : figure.WIDTH - figure.RIGHT]
    rows, columns = np.nonzero((plot == figure.COLOURS[0]).all(axis=2))
    assert np.corrcoef(rows, columns)[0, 1] < -0.999
    assert columns.max() - columns.min() > 0.99 * (plot.shape[1] - 3)


@pytest.mark.parametrize(
    ("x", "line", "said"),
    [([0], [1.0], "cannot be drawn"), ([0, 1], [1.0], "cannot"), ([0, 1], [1.0, float("nan")], "not finite")],
)
def test_what_cannot_be_drawn_is_refused(x: list[float], line: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        figure.chart(x, {"a": line}, title="", x_label="")


# ---------------------------------------------------------------- the whole way


def fire(here: Here, **changes: Any) -> Trace:
    return here.bench.fire("md_campaign", {"run": "42", "uri": STATE.as_uri()} | changes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as where it is deployed
    return Here(tmp_path, md_campaign)


def test_a_run_stop_is_answered_with_the_energy_and_a_figure(here: Here) -> None:
    trace = fire(here)
    answer = trace.result()
    assert [step.function for step in trace.steps if step.function.startswith("md_")] == ["md_campaign", "md_compare"]
    assert (answer["agrees"], answer["off"], answer["failed"]) == (True, [], "")
    assert answer["energy"] == pytest.approx(-4.62181, abs=1e-4)
    assert (answer["backend"], answer["site"], answer["queue_s"], answer["run_s"]) == ("numpy", "here", 1.5, 2.5)
    image = pixels(here.bench.stage(answer["figure"]).read_bytes())
    assert (image == figure.COLOURS[2]).all(axis=2).sum() > 200
    (job,) = trace.jobs
    assert (job.spec.resources.gpus, job.spec.attributes.duration_s) == (1, 300.0)


def test_a_state_without_a_reference_is_answered_and_not_judged(here: Here, tmp_path: Path) -> None:
    with np.load(STATE) as state:
        np.savez(tmp_path / "hot.npz", positions=state["positions"], momenta=2 * state["momenta"], box=state["box"])
    answer = fire(here, uri=(tmp_path / "hot.npz").as_uri(), steps=60).result()
    assert (answer["agrees"], answer["off"]) == (None, [])
    assert answer["energy"] > 0


def test_a_simulation_that_fails_is_an_answer_that_says_why(here: Here) -> None:
    trace = fire(here, cells=1)
    answer = trace.result()
    assert trace.steps[-1].function == "md_failed"
    assert (answer["energy"], answer["agrees"], answer["figure"]) == (None, None, None)
    assert answer["failed"].startswith("exit_code, exit code 2.")
    assert "beyond half a box" in answer["failed"]


def test_what_the_campaign_needs_travels_with_it() -> None:
    packed = pack_file(md_campaign.__file__)
    assert [each.declaration.name for each in packed] == ["md_campaign", "md_compare", "md_failed"]
    for each in packed:
        assert set(each.code.files) == {
            "md_campaign.py",
            "campaign/__init__.py",
            "campaign/figure.py",
            "campaign/lj_md.py",
        }
    loaded = load(packed[0].code)
    try:
        assert loaded.function.__globals__["program_text"]() == Path(lj_md.__file__).read_text()
    finally:
        loaded.bundle.deactivate()
