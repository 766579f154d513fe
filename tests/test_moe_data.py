"""Motions in space: the laws they obey, the stream that never repeats itself, families of one's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from trajbook.config import resolve
from trajbook.core import TrajbookError, rng
from trajbook.data import Trajectories
from trajbook.moe.data import (
    GRAVITY,
    LANES,
    REGISTER,
    SPLITS,
    AugmentConfig,
    DataConfig,
    Family,
    MoEConfig,
    Stream,
    conserved_along,
    eccentric_anomaly,
    family,
    lissajous_rates,
    load_family,
    lorenz_slope,
    make_motions,
    make_test_sets,
    variant,
)

TIMES = np.arange(200) * 1e-4


def members(name: str, n: int = 40, held_out: bool = False, seed: int = 0):
    one = load_family(name)
    return one, one.parameters(rng(seed, "test", name).random((n, one.n_parameters)), held_out)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", ["helix", "orbit", "lissajous"])
def test_what_a_family_conserves_is_conserved(name, held_out):
    one, p = members(name, held_out=held_out)
    found = conserved_along(one, one.path(p, TIMES), p, 1e-4)
    spread = np.ptp(found, axis=1) / np.abs(found).mean(1)
    assert spread.max() < 1e-6


def test_a_helix_climbs_by_its_pitch():
    one, p = members("helix")
    turn = 1 / p["turns_per_s"]
    ends = one.path(p, np.array([0.0, 1.0]))
    climbed = (ends[:, 1] - ends[:, 0])[:, 2:] * turn
    np.testing.assert_allclose(climbed, p["pitch_m"], rtol=1e-12)


def test_orbits_follow_newtons_law_and_keplers_second():
    one, p = members("orbit")
    path = one.path(p, TIMES)
    pull = np.diff(path, n=2, axis=1) / 1e-8
    place = path[:, 1:-1]
    law = -GRAVITY * place / np.linalg.norm(place, axis=-1, keepdims=True) ** 3
    np.testing.assert_allclose(pull, law, rtol=1e-3, atol=1e-3 * np.abs(law).max())
    areas = np.linalg.norm(np.cross(path[:, :-1], path[:, 1:]), axis=-1)
    assert (np.ptp(areas, axis=1) / areas.mean(1)).max() < 1e-4


@given(st.floats(0, 0.94), st.floats(-20, 20))
@settings(max_examples=300, deadline=None)
def test_keplers_equation_is_solved_everywhere(e, mean):
    found = float(eccentric_anomaly(np.array(mean), np.array(e)))
    wrapped = (mean + np.pi) % (2 * np.pi) - np.pi
    assert abs(found - e * np.sin(found) - wrapped) < 1e-12


def test_lissajous_axes_are_harmonic():
    one, p = members("lissajous")
    path = one.path(p, TIMES)
    pull = np.diff(path, n=2, axis=1) / 1e-8
    np.testing.assert_allclose(
        pull, -(lissajous_rates(p) ** 2) * path[:, 1:-1], atol=1e-4 * np.abs(pull).max()
    )


@pytest.mark.parametrize("held_out", [False, True])
def test_lorenz_paths_match_an_eighth_order_method(held_out):
    one, p = members("lorenz", 3, held_out)
    times = np.arange(160) * 0.01
    for i, path in enumerate(one.path(p, times)):
        numbers = [float(p[k][i].item()) for k in ("sigma", "rho", "beta")]
        slope = lambda _, x, n=numbers: lorenz_slope(x, *n)  # noqa: E731
        right = solve_ivp(slope, (0, 1.6), path[0], "DOP853", times, rtol=1e-12, atol=1e-12).y.T
        assert np.abs(path - right).max() < 1e-2
        assert path[:, 2].min() > 0  # on the attractor


def test_a_robot_rests_at_its_places_and_never_jumps():
    one, p = members("robot")
    p["rest"], p["begun"] = np.full_like(p["rest"], 0.2), np.zeros_like(p["begun"])
    share = 1.6 / (np.floor(p["places"]) - 1)
    lasts = share * p["pace"][:, 0]
    for i in range(len(share)):
        mine = {k: v[i : i + 1] for k, v in p.items()}
        times = lasts[i, 0] + np.linspace(0.01, 0.19, 7) * share[i, 0]
        rests = one.path(mine, times)[0]
        np.testing.assert_allclose(
            rests, np.broadcast_to(p["place_m"][i, 0, 1], rests.shape), atol=1e-12
        )
    fine = one.path(p, np.arange(0, 1.6, 1e-3))
    assert np.linalg.norm(np.diff(fine, axis=1), axis=-1).max() < 0.1


def test_held_out_numbers_lie_outside_the_usual_ranges():
    for one in REGISTER.values():
        for name, (low, high, *_) in one.held_out.items():
            usual = one.ranges[name][:2]
            assert low >= usual[1] or high <= usual[0], (one.name, name)


@given(st.integers(1, 5), st.integers(0, 60), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_batches_do_not_depend_on_who_makes_them(size, step, world):
    cfg, rules = DataConfig(families=("helix", "lissajous")), AugmentConfig()
    whole = Stream(cfg, rules, size * world).batch(step)
    parts = [
        Stream(cfg, rules, size * world, rank=r, world=world).batch(step) for r in range(world)
    ]
    for key in whole:
        np.testing.assert_array_equal(whole[key], np.concatenate([p[key] for p in parts]))


def test_no_window_comes_twice_and_a_stream_goes_on():
    cfg, rules = DataConfig(families=("helix",)), AugmentConfig()
    stream = Stream(cfg, rules, 1000)
    seen = np.concatenate([next(stream)["sample_id"] for _ in range(6 * LANES)])
    assert len(np.unique(seen)) == len(seen)
    state = stream.state_dict()
    wanted = next(stream)
    again = Stream(cfg, rules, 1000)
    again.load_state_dict(state)
    for key, value in next(again).items():
        np.testing.assert_array_equal(value, wanted[key])
    with pytest.raises(TrajbookError, match="batch_size was 1000 and is now 10"):
        Stream(cfg, rules, 10).load_state_dict(state)


def test_weights_and_seeds():
    heavy = DataConfig(families=("helix", "lissajous"), weights=(3.0, 1.0))
    batch = Stream(heavy, AugmentConfig(), 4000).batch(0)
    assert 0.7 < (batch["family"] == 0).mean() < 0.8
    other = Stream(heavy, AugmentConfig(), 4000, seed=1).batch(0)
    assert not np.array_equal(batch["position"], other["position"])


def test_test_sets_are_the_same_every_time(tmp_path):
    cfg = DataConfig(n_val=10, n_test=16)
    for name in "ab":
        make_test_sets(cfg, tmp_path / name)
    a, b = (Trajectories.open(tmp_path / n) for n in "ab")
    assert a.fingerprint == b.fingerprint and set(a.splits) == set(SPLITS)
    make_test_sets(DataConfig(seed=1, n_val=10, n_test=16), tmp_path / "c")
    assert Trajectories.open(tmp_path / "c").fingerprint != a.fingerprint


@family("test_spring", rate=(1.0, 2.0))
def spring(p, time_s):
    return np.stack([np.sin(p["rate"] * time_s), 0 * p["rate"] * time_s], -1)


def test_a_family_of_ones_own_is_found_by_its_module():
    name = f"{__name__}:spring"
    cfg = DataConfig(families=("helix", name), unseen=(), dims=2, n_val=4, n_test=4)
    made = make_motions(cfg.families, np.array([0, 1]), cfg.time_s, cfg.dims, rng(0))
    assert made.position.shape == (2, 160, 2)
    with pytest.raises(TrajbookError, match="cannot be found"):
        load_family("no.such.module:family")
    with pytest.raises(TrajbookError, match="not a family of motions"):
        load_family("math:pi")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda p, t: np.full((1, len(t), 3), np.nan), "not finite"),
        (lambda p, t: np.zeros((1, len(t), 2)), "3 or more"),
        (lambda p, t: np.zeros((1, 7, 3)), "gave shape"),
    ],
)
def test_a_wrong_family_is_named(bad, words):
    REGISTER["bad"] = Family("bad", bad, {"a": (0.0, 1.0)})
    with pytest.raises(TrajbookError, match=words) as caught:
        make_motions(("bad",), np.array([0]), DataConfig().time_s, 3, rng(0))
    assert "'bad'" in str(caught.value)
    del REGISTER["bad"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.sampling_rate_hz": -1}, "data.sampling_rate_hz = -1"),
        ({"data.n_test": 2}, "one of each family"),
        ({"model.d_model": 20}, "multiple of"),
        ({"model.d_ff": 12}, "model.d_ff = 12"),
        ({"model.candidates": ["arr"]}, "model.candidates"),
        ({"variants": ["moe", "moe"]}, "variants"),
        ({"augment.short": 2}, "augment.short"),
        ({"loss.own": -1}, "loss.own"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, words):
    with pytest.raises(TrajbookError, match=words):
        resolve("moe", "tiny", changes)


def test_horizon_and_context_change_together():
    changes = {"data.horizon": 16, "model.horizon": 16, "data.context": 64, "model.context": 64}
    cfg = resolve("moe", "tiny", changes)
    assert cfg.data.time_s.shape == (80,)


def test_variants_change_what_they_say():
    cfg = MoEConfig()
    assert variant(cfg, "dense").model.router == "dense"
    assert variant(cfg, "dense_time").train.steps > variant(cfg, "moe").train.steps
    assert not variant(cfg, "no_rotation").augment.rotate
