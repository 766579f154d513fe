"""Training and judging planners: the same bytes however a run is made, numbers that mean what they say, rivals that are what they are called."""

import numpy as np
import pytest
import torch

from trajbook.config import load_method, resolve
from trajbook.core import TrajbookError, read_json, rng, root
from trajbook.data import Trajectories
from trajbook.masked_diffusion.data import (
    DONE,
    END,
    FORWARD,
    DataConfig,
    LossConfig,
    ModelConfig,
    all_shortest_plans,
    draw_plans,
    load_data,
    make_task,
    room,
    schema,
    task,
    variant,
)
from trajbook.masked_diffusion.evaluate import (
    Case,
    LookupTable,
    bot_episodes,
    play,
    random_policy,
    score,
    spl,
)
from trajbook.masked_diffusion.train import PlanStream, PlanTable
from trajbook.run import VERDICTS, RunReader, run_method

SHORT = {
    "variants": ["diffusion", "bc", "autoregressive"],
    "data.tasks": ["empty_random", "empty_random_full", "crossing_s9n1", "fourrooms", "many_plans"],
    "train.steps": 6,
    "train.eval_every": 3,
    "train.batch_size": 16,
    "evaluate.episodes": 20,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same run twice, with one worker and with two."
    place = tmp_path_factory.mktemp("diffusion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAJBOOK_RUNS", str(place / "runs"))
        patch.setenv("TRAJBOOK_CACHE", str(place / "cache"))
        yield [
            RunReader(
                run_method(
                    "masked_diffusion", "tiny", [0], SHORT | {"workers": w}, name=f"w{w}",
                    isolate=False, fresh=False,
                )[0]
            )
            for w in (1, 2)
        ]  # fmt: skip


@pytest.mark.slow
def test_workers_do_not_change_a_byte(runs):
    one, two = (sorted(r.dir.glob("checkpoints/*/*/model.safetensors")) for r in runs)
    assert len(one) >= 6 and [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    a, b = (
        {k: m["value"] for k, m in r.results().items() if "time" not in k and "seconds" not in k}
        for r in runs
    )
    assert a == b


@pytest.mark.slow
def test_the_headline_numbers_have_their_names(runs):
    keys = set(runs[0].results())
    methods = ("diffusion", "bc", "autoregressive", "table", "random")
    for env in ("empty_random", "crossing_s9n1", "fourrooms", "many_plans"):
        assert {f"evaluate.{env}.success.{m}" for m in methods} <= keys
    assert {f"evaluate.empty_random.open_loop_success.steps_{k}" for k in (1, 5, 10)} <= keys
    planners = ("diffusion", "bc", "autoregressive")
    assert {f"evaluate.many_plans.kl_to_optimal_plans.{m}" for m in planners} <= keys
    assert "evaluate.nll_bound" in keys
    assert not set(load_method("masked_diffusion").headline) - keys


@pytest.mark.slow
def test_shares_are_shares(runs):
    for key, m in runs[0].results("evaluate.*").items():
        if any(f".{w}." in key for w in ("success", "spl", "idle", "plans_found", "plans_optimal")):
            assert 0 <= m["value"] <= 1, key
        if ".kl_to_optimal_plans." in key or ".optimality_gap." in key:
            assert m["value"] >= 0, key


@pytest.mark.slow
def test_nobody_is_tested_on_a_layout_of_the_training(runs):
    data, worlds = load_data(runs[0])
    for which, name in enumerate(runs[0].cfg.data.tasks):
        mine = set(data.labels["layout"][data.labels["task"] == which].tolist())
        assert mine and not mine & set(worlds[name]["test"].layout.tolist()), name


def small_table(
    name: str = "crossing_s9n1", episodes: int = 120, anywhere: float = 0.5
) -> tuple[PlanTable, object]:
    cfg = DataConfig(tasks=(name,), episodes=episodes, test=60, val=10, anywhere=anywhere)
    made = make_task(cfg, name)
    data = Trajectories.from_episodes(made.episodes, schema(cfg), made.splits)
    return PlanTable(data.split("train"), ModelConfig(tasks=(name,)), LossConfig()), made


def test_two_processes_see_what_one_would_see():
    table, _ = small_table()
    whole = PlanStream(table, 8, seed=3).batch(5)
    parts = [PlanStream(table, 8, seed=3, rank=r, world=2).batch(5) for r in (0, 1)]
    for key, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([p[key] for p in parts]))


def test_a_stream_goes_on_where_it_was():
    table, _ = small_table()
    one, two = PlanStream(table, 4, seed=1), PlanStream(table, 4, seed=1)
    for _ in range(3):
        next(one)
    two.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(next(one)["order"], next(two)["order"])
    with pytest.raises(TrajbookError, match="batch_size"):
        PlanStream(table, 8, seed=1).load_state_dict(one.state_dict())
    with pytest.raises(TrajbookError, match="shared"):
        PlanStream(table, 5, seed=1, world=2)


def test_plans_are_those_of_the_walk():
    table, made = small_table()
    plans, walk = table.plans(np.arange(len(table))), made.episodes[0]["action"]
    n = len(walk)
    assert (plans[0, : min(n, 16)] == walk[:16]).all()
    assert (plans[n - 1] == [walk[-1], *[END] * 15]).all()
    last = PlanTable.__new__(PlanTable)
    last.__dict__ = table.__dict__ | {"loss": LossConfig(pad="last")}
    assert (last.plans(np.array([n - 1])) == walk[-1]).all()
    np.testing.assert_array_equal(table.states(np.array([0]))["obs"][0], made.episodes[0]["obs"][0])


def test_plans_come_as_often_as_they_have_actions():
    table, _ = small_table("crossing_s9n1", 60)
    seen = np.concatenate([PlanStream(table, 500, 0).batch(k)["sample_id"] for k in range(20)])
    assert (table.actions == np.minimum(table.left, 16)).all()
    expected = np.average(table.actions, weights=table.actions)
    assert abs(table.actions[seen].mean() - expected) < 0.15
    alike = PlanTable.__new__(PlanTable)
    alike.__dict__ = table.__dict__ | {"loss": LossConfig(by_length=False)}
    seen = np.concatenate([PlanStream(alike, 500, 0).batch(k)["sample_id"] for k in range(20)])
    assert abs(table.actions[seen].mean() - table.actions.mean()) < 0.15


def test_a_table_with_something_extra_is_never_certain():
    table, made = small_table("crossing_s9n1", 60)
    counts = LookupTable(table, 0)
    state = {k: v[:1].repeat(3000, 0) for k, v in table.states(np.arange(5)).items()}
    seen = np.bincount(counts.policy(rng(0), extra=1e9)(state)[:, 0], minlength=7) / 3000
    np.testing.assert_allclose(seen, [1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0], atol=0.05)
    plain = np.bincount(counts.policy(rng(0))(state)[:, 0], minlength=7) / 3000
    share = counts.look_up(state)[0] / counts.look_up(state)[0].sum()
    np.testing.assert_allclose(plain, share, atol=0.05)


def test_shortest_plans_are_optimal_and_waiting_is_idle():
    w = room(8)(5, 80)
    plans = all_shortest_plans(w)
    actions = iter([draw_plans(plans, np.arange(80), rng(0))])
    success, steps, idle = play(w, lambda w: {"obs": np.zeros(len(w))}, lambda s: next(actions))
    assert success.all() and (steps == plans.length).all() and not idle.any()
    assert spl(success, steps, plans.length) == 1.0
    wait = play(
        w, lambda w: {"obs": np.zeros(len(w))}, lambda s: np.full((len(s["obs"]), 1), DONE), 7
    )
    assert not wait[0].any() and (wait[1] == 7).all() and (wait[2] == 7).all()


def test_lava_ends_an_episode_without_success():
    w = task("lava_gap").make(0, 60)
    success, steps, _ = play(
        w, lambda w: {"obs": np.zeros(len(w))}, lambda s: np.full((len(s["obs"]), 1), FORWARD), 30
    )
    assert not success.any() and (steps < 30).any()


def test_the_table_is_a_table():
    table, made = small_table("empty_fixed", 30, anywhere=0.0)
    counts = LookupTable(table, 0)
    assert len(counts.keys) == 11  # one start, one plan of eleven steps
    case = Case("empty_fixed", 0, made.worlds["test"], made.worlds["val"], counts, 7)
    assert score(case, counts.policy())["success"].all()  # the document's level: one demonstration
    assert score(case, random_policy((0, 1, 2), rng(0)))["success"].mean() < 1


def test_the_bot_of_minigrid_plays():
    success, ratio = bot_episodes("BabyAI-GoToLocal-v0", 3, seed=1)
    assert success.all() and (ratio >= 1).all()


def test_configs_name_what_is_wrong():
    for changes, words in (
        ({"variants": ["difusion"]}, "diffusion"),
        ({"model.d_model": 30}, "model.d_model"),
        ({"loss.copies": 0}, "loss.copies"),
        ({"loss.all_masked": 2.0}, "loss.all_masked"),
        ({"evaluate.execute": []}, "evaluate.execute"),
        ({"data.tasks": ["fourroom"]}, "fourrooms"),
    ):
        with pytest.raises(TrajbookError, match=words):
            resolve("masked_diffusion", "tiny", changes)
    cfg = resolve("masked_diffusion", "tiny", {"data.tasks": ["lava_gap"]})
    assert variant(cfg, "bc").model.tasks == ("lava_gap",) and variant(cfg, "bc").model.length == 1


def test_every_preset_can_be_built():
    from trajbook.masked_diffusion.model import Planner

    for name, cfg in load_method("masked_diffusion").presets.items():
        assert cfg.preset == name
        with torch.device("meta"):
            for v in cfg.variants:
                Planner(variant(cfg, v).model)


def test_claims_of_the_document_have_a_form():
    mine = [c for c in read_json(root() / "data" / "claims.json") if c["document"][:3] == "001"]
    assert len(mine) >= 18 and len({c["id"] for c in mine}) == len(mine)
    said = " ".join(c["sentence"] for c in mine)
    for words in ("49 tokens", "Pad with last", "Mean pooling", "Cosine", "ready for training"):
        assert words in said
    for c in mine:
        assert c["status"] in VERDICTS and c["page"].startswith("masked_diffusion/") and c["key"]
        assert c["reason"] if c["status"] == "open" else c["note"]


def test_every_ablation_of_a_claim_is_a_variant_of_the_preset():
    claims = read_json(root() / "data" / "claims.json")
    asked = [
        c["versus"].rpartition(".")[2]
        for c in claims
        if c.get("preset") == "ablations" and c["method"] == "masked_diffusion"
    ]
    assert len(asked) >= 8
    assert set(asked) <= set(load_method("masked_diffusion").presets["ablations"].variants)
