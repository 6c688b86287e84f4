"""The science functions that ship, on the bench (payloads encoded and decoded), against known answers."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from functions.examples import alerts, crystallography, fusion, indexing, md_campaign, molecular_dynamics, pointing
from headrace.errors import RunFailed
from headrace.sdk import declaration
from headrace.testing import Bench

EXAMPLES = Path(fusion.__file__).parent
DATA = EXAMPLES / "data"
MODULES: list[ModuleType] = [fusion, crystallography, indexing, molecular_dynamics, alerts, pointing, md_campaign]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    found.name: fn for module in MODULES for fn in vars(module).values() if (found := declaration(fn)) is not None
}


BENCH = Bench(*MODULES)


class Ran:
    """What came of one trigger: the functions that ran, in order, the answer, and the progress of the last one."""

    def __init__(self, function: str, data: Any, rung: int = 0) -> None:
        trace = BENCH.fire(function, data, rung=rung)
        self.answer = trace.result()
        self.functions = [step.function for step in trace.steps]
        self.progress = trace.steps[-1].progress


def uri(path: str | Path) -> str:
    return (DATA / path).as_uri()


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_an_example_imports_nothing_of_ours_but_headrace(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    ours = {"streams", "functions", "workers", "gateway", "infra"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not ours & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module not in ours
            assert not (node.module or "").startswith("headrace.")


def test_every_route_of_an_example_has_a_filter_and_a_deadline() -> None:
    routes = [route for fn in FUNCTIONS.values() if (found := declaration(fn)) for route in found.routes.values()]
    assert len(routes) == 6
    assert all(route.deadline is not None and route.filter is not None for route in routes)


def test_every_file_of_data_is_named_in_the_notice() -> None:
    notice = (DATA / "NOTICE.md").read_text(encoding="utf-8")
    for path in DATA.rglob("*"):
        if path.is_dir() or path.name == "NOTICE.md":
            continue
        shown = path.relative_to(DATA).with_suffix("").as_posix()
        assert shown in notice or shown.startswith("notices/synthetic_"), f"{shown} has no source and licence"


# ---------------------------------------------------------------- fusion


def shot(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The event of a shot, and its known answer."""
    known = json.loads((DATA / f"fusion/shot_{number}.json").read_text(encoding="utf-8"))
    axes = ("sample_rate_hz", "channel_spacing_m", "coarse_sample_rate_hz", "coarse_spacing_m")
    event = {"shot": number, "uri": uri(f"fusion/shot_{number}.npz")} | {axis: known[axis] for axis in axes}
    return event, known


def test_a_shot_with_a_tearing_mode_is_flagged_and_its_modes_are_found() -> None:
    event, known = shot(900001)
    ran = Ran("shot_done", event)
    assert ran.functions == ["shot_done", "shot_modes"]
    assert ran.answer["flagged"] is True
    assert ran.answer["onset_window"] == known["tearing"]["onset_window"]
    assert ran.answer["tearing_k_per_m"] == known["tearing"]["k_per_m"]
    assert ran.answer["tearing_f_hz"] == known["tearing"]["f_hz"]
    mode = ran.answer["eigenmode"]
    assert mode["k_per_m"] == known["eigenmode"]["k_per_m"]
    assert mode["chirp_khz_per_window"] == pytest.approx(known["eigenmode"]["chirp_hz_per_window"] / 1e3, abs=0.05)
    assert [peak["window"] for peak in mode["peaks"]] == list(range(8))
    found = [peak["f_khz"] for peak in mode["peaks"]]
    assert found == pytest.approx([window["eigenmode_khz"] for window in known["windows"]], abs=0.1)


@pytest.mark.parametrize(("rung", "points", "f_khz", "chirp_khz"), [(1, 64, 0.2, 0.05), (2, 32, 1.2, 0.2)])
def test_fewer_points_find_the_same_mode_less_sharply(rung: int, points: int, f_khz: float, chirp_khz: float) -> None:
    event, known = shot(900001)
    ran = Ran("shot_done", event, rung)
    assert ran.functions == ["shot_done", f"shot_modes_{points}"]
    mode = ran.answer["eigenmode"]
    bin_per_m = 1 / (points * known["channel_spacing_m"])
    assert mode["points"] == points
    assert mode["k_per_m"] == pytest.approx(known["eigenmode"]["k_per_m"], abs=bin_per_m / 2 + 1e-6)
    assert mode["chirp_khz_per_window"] == pytest.approx(known["eigenmode"]["chirp_hz_per_window"] / 1e3, abs=chirp_khz)
    found = [peak["f_khz"] for peak in mode["peaks"]]
    assert found == pytest.approx([window["eigenmode_khz"] for window in known["windows"]], abs=f_khz)
    assert all(peak["f_spread_khz"] is None for peak in mode["peaks"])


def test_noise_moves_the_frequency_by_as_much_as_is_said() -> None:
    event, known = shot(900001)
    spreads = {}
    for rung, points in ((0, 128), (1, 64), (2, 32)):
        peaks = Ran("shot_done", event | {"resamples": 200}, rung).answer["eigenmode"]["peaks"]
        errors = [p["f_khz"] - w["eigenmode_khz"] for p, w in zip(peaks, known["windows"], strict=True)]
        spreads[points] = float(np.median([p["f_spread_khz"] for p in peaks]))
        assert float(np.sqrt(np.mean(np.square(errors)))) < 2 * spreads[points]
    assert spreads[128] < spreads[64] / 2 < spreads[32] / 4


def test_a_quiet_shot_is_not_flagged_and_chains_nothing() -> None:
    ran = Ran("shot_done", shot(900002)[0])
    assert ran.functions == ["shot_done"]
    assert ran.answer["flagged"] is False
    assert ran.answer["onset_window"] is None
    assert ran.answer["eigenmode"] is None
    assert max(ran.answer["tearing_over_median"]) < fusion.FLAG_RATIO


def test_windows_without_any_signal_raise_no_flag(tmp_path: Path) -> None:
    np.savez(tmp_path / "dead.npz", counts32=np.full((2, 32, 32), 700, dtype=np.int16))
    ran = Ran("shot_done", shot(900001)[0] | {"uri": uri(tmp_path / "dead.npz")})
    assert ran.answer["tearing_over_median"] == [0.0, 0.0]
    assert ran.functions == ["shot_done"]


@pytest.mark.parametrize(("direction", "flagged"), [(1, True), (-1, False)])
def test_only_a_wave_that_travels_the_right_way_is_the_tearing_mode(
    tmp_path: Path, direction: int, *, flagged: bool
) -> None:
    _, known = shot(900001)
    y = np.arange(32)[:, None] * known["coarse_spacing_m"]
    t = np.arange(32)[None, :] / known["coarse_sample_rate_hz"]
    wave = np.cos(2 * np.pi * (direction * known["tearing"]["k_per_m"] * y - known["tearing"]["f_hz"] * t))
    noise = np.random.default_rng(5).normal(size=(32, 32))
    np.savez(tmp_path / "wave.npz", counts32=np.round(1000 + 40 * wave + 40 * noise)[None].astype(np.int16))
    with np.load(tmp_path / "wave.npz") as file:
        power = fusion.travelling_power(file["counts32"])[0]
    assert (fusion.over_median(power, 2, 3) >= fusion.FLAG_RATIO) is flagged


def test_a_shot_with_a_field_missing_is_the_senders_mistake() -> None:
    event, _ = shot(900001)
    del event["sample_rate_hz"]
    with pytest.raises(RunFailed, match="sample_rate_hz"):
        Ran("shot_done", event)


# ---------------------------------------------------------------- crystallography


def run_stop(path: str | Path = "crystallography/run0001.npz") -> tuple[dict[str, Any], dict[str, Any]]:
    """The event of a run stop, and its known answer."""
    known = json.loads((DATA / "crystallography/run0001.json").read_text(encoding="utf-8"))
    geometry = ("pixel_mm", "distance_mm", "wavelength_angstrom", "beam_center_px", "masked_value")
    event = {"run": known["name"], "uri": uri(path)}
    return event | {key: known[key] for key in geometry}, known


def quiet_frames(count: int, size: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).poisson(9.0, (count, size, size)).astype(np.uint16)


def test_the_hits_of_a_run_are_found_and_its_cell_is_indexed() -> None:
    event, known = run_stop()
    ran = Ran("run_stopped", event)
    assert ran.functions == ["run_stopped", *["find_spots"] * 24, "hit_rate", "index_hits"]
    assert ran.answer["hits"] == known["hits"]
    assert ran.answer["frames"] == 24
    assert ran.answer["hit_rate"] == 0.375
    cell = ran.answer["lattice"]
    assert cell["a_angstrom"] == pytest.approx(58.0, abs=0.2)
    assert cell["b_angstrom"] == pytest.approx(58.0, abs=0.2)
    assert cell["angle_deg"] == pytest.approx(90.0, abs=0.3)
    assert len(cell["frames"]) == 5
    assert all(frame["fitting"] > 0.9 for frame in cell["frames"])
    assert 2.5 < cell["resolution_angstrom"] < 3.0


def test_most_strong_spots_of_a_frame_are_found_where_they_are() -> None:
    _, known = run_stop()
    frames, mask = crystallography.load_run(DATA / "crystallography/run0001.npz")
    assert mask is not None
    spots = crystallography.centroids(*crystallography.strong_pixels(frames[13], mask))
    strong = np.array([spot[:2] for spot in known["frames"][13]["spots"] if spot[2] > 120])
    nearest = np.linalg.norm(strong[:, None] - spots[None, :, :2], axis=2).min(axis=1)
    assert np.mean(nearest < 1.0) > 0.8


def test_a_run_without_hits_is_not_indexed(tmp_path: Path) -> None:
    np.savez(tmp_path / "run.npz", frames=quiet_frames(3))
    ran = Ran("run_stopped", run_stop(tmp_path / "run.npz")[0])
    assert ran.functions == ["run_stopped", "find_spots", "find_spots", "find_spots", "hit_rate"]
    assert ran.answer["hits"] == []
    assert ran.answer["hit_rate"] == 0.0


def test_a_run_without_frames_has_a_hit_rate_of_zero(tmp_path: Path) -> None:
    np.savez(tmp_path / "run.npz", frames=quiet_frames(0))
    ran = Ran("run_stopped", run_stop(tmp_path / "run.npz")[0])
    assert ran.answer["frames"] == 0
    assert ran.answer["hit_rate"] == 0.0


def test_single_hot_pixels_are_not_spots_and_pairs_are() -> None:
    image = quiet_frames(1)[0]
    good = np.ones(image.shape, dtype=bool)
    image[5:60:6, 5:60:6] = 5000
    strong, above = crystallography.strong_pixels(image, good)
    assert strong.sum() >= 100
    assert len(crystallography.centroids(strong, above)) == 0
    image[6:61:6, 6:61:6] = 5000  # each hot pixel gets a diagonal neighbour
    spots = crystallography.centroids(*crystallography.strong_pixels(image, good))
    assert len(spots) == 100
    assert spots[0, :2] == pytest.approx([5.5, 5.5], abs=0.05)


def test_masked_pixels_are_neither_spots_nor_background(tmp_path: Path) -> None:
    frames = quiet_frames(2)
    frames[0, 20:30, :] = 65535
    frames[1] = 65535
    np.savez(tmp_path / "run.npz", frames=frames)
    ran = Ran("run_stopped", run_stop(tmp_path / "run.npz")[0])
    assert ran.answer["spots_by_frame"] == [0, 0]
    good = frames[0] != 65535
    _, above = crystallography.strong_pixels(frames[0], good)
    assert np.abs(above[good]).max() < 40  # the background beside the gap is that of its good pixels


def test_connected_pixels_form_one_group_whatever_their_shape() -> None:
    ring = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (4, 0), (5, 1), (7, 7)]
    group = crystallography.connected([y for y, _ in ring], [x for _, x in ring])
    assert len(set(group[:8])) == 1
    assert len(set(group[8:10])) == 1
    assert len(set(group.tolist())) == 3


# ---------------------------------------------------------------- indexing


def lattice_spots(a: list[float], b: list[float], c: list[float]) -> np.ndarray[Any, Any]:
    """Reciprocal lattice points that lie near the Ewald sphere of 1 angstrom, to 3 angstrom."""
    reciprocal = np.linalg.inv(np.array([a, b, c])).T
    index = np.stack(np.meshgrid(*[np.arange(-30, 31)] * 3, indexing="ij")).reshape(3, -1).T
    q: np.ndarray[Any, Any] = index[np.any(index != 0, axis=1)] @ reciprocal
    length = np.linalg.norm(q, axis=1)
    near = np.abs(np.linalg.norm(q + np.array([0, 0, 1]), axis=1) - 1) < 0.0008
    chosen: np.ndarray[Any, Any] = q[near & (length < 1 / 3)]
    return chosen


def test_indexing_finds_two_axes_of_an_oblique_cell() -> None:
    q = lattice_spots([45.0, 6.0, 9.0], [-8.0, 60.0, 14.0], [30.0, -20.0, 130.0])
    found = indexing.index_frame(q, frame=7)
    assert found is not None
    a, b = np.array([45.0, 6.0, 9.0]), np.array([-8.0, 60.0, 14.0])
    assert found.frame == 7
    assert found.a_angstrom == pytest.approx(float(np.linalg.norm(a)), abs=0.1)
    assert found.b_angstrom == pytest.approx(float(np.linalg.norm(b)), abs=0.1)
    assert found.angle_deg == pytest.approx(indexing.angle_deg(a, b), abs=0.3)


def test_spots_without_a_lattice_are_not_indexed() -> None:
    q = np.random.default_rng(8).normal(scale=0.15, size=(40, 3))
    assert indexing.index_frame(q, frame=0) is None


def test_the_shortest_pair_of_a_plane_lattice_is_found_from_any_pair() -> None:
    a, b = indexing.shortest_pair(np.array([10.0, 1.0, 0.0]), np.array([73.0, 20.0, 0.0]))
    assert np.linalg.norm(a) <= np.linalg.norm(b)
    assert abs(float(np.cross(a, b)[2])) == pytest.approx(127.0)
    assert 60.0 <= indexing.angle_deg(a, b) <= 90.0


# ---------------------------------------------------------------- molecular dynamics

REFERENCE = json.loads((DATA / "molecular_dynamics/reference.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("cutoff", [3, 4])
def test_the_energy_of_the_nist_configuration_is_nists(cutoff: int) -> None:
    known = REFERENCE["periodic4"]
    answer = Ran(
        "lj_energy", {"uri": uri(f"molecular_dynamics/{known['file']}"), "box": known["box"], "cutoff": cutoff}
    ).answer
    expected = known[f"cutoff_{cutoff}"]
    assert answer["n"] == known["n"]
    assert answer["energy"] == pytest.approx(expected["energy"], abs=known["tolerance"])
    assert answer["virial"] == pytest.approx(expected["virial_sum_r_dot_f"], abs=known["tolerance"])
    assert answer["long_range_correction"] == pytest.approx(expected["long_range_correction"], abs=known["tolerance"])


def test_a_run_at_constant_energy_has_the_known_averages() -> None:
    known, melt = REFERENCE["nve"], REFERENCE["fcc_melt"]
    ran = Ran("lj_dynamics", {"seed": 1})
    answer, tolerance = ran.answer, known["tolerances"]
    assert (answer["n"], answer["steps"]) == (known["n"], known["steps"])
    assert answer["start_potential_per_particle"] == pytest.approx(melt["energy_per_particle"], abs=1e-6)
    assert answer["energy_per_particle"] == pytest.approx(known["energy_per_particle"], abs=1e-5)
    assert answer["energy_change_max"] < tolerance["energy_change"]
    assert answer["temperature"] == pytest.approx(
        known["mean_temperature_steps_1000_3000"], abs=tolerance["temperature"]
    )
    assert answer["potential_per_particle"] == pytest.approx(
        known["mean_potential_per_particle"], abs=tolerance["potential"]
    )
    assert answer["pressure"] == pytest.approx(known["mean_pressure"], abs=tolerance["pressure"])
    assert ran.progress[-1][0] == 1.0


def test_the_start_of_the_melt_has_the_known_pressure() -> None:
    answer = Ran("lj_dynamics", {"cells": 6, "steps": 1, "equilibration_steps": 0}).answer
    assert answer["n"] == 864
    assert answer["start_pressure"] == pytest.approx(-5.0211, abs=2e-4)


def test_neighbours_by_cells_are_all_pairs_within_reach() -> None:
    positions, box = molecular_dynamics.fcc_lattice(7, 0.8442)
    positions += np.random.default_rng(2).normal(scale=0.1, size=positions.shape) + 3 * box  # wrapped round the box
    i, j, _ = molecular_dynamics.neighbours(positions, box, 2.8)
    found = {(min(pair), max(pair)) for pair in zip(i.tolist(), j.tolist(), strict=True)}
    assert len(found) == len(i)
    a, b = np.triu_indices(positions.shape[1], 1)
    apart = positions[:, a] - positions[:, b]
    apart -= box * np.round(apart / box)
    near = (apart**2).sum(axis=0) < 2.8**2
    assert found == set(zip(a[near].tolist(), b[near].tolist(), strict=True))


def test_forces_are_the_slope_of_the_energy() -> None:
    positions, box = molecular_dynamics.fcc_lattice(4, 0.8442)
    positions += np.random.default_rng(4).normal(scale=0.05, size=positions.shape)

    def energy(x: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        pairs = molecular_dynamics.neighbours(x, box, 3.3)
        value, _, force = molecular_dynamics.interact(x, pairs, 3.3)
        return value, force

    _, force = energy(positions)
    assert np.abs(force.sum(axis=1)).max() < 1e-9
    step = np.zeros_like(positions)
    step[1, 17] = 1e-5
    slope = (energy(positions + step)[0] - energy(positions - step)[0]) / 2e-5
    assert force[1, 17] == pytest.approx(-slope, rel=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"cells": 3}, {"cells": 0}, {"steps": 10, "equilibration_steps": 10}, {"dt": 0.0}, {"density": -1.0}]
)
def test_a_simulation_that_cannot_be_run_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match=r"cannot be run|half a box"):
        Ran("lj_dynamics", wrong)


def test_a_cut_off_over_half_the_box_is_refused() -> None:
    path = f"molecular_dynamics/{REFERENCE['periodic4']['file']}"
    with pytest.raises(RunFailed, match="half a box"):
        Ran("lj_energy", {"uri": uri(path), "box": 8.0, "cutoff": 4.1})


def test_an_xyz_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.xyz"
    short.write_text("3\nbox\nA 0 0 0\nA 1 1 1\n", encoding="utf-8")
    with pytest.raises(RunFailed, match="promises 3 particles"):
        Ran("lj_energy", {"uri": uri(short), "box": 8.0, "cutoff": 3.0})


# ---------------------------------------------------------------- alerts

EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "notices/expected.json").read_text(encoding="utf-8"))


def notice(name: str) -> Any:
    raw = (DATA / "notices" / name).read_bytes()
    return json.loads(raw) if name.endswith(".json") else raw


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notice_gets_the_verdict_that_it_deserves(name: str) -> None:
    ran, expected = Ran("triage_alert", notice(name)), EXPECTED[name]
    assert ran.answer["action"] == expected["action"]
    assert ran.answer["reason"]
    if "area90_deg2" in expected:
        assert ran.answer["area90_deg2"] == pytest.approx(expected["area90_deg2"], rel=0.01, abs=1e-6)
    if expected["action"] == "follow":
        assert ran.functions == ["triage_alert", "plan_pointings"]
        assert ran.answer["plan"]["site"] == expected["site"]
        assert len(ran.answer["plan"]["fields"]) == expected["fields"]
    else:
        assert ran.functions == ["triage_alert"]


@pytest.mark.parametrize("tense", ["test", "injection", "commanded", "Test"])
def test_what_is_not_real_never_starts_work_however_good_it_looks(tense: str) -> None:
    ran = Ran("triage_alert", notice("synthetic_grb_update.json") | {"alert_tense": tense})
    assert ran.answer["action"] == "ignore"
    assert ran.functions == ["triage_alert"]


@pytest.mark.parametrize("tense", ["archival", "planned"])
def test_what_is_not_about_now_is_watched(tense: str) -> None:
    assert Ran("triage_alert", notice("synthetic_grb_update.json") | {"alert_tense": tense}).answer["action"] == "watch"


@pytest.mark.parametrize(
    ("change", "action", "reason"),
    [
        ({"image_snr": 4.2}, "watch", "not significant"),
        ({"classification": {"GRB": 0.1, "TGF": 0.9}}, "ignore", "TGF"),
        ({"ra_dec_error": None}, "watch", "no position"),
        ({"ra_dec_error": [2.0, 0.5, 30.0]}, "follow", "well placed"),
        ({"alert_type": "retraction", "alert_tense": "injection"}, "withdraw", "injection"),
        ({"dec": 89.9}, "watch", "no site"),
    ],
)
def test_each_part_of_a_notice_counts(change: dict[str, Any], action: str, reason: str) -> None:
    answer = Ran("triage_alert", notice("synthetic_grb_update.json") | change).answer
    assert answer["action"] == action
    assert reason in answer["reason"]


@pytest.mark.parametrize(
    ("superevent", "alert", "action"),
    [("S260101ab", {}, "watch"), ("TS260101ab", {}, "ignore"), ("S260101ab", {"alert_type": "RETRACTION"}, "withdraw")],
)
def test_gravitational_wave_alerts_are_told_apart_by_their_names(
    superevent: str, alert: dict[str, Any], action: str
) -> None:
    data = {"superevent_id": superevent, "alert_type": "INITIAL", "time_created": "2026-01-01T00:00:00Z", **alert}
    assert Ran("triage_alert", data).answer["action"] == action


def voevent(role: str = "observation", extra: str = "", name: str = "v:VOEvent") -> bytes:
    namespace = 'xmlns:v="http://www.ivoa.net/xml/VOEvent/v2.0" ' if name.startswith("v:") else ""
    return (
        f'<{name} {namespace}ivorn="ivo://x/y#1" role="{role}"><Who><Date>2026-03-14T02:00:44</Date></Who>{extra}'
        "<WhereWhen><Position2D><Value2><C1>187.71</C1><C2>12.39</C2></Value2><Error2Radius>0.1</Error2Radius>"
        f"</Position2D></WhereWhen></{name}>"
    ).encode()


@pytest.mark.parametrize(
    ("body", "action"),
    [
        (voevent(), "follow"),
        (voevent(name="VOEvent"), "follow"),
        (voevent(role="test"), "ignore"),
        (voevent(role="utility"), "watch"),
        (voevent(extra='<What><Param name="HardwareInj" value="1"/></What>'), "ignore"),
        (voevent(extra='<Citations><EventIVORN cite="retraction">ivo://x/y#0</EventIVORN></Citations>'), "withdraw"),
    ],
)
def test_voevents_are_read_with_and_without_a_namespace(body: bytes, action: str) -> None:
    answer = Ran("triage_alert", body).answer
    assert answer["action"] == action
    assert answer["at"] == "2026-03-14T02:00:44Z"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"shot": 1}, "neither a GCN notice"),
        ([1, 2], "neither a GCN notice"),
        (b"<VOEvent", "well-formed"),
        (b"<html/>", "not a VOEvent"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><VOEvent/>', "entities"),
        ({"alert_type": "initial", "ra": 400.0}, "ra: 400.0"),
        ({"alert_type": "initial", "alert_datetime": "yesterday"}, "yesterday"),
    ],
)
def test_what_is_no_notice_is_refused_with_the_reason(data: Any, text: str) -> None:
    with pytest.raises(RunFailed, match=text):
        Ran("triage_alert", data)


def test_the_radius_for_another_probability_follows_a_round_normal_distribution() -> None:
    assert alerts.radius_holding(0.9, 1.0, 0.9) == pytest.approx(1.0)
    assert alerts.radius_holding(0.9, 1.0, 1 - np.exp(-0.5)) == pytest.approx(2.145966)  # one sigma in two dimensions


def test_the_area_of_a_cap_goes_from_a_small_disc_to_the_whole_sky() -> None:
    assert alerts.cap_area_deg2(0.01) == pytest.approx(np.pi * 1e-4, rel=1e-6)
    assert alerts.cap_area_deg2(180.0) == pytest.approx(41252.961, abs=0.001)


def test_altitudes_agree_with_a_full_ephemeris() -> None:
    """The two altitudes are those of astropy 8.0, without refraction."""
    at = datetime(2024, 5, 8, 7, 38, 1, tzinfo=UTC)
    days = np.array([at.timestamp() / 86400 + 2440587.5 - 2451545.0])
    place = pointing.SITES["Cerro Paranal"]
    target = pointing.altitude(229.838, -29.747, *place, days)[0]
    sun_ra, sun_dec = pointing.sun(days)
    assert target == pytest.approx(53.7856, abs=0.5)
    assert pointing.altitude(sun_ra, sun_dec, *place, days)[0] == pytest.approx(-47.5333, abs=0.1)


@pytest.mark.parametrize(("ra", "dec", "radius"), [(350.0, -67.0, 1.9), (0.0, 85.0, 5.6), (10.0, -90.0, 3.0)])
def test_fields_leave_nothing_of_the_region_uncovered(ra: float, dec: float, radius: float) -> None:
    def unit(right: np.ndarray[Any, Any], up: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        right, up = np.radians(right), np.radians(up)
        return np.stack([np.cos(up) * np.cos(right), np.cos(up) * np.sin(right), np.sin(up)], axis=-1)

    fields = np.array(pointing.tile(ra, dec, radius))
    assert fields[0] == pytest.approx([ra % 360, dec], abs=1e-3) or dec == -90.0
    rng = np.random.default_rng(6)
    sky = unit(rng.uniform(0, 360, 200_000), np.degrees(np.arcsin(rng.uniform(-1, 1, 200_000))))
    inside = sky[sky @ unit(np.array(ra), np.array(dec)) >= np.cos(np.radians(radius))]
    assert len(inside) > 20
    nearest = np.degrees(np.arccos(np.clip((inside @ unit(fields[:, 0], fields[:, 1]).T).max(axis=1), -1, 1)))
    assert nearest.max() <= pointing.FIELD_RADIUS_DEG + 1e-3
