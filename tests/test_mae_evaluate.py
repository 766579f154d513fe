"""Evaluation and distillation of the trajectory MAE: baselines against other implementations."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scipy.interpolate import CubicHermiteSpline  # noqa: E402

from trajbook.checkpoint import load, read_header  # noqa: E402
from trajbook.config import resolve  # noqa: E402
from trajbook.core import TrajbookError, rng, root  # noqa: E402
from trajbook.mae.data import (  # noqa: E402
    BEHAVIOURS,
    DataConfig,
    ModelConfig,
    embed_states,
    make_dataset,
    simulate,
)
from trajbook.mae.distill import (  # noqa: E402
    DistillLoss,
    LessonBatches,
    Lessons,
    MLPStudent,
    StudentConfig,
    TransformerStudent,
    TransformerStudentConfig,
    save_student,
)
from trajbook.mae.evaluate import (  # noqa: E402
    HOLES,
    PatchMLP,
    Scale,
    WindowData,
    angle_error_deg,
    ar_fill,
    ar_maps,
    bench_of,
    document_arithmetic,
    document_memory,
    document_models,
    document_parameters,
    evaluate_holes,
    evaluate_probes,
    example_of,
    fit_both,
    fit_supervised,
    hermite_fill,
    linear_fill,
    oracle_fill,
    probe_curve,
    random_windows,
    reconstruct,
    tokens_of,
    tuned_ar,
    visible_neighbors,
)
from trajbook.mae.model import TrajectoryMAE, eval_masks  # noqa: E402
from trajbook.metrics import masked_mse  # noqa: E402
from trajbook.nn import MemoryMeter  # noqa: E402
from trajbook.run import VERDICTS, Run  # noqa: E402

SMALL = ModelConfig(patch=10, window=100, d_model=32, n_layers=1, n_heads=2, d_ff=64)


@pytest.fixture(scope="module")
def motions():
    push = rng(0, "test pushes").uniform(-1, 1, (8, 100))
    return np.stack([simulate((0, 2 + 0.3 * i, 0, 1), u)[:100] for i, u in enumerate(push)])


@pytest.fixture(scope="module")
def scale(motions):
    features = embed_states(motions)
    return Scale(features.mean((0, 1)), features.std((0, 1)))


@pytest.fixture(scope="module")
def teacher(scale):
    torch.manual_seed(0)
    model = TrajectoryMAE(SMALL).eval()
    model.set_normalizer(scale.mean, scale.std)
    return model


def holes(kind="random", n=8, ratio=0.75):
    return eval_masks(kind, ratio, n, 100, seed=3)


@pytest.mark.parametrize("kind", ["random", "patch", "block"])
def test_linear_fill_is_numpy_interp(motions, kind):
    hidden = holes(kind)
    got, t = linear_fill(motions, hidden), np.arange(100)
    for i in range(8):
        seen = np.flatnonzero(~hidden[i])
        for d in range(4):
            want = np.interp(t, seen, motions[i, seen, d])
            np.testing.assert_allclose(got[i, :, d], want, atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "patch"])
def test_hermite_fill_is_scipy(motions, kind):
    hidden = holes(kind)
    got, t = hermite_fill(motions, hidden), 0.01 * np.arange(100)
    for i in range(8):
        seen = np.flatnonzero(~hidden[i])
        inside = slice(seen[0], seen[-1] + 1)
        for d in (0, 1):
            spline = CubicHermiteSpline(t[seen], motions[i, seen, d], motions[i, seen, d + 2])
            np.testing.assert_allclose(got[i, inside, d], spline(t[inside]), atol=1e-8)
            np.testing.assert_allclose(
                got[i, inside, d + 2], spline.derivative()(t[inside]), atol=1e-6
            )
        assert (got[i, : seen[0]] == motions[i, seen[0]]).all()
        assert (got[i, seen[-1] :] == motions[i, seen[-1]]).all()


def test_every_fill_keeps_what_is_visible(motions, scale):
    hidden, z = holes("patch"), scale.apply(motions)
    for filled in (
        linear_fill(z, hidden),
        scale.apply(hermite_fill(motions, hidden)),
        ar_fill(z, hidden, *fit_both(z, 2)),
    ):
        np.testing.assert_allclose(filled[~hidden], z[~hidden], atol=1e-9)


def test_fills_do_not_look_at_hidden_values(motions, scale):
    hidden, z = holes("block"), scale.apply(motions)
    maps = fit_both(z, 2)
    spoiled = np.where(hidden[..., None], 1e6, motions)
    np.testing.assert_array_equal(hermite_fill(spoiled, hidden), hermite_fill(motions, hidden))
    dirty = np.where(hidden[..., None], 1e6, z)
    np.testing.assert_array_equal(linear_fill(dirty, hidden), linear_fill(z, hidden))
    np.testing.assert_array_equal(ar_fill(dirty, hidden, *maps), ar_fill(z, hidden, *maps))


def test_ar_recovers_a_linear_system():
    A = np.array([[0.9, 0.2], [-0.2, 0.9]])
    x = np.zeros((20, 80, 2))
    x[:, 0] = rng(0, "ar").normal(size=(20, 2))
    for t in range(79):
        x[:, t + 1] = x[:, t] @ A + 0.1
    forward, backward = fit_both(x, 1)
    np.testing.assert_allclose(forward, np.vstack([A, [0.1, 0.1]]), atol=2e-3)
    hidden = np.zeros((20, 80), bool)
    hidden[:, 20:40] = True
    np.testing.assert_allclose(ar_fill(x, hidden, forward, backward), x, atol=2e-2)


def test_a_window_without_anything_visible_is_refused():
    with pytest.raises(TrajbookError, match="nothing to fill it from"):
        visible_neighbors(np.ones((1, 5), bool))


def test_the_oracle_repeats_the_physics():
    u = rng(0, "oracle").uniform(-1, 1, 120).astype("float32").astype(float)
    states = simulate((0.1, 3.0, 0.0, 1.0), u, 0.7, 0.3, 0.001)[:120]
    targets = {"pole_length": np.array([0.7]), "pole_mass": np.array([0.3])}
    data = WindowData(states[None], u[None], np.zeros(1, int), targets, np.array([0.001]))
    np.testing.assert_allclose(oracle_fill(data)[0], states, atol=1e-12)


def test_reconstruction_sees_nothing_hidden(teacher, motions, scale):
    hidden = holes("patch")
    clean = WindowData(motions, np.zeros((8, 100)), np.arange(8), {}, np.zeros(8))
    dirty = clean._replace(states=np.where(hidden[..., None], 50.0, motions))
    got = [reconstruct(teacher, d, hidden, scale) for d in (clean, dirty)]
    np.testing.assert_allclose(*got, atol=1e-6)
    assert got[0].shape == (8, 100, 5)


def test_angle_error_lives_on_the_circle(motions, scale):
    every = np.ones((8, 100), bool)
    shifted = motions.copy()
    shifted[..., 1] += np.radians(10) + 6 * np.pi
    error = angle_error_deg(scale.apply(shifted), motions, every, scale)
    assert error == pytest.approx(10)


def test_masks_are_the_ones_of_the_definition():
    for name, (kind, ratio, _) in HOLES.items():
        hidden = eval_masks(kind, ratio, 20, 250, seed=0)
        want = round(ratio * 25) / 25 if kind != "random" else round(ratio * 250) / 250
        assert hidden.mean() == pytest.approx(want), name
        np.testing.assert_array_equal(hidden, eval_masks(kind, ratio, 20, 250, seed=0))


def test_patch_mlp_is_independent_of_other_patches(teacher, motions):
    net = PatchMLP(teacher).eval()
    x = torch.tensor(motions, dtype=torch.float32)
    other = torch.cat([x[:, :10], x.flip(0)[:, 10:]], 1)
    a, b = (net.encode(net.features(v))[:, 0] for v in (x, other))
    torch.testing.assert_close(a, b)


def test_random_windows_mirror_the_physics(motions):
    x = torch.tensor(motions, dtype=torch.float32)
    cut, rows = random_windows(x, 40, 50, torch.Generator().manual_seed(0))
    for w, row in zip(cut, rows, strict=True):
        found = [s * w[0] == x[row, :, :] for s in (1, -1)]
        assert any(f.all(-1).any() for f in found)


def test_supervised_learns_and_is_deterministic(teacher, motions):
    data = WindowData(
        motions,
        np.zeros((8, 100)),
        np.arange(8),
        {"behaviour": np.array([0, 0, 0, 0, 1, 1, 1, 1])},
        np.zeros(8),
    )
    states, labels = torch.tensor(motions, dtype=torch.float32), torch.tensor([0] * 4 + [1] * 4)
    options = {"steps": 20, "lr": 3e-3, "seed": 1}
    first, again = (fit_supervised(teacher, states, labels, data, data, **options) for _ in "ab")
    assert first[0] >= 0.75 and first == again


def test_label_curves_share_their_draws():
    kind = np.arange(100) % 5
    x = np.eye(5)[kind] + 0.1 * rng(0, "x").normal(size=(100, 5))
    data = [WindowData(None, None, np.arange(100), {"behaviour": kind}, None)] * 3
    rows = {"a": [(x,) * 3], "b": [(x,) * 3, (0 * x,) * 3]}
    curve = probe_curve("behaviour", rows, data, kind, (0.01, 1.0), (4, 1), seed=0)
    assert (curve["a"] == curve["b"]).all() and curve["a"][1] == 1


def test_memory_meter_counts_what_backward_keeps():
    layer = torch.nn.Linear(100, 100, bias=False)
    with MemoryMeter() as meter:
        layer(torch.ones(1000, 100)).relu().sum().backward()
    at_least = 4 * (1000 * 100 * 3)  # input, output, its gradient
    assert at_least <= meter.peak < 3 * at_least


def test_memory_of_a_batch_does_not_multiply_what_the_batch_shares():
    model = document_models()["full"]
    one, many = (document_memory(model, n, n_steps=20) for n in (1, 64))
    total = document_parameters({"full": model, "asymmetric": model})["parameters.total"]
    assert one["memory_gb.infer"] > 4e-9 * total and one["memory_gb.train"] > 16e-9 * total
    for mode in ("infer", "train"):  # 20 steps are little beside five million weights
        assert one[f"memory_gb.{mode}"] < many[f"memory_gb.{mode}"] < 5 * one[f"memory_gb.{mode}"]


def test_document_parameters_are_the_formula():
    found = document_parameters(document_models())
    block = 12 * 256**2 + 13 * 256
    assert found["parameters.encoder"] == 6 * block + 2 * 256
    assert found["parameters.decoder"] == 256 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 5 + 5


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    data = make_dataset(
        DataConfig(n_trajectories=40, n_steps=120), tmp_path_factory.mktemp("m") / "d"
    )
    cfg = resolve(
        "mae", "tiny", {"model.window": 100, "step.model.window": 100, "evaluate.mlp_steps": 2}
    )
    torch.manual_seed(0)
    model = TrajectoryMAE(SMALL).eval()
    model.fit_normalizer(data)
    return bench_of(cfg, data, {"patch": model})


def test_everybody_is_scored_in_the_same_holes(bench, tmp_path):
    run = Run(tmp_path, bench.cfg, "evaluate")
    evaluate_holes(bench, run)
    test, seed = bench.splits[2], bench.cfg.data.seed
    hidden, truth = eval_masks("patch", 0.75, 5, 100, seed=seed), bench.scale.apply(test.states)
    want = {
        "mean": 0 * truth,
        "linear": linear_fill(truth, hidden),
        "hermite": bench.scale.apply(hermite_fill(test.states, hidden)),
        "model": reconstruct(bench.models["patch"], test, hidden, bench.scale),
    }
    for row, values in want.items():
        metric = run.metrics[f"evaluate.masked_mse.patch10_75.{row}"]
        assert metric["value"] == masked_mse(values, truth, hidden)
        assert (metric["unit"], metric["better"]) == ("standardized", "lower")
    assert not any("random" in key for key in run.metrics)  # there is no step model


def test_the_order_of_the_autoregression_knows_nothing_of_the_test_split(bench):
    maps, blind = ar_maps(bench), bench._replace(splits=(*bench.splits[:2], None))
    assert tuned_ar(bench, maps, "patch", 0.75) == tuned_ar(blind, maps, "patch", 0.75)


def test_probes_record_the_pool_that_validation_chose(bench, tmp_path):
    run = Run(tmp_path, bench.cfg, "evaluate")
    rows = evaluate_probes(bench, run)
    assert [len(v) for v in rows.values()] == [1, 3, 3, 3]
    for key in ("pole_length.r2", "pole_mass.r2", "energy.r2", "behaviour.accuracy"):
        for row in ("encoder", "random_encoder"):
            values = [
                run.metrics[f"evaluate.probe.{key}.{row}_{pool}"]["value"]
                for pool in ("mean", "max", "last")
            ]
            assert run.metrics[f"evaluate.probe.{key}.{row}"]["value"] in values
        assert run.metrics[f"evaluate.probe.{key}.raw"]["better"] == "higher"


def test_the_example_is_a_swing_up(bench):
    test = bench.splits[2]
    assert BEHAVIOURS[test.targets["behaviour"][example_of(test)]] == "swingup"


def test_the_documents_numbers_contradict_one_another():
    found = document_arithmetic()
    assert found["implied_rate.from_hours"] == 32
    assert found["implied_rate.from_epochs"] == 16


STUDENTS = [
    (MLPStudent, StudentConfig(window=100, d_model=32, width=16)),
    (TransformerStudent, TransformerStudentConfig(window=100, d_model=32, width=16)),
]


@pytest.mark.parametrize(("kind", "config"), STUDENTS)
def test_a_student_is_a_checkpoint_of_its_own(kind, config, teacher, motions, tmp_path):
    torch.manual_seed(0)
    student = kind(config).eval()
    student.copy_normalizer(teacher)
    save_student(student, tmp_path / "student")
    again = load(tmp_path / "student", method="mae")
    x = torch.tensor(motions, dtype=torch.float32)
    for aggregate in ("mean", "max", "last"):
        a, b = (m.get_encoder_representation(x, aggregate) for m in (student, again))
        assert torch.equal(a, b) and a.shape == (8, 32)
    header = read_header(tmp_path / "student")
    assert header["class"].startswith("trajbook.mae.distill:")
    assert header["inputs"]["states"]["unit"] == "m, rad, m/s, rad/s"


@pytest.mark.parametrize(("kind", "config"), STUDENTS)
def test_a_student_ignores_padding_and_takes_any_length(kind, config, teacher, motions):
    torch.manual_seed(0)
    student = kind(config).eval()
    student.copy_normalizer(teacher)
    x = torch.tensor(motions, dtype=torch.float32)
    padded = torch.cat([x, torch.full((8, 57, 4), 1e4)], 1)
    is_padding = torch.arange(157).expand(8, 157) >= 100
    for aggregate in ("mean", "max", "last"):
        want = student.get_encoder_representation(x, aggregate)
        got = student.get_encoder_representation(padded, aggregate, is_padding)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    twice = student.get_encoder_representation(torch.cat([x, x], 1))
    torch.testing.assert_close(twice, student.get_encoder_representation(x), atol=1e-4, rtol=1e-3)
    assert student.get_encoder_representation(x[0, :1]).shape == (32,)


def test_students_and_teacher_answer_the_same_questions(teacher, motions):
    data = WindowData(motions, np.zeros((8, 100)), np.arange(8), {}, np.zeros(8))
    for model in (teacher, *(k(c).eval() for k, c in STUDENTS)):
        tokens = tokens_of(model, data)
        x = torch.tensor(motions, dtype=torch.float32)
        assert tokens.shape == (8, 10, 32)
        pooled = model.get_encoder_representation(x).detach().numpy()
        np.testing.assert_allclose(tokens.mean(1), pooled, atol=1e-4)


def test_distill_loss_is_zero_at_the_teacher_and_whitening_is_round():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, 4, 6, generator=g) * torch.tensor([10.0, 3, 1, 1, 0.3, 0.1])
    loss = DistillLoss(tokens, whiten=0.0)
    perfect, n, _ = loss(lambda s: tokens, {"states": tokens, "tokens": tokens})
    assert float(perfect) == 0 and n == 500
    pooled = tokens.mean(1)
    white = (pooled - pooled.mean(0)) @ loss.white
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), atol=1e-3, rtol=1e-3)


def test_lesson_batches_resume():
    lessons = Lessons(torch.arange(40.0).reshape(10, 1, 4), torch.zeros(10, 1, 2).half())
    one, two = LessonBatches(lessons, 4, 0), LessonBatches(lessons, 4, 0)
    for _ in range(3):
        next(one)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert torch.equal(next(one)["states"], next(two)["states"])


def test_claims_of_the_document_have_a_form():
    claims = json.loads((root() / "data" / "claims.json").read_text(encoding="utf-8"))
    mine = [c for c in claims if c["document"].startswith("000")]
    assert len(mine) >= 20 and len({c["id"] for c in mine}) == len(mine)
    for c in mine:
        assert c["status"] in VERDICTS
        assert c["key"] and c["page"].startswith("mae/")
        assert c["status"] != "open" or c["reason"]
    assert len(BEHAVIOURS) == 5
