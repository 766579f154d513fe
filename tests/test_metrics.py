"""Scores and probes against scikit-learn, SciPy and numbers frozen from rliable 1.2.0."""

import numpy as np
import pytest
from scipy import stats

from trajbook.core import TrajbookError, rng
from trajbook.metrics import (
    PENALTIES,
    accuracy,
    beats,
    bootstrap_interval,
    interval,
    iqm,
    logistic_path,
    logistic_probe,
    macro_f1,
    masked_mse,
    nmse,
    paired_interval,
    performance_profile,
    probability_of_improvement,
    r2,
    raw_features,
    ridge_path,
    ridge_probe,
    standardize,
    stratified_subset,
)

# Exact in every version of NumPy, so that the frozen numbers stay valid.
A = (np.arange(40) * 37 % 101 / 100).reshape(8, 5)
B = ((np.arange(40) * 53 + 11) % 89 / 100).reshape(8, 5)


def problem(n=150, d=12, classes=4):
    g = rng(3, "problem", n, d)
    x = g.normal(size=(n, d)) * 10.0 ** g.integers(-2, 3, d) + g.normal(size=d)
    w = g.normal(size=(d, classes)) / x.std(0)[:, None]
    x0 = x - x.mean(0)
    y = (x0 @ w + 2 * g.normal(size=(n, classes))).argmax(1)
    return x, y, x0 @ w[:, :2] + g.normal(size=(n, 2))


def test_iqm_matches_rliable():
    assert iqm(A) == pytest.approx(0.495, abs=1e-12)
    assert iqm(B) == pytest.approx(0.43, abs=1e-12)


def test_probability_of_improvement_matches_rliable():
    assert probability_of_improvement(A, B) == pytest.approx(0.5515625, abs=1e-12)
    assert probability_of_improvement(B, A) == pytest.approx(0.4484375, abs=1e-12)


def test_performance_profile_matches_rliable():
    got = performance_profile(A, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert got.tolist() == pytest.approx([0.975, 0.75, 0.475, 0.25, 0.0])


def test_stratified_bootstrap_matches_rliable():
    # rliable, 20,000 replicates: (0.3709875, 0.6215) and (0.379, 0.49)
    assert bootstrap_interval(A, n=4000) == pytest.approx((0.3709875, 0.6215), abs=8e-3)
    assert bootstrap_interval(B, n=4000) == pytest.approx((0.379, 0.49), abs=8e-3)


def test_interval_matches_scipy():
    x = A[:, 0]
    mean, bounds = interval(x)
    want = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    assert mean == pytest.approx(x.mean()) and bounds == pytest.approx(want)
    assert interval([1.0]) == (1.0, None)
    for bad in ([], [np.nan, 1.0]):
        with pytest.raises(TrajbookError):
            interval(bad)


def test_beats_is_the_paired_t_test():
    for shift in (0.0, 0.02, 0.05, 0.2, 0.5):
        a, b = B[:, 0] + shift, B[:, 0] + 0.1 * A[:, 1]
        p = stats.ttest_rel(a, b, alternative="two-sided").pvalue
        assert beats(a, b) == (p < 0.05 and a.mean() > b.mean())
        assert beats(a, b, "lower") == (p < 0.05 and a.mean() < b.mean())
    with pytest.raises(TrajbookError):
        paired_interval([1, 2, 3], [1, 2])
    with pytest.raises(TrajbookError):
        beats([1, 2], [1, 2], "bigger")


def test_classification_scores_match_sklearn():
    m = pytest.importorskip("sklearn.metrics")
    g = rng(0, "scores")
    y, p = g.integers(0, 5, 200), g.integers(0, 6, 200)
    assert accuracy(y, p) == pytest.approx(m.accuracy_score(y, p))
    assert macro_f1(y, p) == pytest.approx(m.f1_score(y, p, average="macro"))


def test_r2_is_sklearn_variance_weighted():
    m = pytest.importorskip("sklearn.metrics")
    y = A
    p = A + 0.1 * B
    want = m.r2_score(y, p, multioutput="variance_weighted")
    assert r2(y, p) == pytest.approx(want) and nmse(y, p) == pytest.approx(1 - want)
    with pytest.raises(TrajbookError, match="constant"):
        r2(np.ones(3), np.ones(3))
    with pytest.raises(TrajbookError, match="shape"):
        r2(np.ones((3, 1)), np.arange(3.0))


def test_standardize_matches_sklearn_and_drops_constants():
    pre = pytest.importorskip("sklearn.preprocessing")
    x, _, _ = problem()
    scaler = pre.StandardScaler().fit(x[:100])
    ours = standardize(x[:100], x[100:])
    np.testing.assert_allclose(ours[0], scaler.transform(x[:100]), atol=1e-9)
    np.testing.assert_allclose(ours[1], scaler.transform(x[100:]), atol=1e-9)
    flat = standardize(np.full((5, 1), 1e6), np.full((2, 1), 2e6))
    assert not np.any(flat[0]) and not np.any(flat[1])


@pytest.mark.parametrize("n", [8, 60])  # fewer and more samples than features
def test_ridge_path_matches_sklearn(n):
    lm = pytest.importorskip("sklearn.linear_model")
    x, _, y = problem()
    x, y = standardize(x[:n])[0], y[:n]
    for penalty, w in zip(PENALTIES, ridge_path(x, y - y.mean(0)), strict=True):
        want = lm.Ridge(alpha=n * penalty, solver="svd").fit(x, y).coef_.T
        np.testing.assert_allclose(w, want, atol=1e-7 * max(1, abs(want).max()))


def test_ridge_probe_picks_the_best_validation_penalty():
    x, _, y = problem()
    splits = [(x[s], y[s]) for s in (slice(0, 30), slice(30, 90), slice(90, 150))]
    got = ridge_probe(*splits)
    single = [ridge_probe(*splits, penalties=(p,)) for p in PENALTIES]
    assert got.val_score == pytest.approx(max(s.val_score for s in single))
    assert got.score == pytest.approx(single[PENALTIES.index(got.penalty)].score)
    assert got.prediction.shape == splits[2][1].shape


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 10.0])
def test_logistic_path_matches_sklearn(n, penalty):
    lm = pytest.importorskip("sklearn.linear_model")
    x, y, _ = problem()
    x, y = standardize(x[:n])[0], np.unique(y[:n], return_inverse=True)[1]
    w = logistic_path(x, y, y.max() + 1, (100.0, penalty))[1]
    model = lm.LogisticRegression(C=1 / (n * penalty), tol=1e-9, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(w[:-1], model.coef_.T, atol=3e-3)
    logits = x @ w[:-1] + w[-1]
    ours = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(ours, model.predict_proba(x), atol=2e-3)


def test_logistic_probe_works_with_other_names_and_missing_classes():
    x, y, _ = problem()
    names = np.array(["passive", "noise", "swing", "sine"])[y]
    few = np.flatnonzero(names != "sine")[:20]
    splits = [(x[few], names[few]), (x[30:90], names[30:90]), (x[90:], names[90:])]
    got = logistic_probe(*splits)
    assert set(got.prediction) <= {"passive", "noise", "swing"}
    assert got.score == pytest.approx(np.mean(got.prediction == names[90:]))


def test_masked_mse_matches_a_loop():
    g = rng(1, "mse")
    p, t = g.normal(size=(2, 3, 7, 5)).astype("float32")
    mask, pad = g.random((3, 7)) < 0.5, g.random((3, 7)) < 0.3
    values = [
        (p[b, i] - t[b, i]) ** 2 for b in range(3) for i in range(7) if mask[b, i] and not pad[b, i]
    ]
    assert masked_mse(p, t, mask, pad) == pytest.approx(np.mean(values), rel=1e-6)
    t[pad] = np.nan
    assert np.isfinite(masked_mse(p, t, mask, pad))


def test_raw_features_ignore_padding_and_match_a_loop():
    g = rng(2, "raw")
    z = g.normal(size=(2, 9, 3))
    pad = np.zeros((2, 9), bool)
    pad[1, 6:] = True
    z[pad] = 1e9
    got = raw_features(z, pad)
    for row, n in zip((0, 1), (9, 6), strict=True):
        s = z[row, :n]
        lag = s[:-1].T @ s[1:] / (n - 1)
        want = np.concatenate([s.mean(0), s.std(0), s.max(0), s[-1], lag.ravel()])
        np.testing.assert_allclose(got[row], want, atol=1e-9)
    with pytest.raises(TrajbookError):
        raw_features(z[:, :1])


def test_stratified_subset_is_nested_and_keeps_two_per_class():
    labels = np.repeat(np.arange(5), [400, 300, 200, 80, 20])
    for draw in range(20):
        previous = set()
        for fraction in (0.01, 0.05, 0.1, 1.0):
            rows = stratified_subset(labels, fraction, draw)
            counts = np.bincount(labels[rows], minlength=5)
            assert counts.min() >= 2 and previous <= set(rows)
            assert counts[0] == round(400 * fraction)
            previous = set(rows)
    with pytest.raises(TrajbookError):
        stratified_subset(labels, 0.0, 0)
