"""The planner, its masks and its samplers against closed forms, enumeration and other people's layers."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trajbook.checkpoint import load, save_checkpoint
from trajbook.core import TrajbookError
from trajbook.masked_diffusion.data import END, MASK, LossConfig, ModelConfig
from trajbook.masked_diffusion.model import (
    DiTBlock,
    Planner,
    Sampling,
    choose,
    describe,
    elbo_weight,
    fill_in,
    log_likelihood,
    make_plans,
    mask_share,
    nelbo,
    turns,
)
from trajbook.masked_diffusion.plans import (
    closed_loop_probability,
    closed_plans,
    kl_to_even,
    plan_counts,
    plan_probability,
)
from trajbook.masked_diffusion.train import loss_fn, noise_of, q_sample
from trajbook.nn import torch_generator

SMALL = {"tasks": ("crossing_s9n1", "many_plans"), "d_model": 32, "n_heads": 2, "n_layers": 2}


def planner(**changes) -> Planner:
    "A planner with random weights everywhere, so that nothing is zero by construction."
    torch.manual_seed(3)
    model = Planner(ModelConfig(**(SMALL | changes)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25 if p.ndim > 1 else 0.1)
    return model.eval()


def states(n: int, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "obs": torch.from_numpy(draw.integers(0, 4, (n, 7, 7, 3)).astype(np.uint8)),
        "direction": torch.from_numpy(draw.integers(0, 4, n)),
        "task": torch.from_numpy(draw.integers(0, 2, n)),
        "target": torch.zeros(n, 2, dtype=torch.long),
    }


def same_state(n: int) -> dict:
    return {k: v.expand(n, *v.shape[1:]) for k, v in states(1).items()}


def test_a_fresh_block_changes_nothing():
    block = DiTBlock(ModelConfig(**SMALL))
    x, given_, cells = torch.randn(3, 2, 5, 32), torch.randn(3, 2, 32), torch.randn(3, 9, 32)
    assert torch.equal(block(x, given_, block.look.keys(cells)), x)


def turned(x: torch.Tensor) -> torch.Tensor:
    "Rotary positions by complex numbers (Su et al. 2021), (B, H, T, head_dim)."
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[2])[:, None] * rate
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    "Two heads of torch's attention, (B, T, D)."
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    if q.shape == k.shape:  # among actions, whose places count
        q, k = turned(q), turned(k)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def test_the_block_equals_one_of_torch_layers():
    "The same weights in torch's own attention, `F.layer_norm` and `F.linear`, modulated by hand."
    block = DiTBlock(ModelConfig(**SMALL))
    torch.nn.init.normal_(block.modulation.weight, std=0.2)
    torch.nn.init.normal_(block.modulation.bias, std=0.2)
    x, given_, cells = torch.randn(3, 1, 6, 32), torch.randn(3, 1, 32), torch.randn(3, 9, 32)
    w = {k: v.detach() for k, v in block.state_dict().items()}
    m = F.linear(given_[:, 0], w["modulation.weight"], w["modulation.bias"])
    m = [v[:, None] for v in m.chunk(9, -1)]
    y = x[:, 0]
    z = F.layer_norm(y, (32,)) * (1 + m[0]) + m[1]
    qkv = F.linear(z, w["attention.qkv.weight"], w["attention.qkv.bias"]).chunk(3, -1)
    found = F.linear(attention(*qkv), w["attention.out.weight"], w["attention.out.bias"])
    y = y + m[2] * found
    z = F.layer_norm(y, (32,)) * (1 + m[3]) + m[4]
    k, v = F.linear(cells, w["look.kv.weight"]).chunk(2, -1)
    found = attention(F.linear(z, w["look.q.weight"]), k, v)
    y = y + m[5] * F.linear(found, w["look.out.weight"], w["look.out.bias"])
    z = F.layer_norm(y, (32,)) * (1 + m[6]) + m[7]
    up = F.gelu(F.linear(z, w["mlp.up.weight"], w["mlp.up.bias"]))
    y = y + m[8] * F.linear(up, w["mlp.down.weight"], w["mlp.down.bias"])
    out = block(x, given_, block.look.keys(cells))[:, 0]
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-5)


def test_schedules_and_weights_have_their_closed_forms():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(mask_share(t, "cosine"), torch.sin(math.pi * t / 2))
    torch.testing.assert_close(elbo_weight(t, "linear"), 1 / t)
    expected = torch.tensor([9.918, 1.571, 0.249], dtype=torch.float64)
    torch.testing.assert_close(elbo_weight(t, "cosine"), expected, rtol=2e-3, atol=2e-3)
    for schedule in ("linear", "cosine"):
        ends = mask_share(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule)
        torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))
        s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
        m = mask_share(s, schedule)
        slope = torch.autograd.grad(m.sum(), s)[0]
        assert (slope > 0).all()
        torch.testing.assert_close(slope / m.detach(), elbo_weight(s.detach(), schedule))


def enumerate_plans(L: int = 3) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(8), repeat=L)))


def exact(model: Planner, plans: torch.Tensor) -> torch.Tensor:
    "Probability of every plan under random order, one place at a time: the mean over all orders."
    memory = model.remember(same_state(len(plans)))
    ranks = torch.tensor(list(itertools.permutations(range(plans.shape[1]))))
    return log_likelihood(model, memory, plans, ranks.expand(len(plans), -1, -1)).exp().mean(1)


def close(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    "Chi-squared over cells with at least five expected, within five standard deviations."
    enough = expected >= 5
    chi2 = ((counts[enough] - expected[enough]) ** 2 / expected[enough]).sum()
    n = int(enough.sum())
    return bool(chi2 < n + 5 * math.sqrt(2 * n)) and n > 10


def tally(plans: torch.Tensor) -> torch.Tensor:
    return torch.bincount((plans * torch.tensor([64, 8, 1])).sum(1), minlength=512).float()


N = 40_000


@pytest.mark.parametrize("order", ["random", "ancestral"])
def test_the_sampler_draws_what_enumeration_says(order):
    model, every = planner(horizon=3), enumerate_plans()
    p = exact(model, every)
    assert abs(float(p.sum()) - 1) < 1e-4
    steps = 3 if order == "random" else 300  # so many that two places hardly ever share a pass
    drawn = make_plans(model, same_state(N), Sampling(steps, order), torch_generator("t", order))
    assert close(tally(drawn), N * p)


def test_one_pass_draws_each_place_by_itself():
    model, every = planner(horizon=3), enumerate_plans()
    memory = model.remember(same_state(1))
    marginals = model.decode(memory, torch.full((1, 1, 3), MASK))[0, 0].softmax(-1)
    p = marginals[torch.arange(3), every].prod(1)
    drawn = make_plans(model, same_state(N), Sampling(1), torch_generator("one"))
    assert close(tally(drawn), N * p.detach())


def test_two_ancestral_passes_have_the_right_mixture():
    "A place is filled in by the first of two passes with probability 1/2, and independently."
    model, every = planner(horizon=3), enumerate_plans()
    memory, total = model.remember(same_state(len(every))), 0
    start = model.decode(memory, torch.full((512, 1, 3), MASK))[:, 0].log_softmax(-1)
    first = start.gather(-1, every[..., None])[..., 0]
    for which in itertools.product((False, True), repeat=3):
        early = torch.tensor(which)
        shown = torch.where(early, every, MASK)[:, None]
        later = (
            model.decode(memory, shown)[:, 0].log_softmax(-1).gather(-1, every[..., None])[..., 0]
        )
        total = total + torch.where(early, first, later).sum(-1).exp() / 8
    total = total.detach()
    assert abs(float(total.sum()) - 1) < 1e-4
    drawn = make_plans(model, same_state(N), Sampling(2, "ancestral"), torch_generator("two"))
    assert close(tally(drawn), N * total)


def test_a_decoder_draws_what_it_says():
    model, every = planner(horizon=3, kind="autoregressive"), enumerate_plans()
    memory = model.remember(same_state(len(every)))
    p = log_likelihood(model, memory, every)[:, 0].exp()
    assert abs(float(p.sum()) - 1) < 1e-4
    drawn = make_plans(model, same_state(N), draw=torch_generator("ar"))
    assert close(tally(drawn), N * p)


def test_the_probability_of_a_plan_is_that_of_drawing_it():
    "Any number of passes, any order with turns: probabilities of all plans add up to one."
    model, every = planner(horizon=3), enumerate_plans()
    memory = model.remember(same_state(1))
    for how in (Sampling(3), Sampling(2), Sampling(1), Sampling(3, "left_to_right")):
        p = plan_probability(model, memory, every.numpy(), how, torch_generator("p"), 6)
        assert abs(p.sum() - 1) < 1e-3
    p = plan_probability(model, memory, every.numpy(), Sampling(3), torch_generator("q"), 600)
    np.testing.assert_allclose(p, exact(model, every), atol=0.01)
    decoder = planner(horizon=3, kind="autoregressive")
    memory = decoder.remember(same_state(512))
    right = log_likelihood(decoder, memory, every)[:, 0].exp()
    one = memory.take(torch.zeros(1, dtype=torch.long))
    how = Sampling(3, "left_to_right")
    p = plan_probability(decoder, one, every.numpy(), how, torch_generator("r"), 1)
    np.testing.assert_allclose(p, right, rtol=1e-3, atol=1e-6)
    with pytest.raises(TrajbookError, match="confidence"):
        how = Sampling(3, "confidence")
        plan_probability(decoder, one, every.numpy(), how, torch_generator("s"))


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "cloning"])
def test_the_probability_of_a_walk_is_that_of_walking_it(kind):
    "One look per action, against plans that are drawn and walked."
    from trajbook.masked_diffusion.data import all_shortest_plans, observe, step, task

    w = task("many_plans").make(0, 30)
    plans = all_shortest_plans(w, task("many_plans").actions)
    k = int(plans.length.argmin())
    one, right = w.take(np.array([k])), closed_plans(plans, k, 16)

    def see(w) -> dict:
        told = {"obs": observe(w, "full"), "direction": w.direction, "target": w.target}
        return told | {"task": np.ones(len(w), int)}

    model, n, draw = planner(kind=kind), 4000, torch_generator("walk", kind)
    p = closed_loop_probability(model, one, right, see)
    now, alive = one.take(np.zeros(n, int)), np.ones((n, len(right)), bool)
    for action in right[:, : int(plans.length[k])].T:
        state = {a: torch.as_tensor(v) for a, v in see(now).items()}
        drawn = make_plans(model, state, draw=draw, n=1)[:, 0].numpy()
        alive &= drawn[:, None] == action
        now = step(now, np.where(drawn < END, drawn, 6))[0]
    error = np.sqrt(p * (1 - p) / n)
    assert (np.abs(alive.mean(0) - p) < 5 * error + 2 / n).all()


def test_a_decoder_pays_for_the_places_of_its_task_only():
    short = planner(horizon=16, kind="autoregressive", tasks=("empty_random", "fourrooms"))
    model = planner(horizon=20, kind="autoregressive", tasks=("empty_random", "fourrooms"))
    plan = torch.randint(0, 8, (6, 20), generator=torch_generator("plan"))
    paid = {}
    for which in (0, 1):
        memory = model.remember(states(6) | {"task": torch.full((6,), which)})
        other = plan.clone()
        other[:, 16:] = 7 - plan[:, 16:]
        paid[which] = [log_likelihood(model, memory, x)[:, 0] for x in (plan, other)]
    assert torch.equal(*paid[0]) and not torch.allclose(*paid[1])
    assert short.horizons.tolist() == [16, 16] and model.horizons.tolist() == [16, 20]


def test_the_bound_is_never_below_the_exact_value():
    model, every = planner(horizon=3), enumerate_plans()
    memory = model.remember(same_state(len(every)))
    draws = torch.stack([nelbo(model, memory, every, torch_generator("b", k)) for k in range(200)])
    nll = -exact(model, every).log()
    error = draws.std(0) / math.sqrt(len(draws))
    assert (draws.mean(0) + 4.5 * error >= nll).all()
    ranks = torch.tensor(list(itertools.permutations(range(3)))).expand(len(every), -1, -1)
    expected = -log_likelihood(model, memory, every, ranks).mean(1)
    assert (expected >= nll - 1e-5).all()
    assert ((draws.mean(0) - expected).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_elbo_loss_is_the_bound(schedule):
    "Training's weighted loss, averaged over masks, is minus the mean log-likelihood over orders."
    model = planner(horizon=3)
    plan = torch.tensor([[1, 2, 7]] * 64)
    rules = LossConfig(
        schedule=schedule, weighting="elbo", all_masked=0, lead=0, copies=64, drop_state=0
    )
    noise = {
        k: torch.from_numpy(v) for k, v in noise_of(np.random.default_rng(0), 64, 64, 3).items()
    }
    total, weight, _ = loss_fn(
        model,
        same_state(64) | {"plan": plan, "free": torch.ones(64, 3, dtype=torch.bool)} | noise,
        rules,
    )
    memory = model.remember(same_state(1))
    ranks = torch.tensor(list(itertools.permutations(range(3))))[None]
    expected = -log_likelihood(model, memory, plan[:1], ranks).mean()
    assert abs(float((total / weight).detach()) / float(expected) - 1) < 0.06


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from(["random", "left_to_right", "ancestral"]),
    st.integers(0, 1000),
    st.sampled_from(["linear", "cosine"]),
)
def test_every_free_place_has_its_turn_and_no_other(steps, order, seed, schedule):
    draw = torch.Generator().manual_seed(seed)
    free = torch.rand(20, 12, generator=draw) < 0.7
    turn = turns(free, steps, order, torch.rand(20, 12, generator=draw), schedule)
    assert (turn[free] < steps).all() and (turn[~free] == steps).all() and (turn >= 0).all()
    if order == "left_to_right":
        for row, mine in zip(turn, free, strict=True):
            assert (row[mine].diff() >= 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(["random", "confidence"]))
def test_what_is_fixed_stays(seed, steps, order):
    model, draw = planner(), torch.Generator().manual_seed(seed)
    fixed = torch.where(torch.rand(3, 16, generator=draw) < 0.3, 2, MASK)
    plans = make_plans(model, states(3), Sampling(steps, order), draw, fixed=fixed)
    assert (plans[fixed != MASK] == 2).all() and (plans != MASK).all() and (plans <= END).all()


def test_laziness_and_batches_change_nothing():
    model = planner()
    for order in ("random", "ancestral", "left_to_right", "confidence"):
        found = [
            make_plans(model, states(5), Sampling(40, order, lazy=lazy), torch_generator("l"))
            for lazy in (True, False)
        ]
        assert torch.equal(*found)


def test_places_that_are_not_needed_are_not_asked_for():
    model, asked = planner(), []
    model.blocks[0].register_forward_pre_hook(lambda block, args: asked.append(len(args[0])))
    for order in ("random", "ancestral", "left_to_right", "confidence"):
        whole, part = (
            make_plans(model, states(5), Sampling(16, order), torch_generator("l"), n=n)
            for n in (None, 3)
        )
        assert torch.equal(whole[:, :3], part)
    asked.clear()
    make_plans(model, states(5), Sampling(16, "left_to_right"), torch_generator("l"), n=3)
    assert sum(asked) == 5 * 3


@pytest.mark.parametrize("how", [Sampling(0), Sampling(2, "backwards")])
def test_impossible_sampling_is_refused(how):
    with pytest.raises(TrajbookError, match="steps|order"):
        make_plans(planner(), states(2), how, torch_generator("l"))


def test_a_temperature_near_zero_is_zero():
    logits, u = torch.randn(200, 8), torch.rand(200)
    assert torch.equal(choose(logits, u, 1e-40)[0], choose(logits, u, 0)[0])


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_places_beyond_the_horizon_are_free_of_charge(kind):
    "Of three places a task plans two: its 64 plans have probability one, in any order."
    model = planner(horizon=3, kind=kind, time="scaled" if kind == "diffusion" else "none")
    model.horizons = torch.tensor([2, 2])
    every = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    every = F.pad(every, (0, 1), value=END)
    memory = model.remember(same_state(64))
    ranks = torch.tensor(list(itertools.permutations(range(3)))).expand(64, -1, -1)
    p = log_likelihood(model, memory, every, ranks if kind == "diffusion" else None).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(p.shape[1]), atol=1e-4, rtol=0)
    drawn = make_plans(model, same_state(9), Sampling(3), torch_generator("horizon"))
    assert (drawn[:, 2:] == END).all()
    if kind == "diffusion":  # told the same times as in sampling
        row, how = memory.take(torch.zeros(1, dtype=torch.long)), Sampling(2, "left_to_right")
        q = plan_probability(model, row, every.numpy(), how, torch_generator("o"), 1)
        np.testing.assert_allclose(q, p[:, 0].double().numpy(), atol=1e-5)


def test_no_guidance_is_weight_zero_and_the_state_can_be_hidden():
    model = planner()
    blind = model(states(3), torch.full((3, 1, 16), MASK), None, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(blind[:1], blind[1:2])
    plans = [
        make_plans(model, states(4), Sampling(4, guidance=w), torch_generator("g")) for w in (0, 3)
    ]
    assert not torch.equal(*plans)


def test_a_goal_in_another_place_changes_the_plan():
    "What mean pooling loses: two goals, two answers (with attention to cells)."
    model, tokens = planner(), torch.full((2, 1, 16), MASK)
    state = {k: v.expand(2, *v.shape[1:]).clone() for k, v in states(1).items()}
    state["obs"][:] = torch.tensor([1, 0, 0])
    state["obs"][0, 1, 5] = state["obs"][1, 5, 1] = torch.tensor([8, 1, 0], dtype=torch.uint8)
    logits = model(state, tokens)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive", "cloning"])
def test_a_checkpoint_brings_the_planner_back(kind, tmp_path):
    model = planner(kind=kind)
    save_checkpoint(tmp_path / "c", model, method="masked_diffusion", **describe(model.config))
    again = load(tmp_path / "c", method="masked_diffusion")
    how = Sampling(4)
    one, two = (make_plans(m, states(6), how, torch_generator("c")) for m in (model, again))
    assert torch.equal(one, two) and one.shape == (6, 1 if kind == "cloning" else 16)


def test_short_horizons_are_closed_by_end():
    model = planner(horizon=40, tasks=("fourrooms", "empty_random"))
    state = states(6) | {"task": torch.tensor([0, 1] * 3)}
    plans = make_plans(model, state, Sampling(3), torch_generator("h"))
    assert (plans[1::2, 16:] == END).all() and not (plans[::2, 16:] == END).all()


def test_masks_follow_the_time():
    noise = {
        k: torch.from_numpy(v) for k, v in noise_of(np.random.default_rng(1), 200, 50, 16).items()
    }
    free = torch.ones(200, 16, dtype=torch.bool)
    batch = {"plan": torch.zeros(200, 16, dtype=torch.long), "free": free} | noise
    tokens, time = q_sample(batch, LossConfig(schedule="cosine", all_masked=0))
    share = (tokens == MASK).float().mean(-1)
    for low in (0.1, 0.5, 0.8):
        near = (time - low).abs() < 0.05
        assert abs(share[near].mean() - math.sin(math.pi * low / 2)) < 0.04
    tidy, _ = q_sample(batch, LossConfig(in_order=1.0, all_masked=0))
    masked = (tidy == MASK).int()
    assert (masked.diff(dim=-1) >= 0).all()  # only the end of a plan is masked


def test_counting_plans():
    counts = plan_counts(np.array([0.5, 0.3]), 10_000, np.random.default_rng(0))
    assert counts.sum() == 10_000 and abs(counts[2] - 2000) < 300
    assert abs(kl_to_even(np.array([10**6, 10**6, 0]))) < 1e-5
    assert kl_to_even(np.array([10**6, 0, 0])) > 5


def test_fill_in_can_be_watched():
    model, seen = planner(), []
    memory = model.remember(states(1))
    tokens = torch.full((1, 16), MASK)
    fill_in(
        model,
        memory,
        tokens,
        Sampling(16),
        torch_generator("w"),
        lambda k, t, p: seen.append((t == MASK).sum()),
    )
    assert [int(n) for n in seen] == list(range(15, -1, -1))


def test_places_beyond_the_horizon_are_never_masked():
    "What sampling starts from is what training has seen: END beyond a task's horizon."
    noise = noise_of(np.random.default_rng(2), 4, 5, 16)
    noise = {k: torch.from_numpy(v) for k, v in noise.items()}
    free = torch.arange(16).expand(4, 16) < 10
    plan = torch.where(free, 1, END)
    tokens, _ = q_sample({"plan": plan, "free": free} | noise, LossConfig(all_masked=1.0))
    assert (tokens[:, :, :10] == MASK).all() and (tokens[:, :, 10:] == END).all()
