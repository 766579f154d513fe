"""Training, judging and explaining the forecaster: same bytes however it is run, numbers that mean what they say."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats

from trajbook.apps.cli import main
from trajbook.config import load_method, resolve
from trajbook.core import TrajbookError, read_json, rng, root
from trajbook.moe.data import (
    FAMILIES,
    PRESETS,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    Stream,
    family,
    make_motions,
    read_file,
    variant,
)
from trajbook.moe.evaluate import (
    METRICS,
    Cases,
    ball_radius,
    choose_rulers,
    crps_t,
    error,
    family_means,
    mean_error,
    oracle_forecast,
    predict,
    recurrence,
    selected,
    valid_time,
)
from trajbook.moe.experts import (
    ExpertViewer,
    choices_of,
    information,
    knockouts,
    mutual_information,
    routers,
    without,
)
from trajbook.moe.model import MoEForecaster
from trajbook.moe.train import MotionDataset, loss_fn, targets
from trajbook.run import VERDICTS, RunReader, run_method

SHORT = {
    "variants": ["moe", "dense", "dlinear"],
    "train.steps": 6,
    "train.eval_every": 3,
    "train.batch_size": 8,
    "data.n_val": 20,
    "data.n_test": 25,
}


def some_cases(n: int = 50, noise: float = 0.01) -> Cases:
    cfg, draw = DataConfig(), rng(0, "tests")
    made = make_motions(FAMILIES, np.arange(n) % 5, cfg.time_s, 3, draw)
    seen, future = np.split(made.position, [128], 1)
    rms = np.sqrt(((seen - seen.mean(1, keepdims=True)) ** 2).mean((1, 2), keepdims=True))
    observed = seen + noise * rms * draw.normal(size=seen.shape)
    return Cases(observed, seen, future, made.family, FAMILIES, made.unit, False, 0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same run twice, with one worker and with two."
    place = tmp_path_factory.mktemp("moe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAJBOOK_RUNS", str(place / "runs"))
        patch.setenv("TRAJBOOK_CACHE", str(place / "cache"))
        options = {"isolate": False, "fresh": False}
        yield [
            RunReader(
                run_method("moe", "tiny", [0], SHORT | {"workers": w}, name=f"w{w}", **options)[0]
            )
            for w in (1, 2)
        ]


@pytest.mark.slow
def test_workers_do_not_change_a_byte(runs):
    one, two = (sorted(r.dir.glob("checkpoints/*/*/model.safetensors")) for r in runs)
    assert len(one) >= 6 and [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    clock = ("seconds", "per_s", "memory", "time")
    a, b = (
        {k: m["value"] for k, m in r.results().items() if not any(c in k for c in clock)}
        for r in runs
    )
    assert a == b


@pytest.mark.slow
def test_a_run_leaves_what_the_document_lists(runs):
    found = {p.name for p in runs[0].dir.rglob("*") if p.is_file()}
    wanted = {
        "training_progress.png",
        "training_summary.yaml",
        "evaluation_summary.txt",
        "metrics_comparison.png",
    }
    wanted |= {
        "trajectory_analysis_dashboard.png",
        "expert_utilization.png",
        "prediction_robot.png",
    }
    assert wanted <= found


@pytest.mark.slow
def test_the_headline_numbers_have_their_names(tmp_path_factory, runs):
    keys = set(runs[0].results())
    models = (
        "moe",
        "dense",
        "dlinear",
        "linear_ar",
        "linear_ar_selected",
        "constant_velocity",
        "constant_acceleration",
        "last",
    )
    for condition in ("clean", "noisy", "held_out_parameters", "held_out_families"):
        assert {
            f"evaluate.error.{condition}.{h}.{m}" for h in ("mean", "median") for m in models
        } <= keys
    assert {f"evaluate.error.noisy.{f}.{m}" for f in FAMILIES for m in models} <= keys
    names = (
        "mutual_information_family",
        "mutual_information_null",
        "routing_entropy",
        "utilization_min",
        "utilization_max",
    )
    assert {f"evaluate.experts.{n}" for n in names} <= keys
    assert {"evaluate.coverage_90", "evaluate.crps.moe", "evaluate.crps.linear_ar"} <= keys
    trained = runs[0].cfg.variants
    left_out = {n for n in ("dense", "dense_time", "plain", "gru", "dlinear") if n not in trained}
    wanted = {k for k in load_method("moe").headline if k.rpartition(".")[2] not in left_out}
    missing = wanted - keys
    assert not missing


def test_training_learns_something():
    "Two hundred steps on easy motions halve the network's own error."
    cfg = DataConfig(families=("helix", "lissajous"))
    settings = resolve("moe", "tiny")
    stream = Stream(cfg, settings.augment, 32)
    torch.manual_seed(0)
    model = MoEForecaster(dataclasses.replace(settings.model, candidates=()))
    optimizer, errors = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(120):
        batch = {k: torch.from_numpy(v) for k, v in next(stream).items()}
        total, weight, means = loss_fn(model, batch, settings.loss)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        errors.append(float(means["error"]))
    assert np.mean(errors[-10:]) < 0.5 * np.mean(errors[:10])


def test_targets_are_the_futures_of_each_token():
    stream = Stream(DataConfig(), resolve("moe", "tiny").augment, 20)
    batch = {k: torch.from_numpy(v) for k, v in next(stream).items()}
    model = MoEForecaster(ModelConfig())
    out = model(batch["observed"], batch["n_valid"], anchors=8)
    found = targets(batch, out, model.config)
    metres = found.own[:, 2] * out.window.scale + out.window.center
    np.testing.assert_allclose(metres, batch["position"][:, 88:120], rtol=1e-4, atol=1e-4)
    short = batch["n_valid"] < 40
    assert (found.asked[short, 0] == 0).all() and (found.asked[:, -1] == 1).all()


def test_the_loader_gives_the_stream():
    stream = Stream(DataConfig(families=("helix",)), resolve("moe", "tiny").augment, 4)
    loader = torch.utils.data.DataLoader(MotionDataset(stream), batch_size=None, num_workers=2)
    seen = [b["sample_id"].tolist() for b, _ in zip(loader, range(6), strict=False)]
    assert seen == [stream.batch(i)["sample_id"].tolist() for i in range(6)]


def test_the_truth_gets_full_marks_and_units_follow():
    cases = some_cases()
    for name, m in METRICS.items():
        ideal = 1.0 if name in ("temporal_consistency", "jerk_ratio") else 0.0
        np.testing.assert_allclose(m.measure(cases, cases.future), ideal, atol=1e-9)
    off = cases.future + np.array([0.3, 0.0, 0.4])
    np.testing.assert_allclose(METRICS["position_error"].measure(cases, off), 0.5)
    np.testing.assert_allclose(METRICS["endpoint_error"].measure(cases, off), 0.5)
    np.testing.assert_allclose(METRICS["mse"].measure(cases, off), 0.25 / 3)


@pytest.mark.slow
def test_a_file_is_continued_and_the_table_can_be_continued_again(runs, tmp_path, capsys):
    "By command; what the file's times say against the training's is said, and what does not fit."
    table, out, run = tmp_path / "mine.csv", tmp_path / "futures.csv", str(runs[0].dir)
    rows = [f"0,{k / 30},{np.sin(k / 9)},{np.cos(k / 9)},{k / 50}" for k in range(150)]
    table.write_text("\n".join(["episode,time_s,x_m,y_m,z_m", *rows]))
    assert main(["forecast", run, str(table), "--horizon", "40", "--out", str(out)]) == 0
    assert "steps of 0.0333333 s" in capsys.readouterr().err
    again = read_file(out)
    assert again[0]["position"].shape == (40, 3)
    assert main(["forecast", run, str(out), "--out", str(tmp_path / "more.safetensors")]) == 0
    sure = ["--quantiles", "0.05", "0.95", "--out"]
    assert main(["forecast", run, str(table), *sure, str(tmp_path / "sure.safetensors")]) == 0
    found = load_file(tmp_path / "sure.safetensors")
    assert (found["quantile_0.05"] < found["mean"]).all()
    assert (found["mean"] < found["quantile_0.95"]).all()
    capsys.readouterr()
    assert main(["forecast", run, str(table), "--quantiles", "95", "--out", str(out)]) == 2
    assert "quantiles = 95.0 is not possible: it must be between 0 and 1" in capsys.readouterr().err
    flat = tmp_path / "flat.csv"
    flat.write_text("\n".join(["x_m,y_m", *("0,1" for _ in range(20))]))
    assert main(["forecast", run, str(flat), "--out", str(out)]) == 2
    assert "2 coordinates; this model takes 3" in capsys.readouterr().err


MINE = """
import numpy as np
from trajbook.moe.data import family
from trajbook.moe.evaluate import metric

@family("pendulum", length_m=(0.5, 2.0), swing=(0.1, 0.6), phase=(0.0, 6.28))
def pendulum(p, time_s):
    pace = np.sqrt(9.81 / p["length_m"])
    angle = p["swing"] * np.cos(pace * time_s + p["phase"])
    return np.stack([p["length_m"] * np.sin(angle), -p["length_m"] * np.cos(angle), 0 * angle], -1)

@metric("worst_step", "m")
def worst_step(cases, mean):
    return np.linalg.norm(mean - cases.future, axis=-1).max(1)
"""


@pytest.mark.slow
def test_a_family_and_a_metric_of_ones_own_go_through_a_run(tmp_path, monkeypatch):
    "From the folder in which the command was given, to the results."
    (tmp_path / "mine_of_a_test.py").write_text(MINE)
    for name, folder in (("HOME", ""), ("RUNS", "runs"), ("CACHE", "cache")):
        monkeypatch.setenv(f"TRAJBOOK_{name}", str(tmp_path / folder))
    mine = {
        "variants": ["moe"],
        "data.families": ["helix", "mine_of_a_test:pendulum"],
        "evaluate.metrics": ["mine_of_a_test:worst_step"],
    }
    (folder,) = run_method(
        "moe", "tiny", [0], SHORT | mine, name="mine", isolate=False, fresh=False
    )
    METRICS.pop("worst_step")
    found = RunReader(folder).results()
    for key in ("error.noisy.pendulum.moe", "error.clean.pendulum.last", "worst_step.pendulum.moe"):
        assert f"evaluate.{key}" in found
    assert "evaluate.error.held_out_parameters.helix.moe" in found
    assert "evaluate.error.held_out_parameters.pendulum.moe" not in found  # nothing is held out
    with pytest.raises(TrajbookError, match="nobody"):
        resolve("moe", "tiny", {"data.families": ["nobody:pendulum"]})
    with pytest.raises(TrajbookError, match="different names"):
        resolve("moe", "tiny", {"data.families": ["helix", "orbit", "helix"]})


def test_the_oracle_is_a_floor():
    noisy = some_cases(40)
    floor = family_means(error(noisy, oracle_forecast(noisy)), noisy)
    assert max(v for k, v in floor.items() if k != "robot") < 0.05 < floor["robot"]
    settings = dataclasses.replace(resolve("moe", "tiny").evaluate, ar_orders=(16, 32))
    for _, ruler in choose_rulers(noisy, settings).values():
        means = family_means(error(noisy, ruler(torch.tensor(noisy.observed), 32).numpy()), noisy)
        assert all(floor[f] < means[f] for f in floor)


@pytest.mark.parametrize("dof", [2.5, 7.0, np.inf])
def test_crps_agrees_with_sampling(dof):
    draw = np.random.default_rng(0)
    sampled = draw.normal(size=400_000) if np.isinf(dof) else draw.standard_t(dof, 400_000)
    for y in (-2.0, 0.1, 4.0):
        wanted = np.abs(sampled - y).mean() - 0.5 * np.abs(sampled[::2] - sampled[1::2]).mean()
        assert abs(float(crps_t(np.array(y), np.array(1.0), dof)) - wanted) < 0.02
    if np.isinf(dof):
        return
    assert abs(ball_radius(0.9, 1, dof) - stats.t.ppf(0.95, dof)) < 1e-9


def test_forecasts_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model, cases = MoEForecaster(ModelConfig()).eval(), some_cases(30)
    whole, parts = predict(model, cases), predict(model, cases, batch=7)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-5, atol=1e-5)
    assert mean_error(cases, whole.mean.numpy()) > 0


def test_information_of_labels():
    draw = np.random.default_rng(0)
    a = draw.integers(0, 4, 5000)
    assert abs(mutual_information(a, a) - np.log(4)) < 0.01
    assert mutual_information(a, draw.integers(0, 3, 5000)) < 0.01
    windows = np.repeat(draw.integers(0, 4, (300, 1)), 16, 1)
    value, null, p = information(windows, windows, 20, draw)
    assert value > 1.3 > 0.2 > null and p == 1 / 21


def test_taking_an_expert_away_leaves_no_trace():
    torch.manual_seed(0)
    model, cases = MoEForecaster(ModelConfig()).eval(), some_cases(20)
    before = choices_of(model, cases).gate
    table = knockouts(model, cases)
    assert table.shape == (2, 4, 5) and np.isfinite(table).all()
    np.testing.assert_array_equal(choices_of(model, cases).gate, before)
    with pytest.raises(ZeroDivisionError), without(model, 0, 1):
        raise ZeroDivisionError
    assert all(r.alive.all() for r in routers(model))


def test_the_viewer_refuses_what_is_too_large():
    from trajbook.core import TrajbookError

    paths = {f"p{i}": np.random.default_rng(i).normal(size=(4000, 3)) for i in range(40)}
    gates = {k: np.full((2, 16, 4), 0.25) for k in paths}
    with pytest.raises(TrajbookError, match="fewer motions"):
        ExpertViewer(paths, gates, np.full((2, 5, 4), 0.25), FAMILIES, context=128, dt_s=0.01)


def test_claims_of_the_document_have_a_form():
    mine = [c for c in read_json(root() / "data" / "claims.json") if c["document"][:3] == "002"]
    assert len(mine) >= 20 and len({c["id"] for c in mine}) == len(mine)
    said = " ".join(c["sentence"] for c in mine)
    for words in ("naturally supports 3D", "naturally specialize", "3x memory", "Zero-Overhead"):
        assert words in said
    for c in mine:
        assert c["status"] in VERDICTS and c["page"].startswith("moe/") and c["key"]
        assert c["reason"] if c["status"] == "open" else c["note"]


def test_a_selected_recurrence_is_one_of_its_orders_for_every_window():
    x, orders = torch.tensor(some_cases(60).observed), (4, 16, 48)
    found = selected(orders, 1e-10)(x, 32)
    others = torch.stack([recurrence(p, 1e-10)(x, 32) for p in orders])
    same = (found == others).flatten(2).all(-1)  # (orders, windows)
    assert same.any(0).all() and len(same.float().argmax(0).unique()) == len(orders)


def test_valid_time_ends_at_the_first_step_beyond_the_limit():
    away = np.array([[0.5, 0.0], [0.0, 0.5], [0.4, 0.4]])
    assert valid_time(away, 0.1).tolist() == [0.0, 0.1, 0.2]


def test_tokens_that_are_asked_cannot_know_their_future():
    "Also in contexts that were cut short: what a token says does not depend on what follows it."
    torch.manual_seed(0)
    model, C, P = MoEForecaster(ModelConfig()).eval(), 128, 8
    rows = next(Stream(DataConfig(), AugmentConfig(short=0.8), 64))
    batch = {k: torch.from_numpy(v) for k, v in rows.items()}
    with torch.no_grad():
        before = model(batch["observed"], batch["n_valid"], anchors=8)
        asked = targets(batch, before, model.config).asked.bool()
        assert asked[:, -1].all() and 0 < (~asked).sum()
        for a in range(7):
            bent = batch["observed"].clone()
            bent[:, C - P * (7 - a) :] += 1.0
            after = model(bent, batch["n_valid"], anchors=8).own[:, a]
            mine = asked[:, a]
            torch.testing.assert_close(after[mine], before.own[mine, a], atol=1e-4, rtol=1e-4)


def test_the_null_of_a_label_that_all_windows_share():
    draw = np.random.default_rng(0)
    place = np.repeat(np.arange(16)[None], 200, 0)
    value, null, p = information(place // 4, place, 20, draw)
    assert abs(value - np.log(4)) < 1e-9 and null < 0.1 and p == 1 / 21
    value, null, p = information(draw.integers(0, 4, place.shape), place, 20, draw)
    assert abs(value - null) < 0.02 and p > 1 / 21


def test_a_balance_without_a_loss_has_none():
    assert variant(PRESETS["small"], "bias").loss.load_balance == 0
    assert variant(PRESETS["small"], "moe").loss.load_balance > 0


def test_a_family_with_too_many_numbers_is_refused():
    with pytest.raises(TrajbookError, match="family 'crowd': numbers = 90.*at most 80"):
        family("crowd", place_m=(0.0, 1.0, 30, 3))(lambda p, t: t)
