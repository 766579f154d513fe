"""The forecaster: properties that hold for any weights, and the same mixture by another library."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trajbook.moe.data import ModelConfig
from trajbook.moe.model import (
    Generation,
    Mixture,
    MoEForecaster,
    Routing,
    dense_experts,
    fit_recurrence,
    forecast,
    generate,
    grouped_experts,
    lag_sums,
    load_balance_loss,
    padding_of,
    response,
    router_z_loss,
    sample_errors,
    t_log_density,
    utilization,
    within_capacity,
)
from trajbook.moe.train import targets

SMALL = ModelConfig(d_model=32, n_heads=2, d_ff=24, head_width=32)
KINDS = ("topk", "switch", "noisy_topk", "bias", "random", "frozen")


def walks(n: int, T: int = 128, D: int = 3, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, T, D, dtype=torch.float64, generator=draw).cumsum(1)


def network(seed: int = 0, **changes) -> MoEForecaster:
    torch.manual_seed(seed)
    return MoEForecaster(dataclasses.replace(SMALL, **changes)).eval()


@given(
    E=st.integers(1, 8),
    K=st.integers(1, 8),
    n=st.integers(1, 70),
    only=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_fast_path_is_the_obvious_one(E, K, n, only, seed):
    K, draw = min(K, E), torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=draw)
    expert = torch.rand(n, E, generator=draw).topk(K).indices
    if only:  # all tokens go to the same experts, some to nobody
        expert = torch.arange(K).expand(n, K).clone()
    weight = torch.rand(n, K, generator=draw)
    w_in, w_out = (
        torch.randn(E, 16, 32, generator=draw) / 4,
        torch.randn(E, 16, 16, generator=draw) / 4,
    )
    results = []
    for fn in (dense_experts, grouped_experts):
        leaves = [v.clone().requires_grad_() for v in (x, weight, w_in, w_out)]
        y = fn(leaves[0], expert, *leaves[1:])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        a = a.detach()
        torch.testing.assert_close(
            a, b.detach(), rtol=1e-5, atol=1e-5 * max(1.0, float(a.abs().max()))
        )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_mixture_equals_mixtral_with_the_same_weights(implementation):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = transformers.MixtralConfig(**sizes, router_jitter_noise=0.0)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    theirs, ours = MixtralSparseMoeBlock(config).eval(), Mixture(SMALL).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
        ours.router.score.weight.copy_(theirs.gate.weight)
        ours.w_in.copy_(theirs.experts.gate_up_proj.mT)
        ours.w_out.copy_(theirs.experts.down_proj.mT)
    x = torch.randn(3, 10, 32, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y = ours(x, torch.arange(10).expand(3, 10), torch.zeros(3, 10, dtype=torch.bool))[0]
    z = theirs(other)
    z = z[0] if isinstance(z, tuple) else z
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.w_in.grad, theirs.experts.gate_up_proj.grad.mT, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cut", [64, 96, 120])
def test_the_future_never_changes_the_past(kind, training, cut):
    capacity = 1.2 if training else 0.0
    model = network(router=kind, capacity_factor=capacity).train(training)
    x, past = walks(5, 128), cut // 8
    changed = x.clone()
    changed[:, cut:] += walks(5, 128 - cut, seed=1)
    torch.manual_seed(3)
    before = model(x, anchors=8)
    torch.manual_seed(3)
    after = model(changed, anchors=8)
    known = past - 8  # of the eight last tokens
    torch.testing.assert_close(before.own[:, :known], after.own[:, :known], rtol=1e-5, atol=1e-5)
    for a, b in zip(before.routing, after.routing, strict=True):
        a, b = (r.expert.view(5, 16, -1)[:, :past] for r in (a, b))
        assert torch.equal(a, b)
    assert not torch.allclose(before.own[:, known:], after.own[:, known:])


def test_the_units_are_known_after_64_samples_and_not_before():
    "What is learned from earlier tokens would look ahead through the units; training leaves it out."
    model, x = network(), walks(2, 128)
    changed = x.clone()
    changed[:, 48:64] += 10 * walks(2, 16, seed=1)
    before, after = (model(v, anchors=16) for v in (x, changed))
    assert not torch.allclose(before.own[:, :6], after.own[:, :6])
    batch = {"position": walks(2, 160), "observed": x, "n_valid": torch.tensor([128, 100])}
    asked = targets(batch, before, model.config).asked
    assert asked[0].tolist() == [0.0] * 7 + [1.0] * 9
    assert asked[1].tolist() == [0.0] * 11 + [1.0] * 5  # 28 samples of padding first


@given(st.integers(1, 128), st.integers(0, 40), st.floats(-100, 100))
@settings(max_examples=25, deadline=None)
def test_padding_changes_nothing(seen, more, junk):
    model, x = network(), walks(2, 128)
    n = torch.tensor([seen, 128])
    whole = model(x, n)
    padded = torch.cat([torch.full((2, more, 3), junk, dtype=torch.float64), x], 1)
    padded[0, : more + 128 - seen] = -junk
    again = model(padded, n)
    scale = float(whole.mean.detach().abs().max())
    torch.testing.assert_close(again.mean, whole.mean, rtol=1e-4, atol=1e-4 * scale)
    for a, b in zip(whole.routing, again.routing, strict=True):
        torch.testing.assert_close(utilization(a), utilization(b), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "gru"}, {"patch": 1}, {"architecture": "dlinear", "candidates": ()}],
)
@pytest.mark.parametrize("seen", [1, 2, 3, 40, 101])
def test_padding_changes_nothing_whatever_the_network(changes, seen):
    model, x = network(**changes), walks(2, 128)[:, -seen:]
    alone = model(x).mean
    padded = model(F.pad(x, (0, 0, 128 - seen, 0), value=7.0), torch.tensor([seen, seen])).mean
    torch.testing.assert_close(
        padded, alone, rtol=1e-4, atol=1e-4 * float(alone.detach().abs().max())
    )


def test_a_motion_that_rests_and_then_moves_has_a_finite_scale():
    "Its unit is the noise at rest, and everything later is a thousand units away."
    model = network()
    for size in (0.0, 1e-9, 1e-6, 1e-3):
        x = size * torch.randn(4, 128, 3, dtype=torch.float64)
        x[:, 64:] += torch.linspace(0, 1, 64)[:, None]
        found = forecast(model, x)
        assert found.mean.isfinite().all() and found.scale.isfinite().all()
        assert float(found.scale.max()) < 40


def test_an_expert_that_must_be_used_is_missed_when_it_is_closed():
    for changes in (
        {"n_experts": 2, "top_k": 2},
        {"n_experts": 1, "top_k": 1},
        {"router": "random"},
    ):
        model, x = network(**changes), walks(3)
        before = model(x).own
        router = next(m.router for m in model.modules() if isinstance(m, Mixture))
        router.close(0)
        assert not torch.allclose(model(x).own, before)
        router.open()
        torch.testing.assert_close(model(x).own, before)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_moving_and_stretching_space_moves_and_stretches_the_forecast(shift, stretch):
    model, x = network(), walks(3)
    plain, moved = forecast(model, x), forecast(model, shift + stretch * x)
    size = float(plain.mean.abs().max())
    np.testing.assert_allclose((moved.mean - shift) / stretch, plain.mean, atol=2e-3 * size)
    np.testing.assert_allclose(moved.scale / stretch, plain.scale, rtol=1e-2)


@pytest.mark.parametrize("candidates", [(), ModelConfig().candidates])
@pytest.mark.parametrize("T", [1, 2, 5, 8, 31, 33, 100, 128, 200])
def test_any_history_gives_a_finite_forecast(T, candidates):
    model = network(candidates=candidates)
    for x in (torch.zeros(1, T, 3), 1e6 + walks(1, T), torch.ones(1, T, 3) * 1e-9):
        found = forecast(model, x, horizon=40, samples=2)
        assert all(v.isfinite().all() for v in (found.mean, found.scale, found.samples))
        assert generate(model, x, 11, samples=2).isfinite().all()


@pytest.mark.parametrize("architecture", ["transformer", "gru", "dlinear"])
@pytest.mark.parametrize("dims", [1, 2, 3, 6])
def test_every_architecture_takes_any_number_of_coordinates(architecture, dims):
    candidates = SMALL.candidates if architecture == "transformer" else ()
    model = network(architecture=architecture, dims=dims, candidates=candidates)
    found = forecast(model, walks(2, 128, dims), samples=3)
    assert found.mean.shape == (2, 32, dims) and found.samples.shape == (2, 3, 32, dims)


@pytest.mark.parametrize("patch", [1, 4, 8])
def test_a_cache_is_recomputation_with_given_tokens(patch):
    model = network(patch=patch, candidates=())
    given_path = walks(4, 160)
    going = Generation(model, given_path[:, :128], None, 32)
    for t in range(128, 160, patch):
        again = model(given_path[:, :t]).own[:, -1]
        scale = float(again.detach().abs().max())
        torch.testing.assert_close(going.next()[0], again, rtol=1e-5, atol=1e-5 * scale)
        x = (given_path[:, t : t + patch] - going.window.center) / going.window.scale
        going.append(x)


@given(st.integers(1, 6), st.floats(0.9, 1.0), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_recurrence_is_continued_exactly(order, size, seed):
    draw = np.random.default_rng(seed)
    roots = size * np.exp(1j * draw.uniform(0.2, 3, order))
    t = np.arange(160)
    path = sum(
        draw.normal(size=(3, 1)) * (r**t).real + draw.normal(size=(3, 1)) * (r**t).imag
        for r in roots
    )
    x = torch.from_numpy(path.T[None].copy())
    fit = fit_recurrence(
        lag_sums(x[:, :128], 2 * order), torch.zeros(1, dtype=torch.long), 2 * order
    )
    found = response(fit, 8) @ x[:, :128][:, -2 * order :].flip(1)
    assert (found - x[:, 128:136]).abs().max() < 1e-2 * x.abs().max()


def test_normal_equations_are_those_of_least_squares():
    x = walks(3, 60)
    rows = x.flip(1).unfold(1, 6, 1)
    past, now = rows[..., 1:].flatten(1, 2), rows[..., 0].flatten(1)
    wanted = torch.linalg.lstsq(past, now[..., None]).solution[..., 0]
    found = fit_recurrence(lag_sums(x, 9), torch.zeros(3, dtype=torch.long), 5, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    late = x.clone()
    late[:, :20] = 0
    cut = fit_recurrence(lag_sums(late, 9), torch.full((3,), 20), 5, 0.0)
    alone = fit_recurrence(lag_sums(x[:, 20:], 9), torch.zeros(3, dtype=torch.long), 5, 0.0)
    torch.testing.assert_close(cut, alone, rtol=1e-8, atol=1e-8)


@given(st.integers(2, 6), st.integers(1, 30), st.integers(0, 30), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_padding_does_not_count_in_the_routing_losses(E, n, more, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n + more, E, generator=draw)
    expert, gone = logits.topk(min(2, E)).indices, torch.arange(n + more) >= n
    both = Routing(expert, torch.ones_like(expert).float(), logits, gone)
    alone = Routing(*(v[:n] for v in both))
    for fn in (utilization, load_balance_loss, router_z_loss):
        torch.testing.assert_close(fn(both), fn(alone))


def test_capacity_keeps_the_early_and_counts_no_padding():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=draw)
    place, gone = torch.arange(60) % 12, torch.arange(60) < 7
    routing = Routing(logits.topk(2).indices, torch.ones(60, 2), logits, gone)
    kept = within_capacity(routing, place, 1.0)
    taken = torch.bincount(routing.expert[kept], minlength=4)
    assert taken.max() <= -(-53 * 2 // 4) and not kept[gone].any()
    late = routing._replace(
        expert=torch.where(place[:, None] > 6, 3 - routing.expert, routing.expert)
    )
    again = within_capacity(late, place, 1.0)
    assert torch.equal(kept[place <= 6], again[place <= 6])


def test_sampled_futures_have_the_promised_spread():
    dof, near = torch.tensor(6.0), torch.exp(-torch.arange(32).float() / 8)
    R = near[(torch.arange(32)[:, None] - torch.arange(32)).abs()]
    drawn = sample_errors((40_000, 32, 2), R, dof, torch.Generator().manual_seed(0))
    assert abs(float(drawn.var(0).mean()) - 1.5) < 0.05
    inside = (drawn[:, 5].norm(dim=-1) ** 2 / 2 < 3.46).double().mean()  # 90 % of F(2, 6)
    assert abs(float(inside) - 0.9) < 0.01


def test_the_density_agrees_with_scipy():
    from scipy.stats import multivariate_t

    draw = np.random.default_rng(0)
    error, scale = draw.normal(size=(50, 3)), 0.7
    wanted = multivariate_t(np.zeros(3), scale**2 * np.eye(3), df=4.5).logpdf(error)
    found = t_log_density(torch.tensor(error), torch.full((50,), np.log(scale)), torch.tensor(4.5))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_longer_contexts_than_trained_are_possible():
    model, x = network(), walks(2, 512)
    assert forecast(model, x, context=512).mean.isfinite().all()
    torch.testing.assert_close(forecast(model, x).mean, forecast(model, x[:, -128:]).mean)


def test_padding_is_at_the_beginning():
    assert padding_of(torch.tensor([2, 3]), 3).tolist() == [[True, False, False], [False] * 3]
