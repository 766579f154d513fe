"""Grid worlds against MiniGrid itself, all shortest plans against brute force, and splits that leak nothing."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trajbook.core import TrajbookError, rng
from trajbook.masked_diffusion.data import (
    DONE,
    EMPTY,
    END,
    FORWARD,
    GOAL,
    TASKS,
    DataConfig,
    Worlds,
    all_shortest_plans,
    anywhere,
    draw_plans,
    every_plan,
    fingerprints,
    full_view,
    inside,
    layout_ids,
    load_demonstrations,
    load_worlds,
    make_data,
    make_task,
    observation_keys,
    observe,
    partial_view,
    read_worlds,
    room,
    split_layouts,
    step,
    task,
)
from trajbook.run import shared_folder

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
LEVELS = (
    "MiniGrid-Empty-8x8-v0",
    "MiniGrid-SimpleCrossingS9N1-v0",
    "MiniGrid-SimpleCrossingS11N5-v0",
    "MiniGrid-FourRooms-v0",
    "MiniGrid-LavaGapS7-v0",
    "MiniGrid-DoorKey-6x6-v0",
    "MiniGrid-DoorKey-8x8-v0",
    "MiniGrid-MultiRoom-N4-S5-v1",
    "BabyAI-GoToLocal-v0",
)
BABY = "BabyAI-GoToLocal-v0"


def environments(level: str, n: int) -> list:
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("minigrid")
    found = [gymnasium.make(level).unwrapped for _ in range(n)]
    for k, env in enumerate(found):
        env.reset(seed=100 + k)
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_the_worlds_are_those_of_minigrid(level, capsys):
    "Random actions: the same grid, hands, pose, view, full picture and end at every step."
    envs = environments(level, 6)
    worlds = read_worlds(envs, "face" if level == BABY else "reach")
    draw, going = rng(0, level), np.ones(len(envs), bool)
    for _ in range(80):
        action = draw.choice(7, len(envs), p=[0.15, 0.15, 0.35, 0.1, 0.1, 0.1, 0.05])
        worlds, won, burnt = step(worlds, action)
        seen, whole = partial_view(worlds), full_view(worlds)
        for k in np.flatnonzero(going):
            env = envs[k]
            obs, reward, terminated, _, _ = env.step(int(action[k]))
            assert (env.grid.encode() == worlds.grids[worlds.grid[k]]).all()
            assert tuple(env.agent_pos) == tuple(worlds.position[k])
            assert env.agent_dir == worlds.direction[k]
            hands = env.carrying.encode()[:2] if env.carrying else (0, 0)
            assert tuple(hands) == tuple(worlds.carrying[k])
            assert (obs["image"] == seen[k]).all()
            drawn = env.grid.encode()
            drawn[env.agent_pos[0], env.agent_pos[1]] = (10, 0, env.agent_dir)
            assert (drawn[..., 0] == whole[k, ..., 0]).all()
            assert terminated == bool(won[k] or burnt[k])
            assert (reward > 0) == bool(won[k])
            going[k] = not terminated


def brute_force(w: Worlds, longest: int) -> tuple[int, set]:
    "Length and set of the shortest plans of one world, by trying everything."
    for n in range(1, longest + 1):
        plans = np.array(list(itertools.product(range(3), repeat=n)))
        now, found = w.take(np.zeros(len(plans), int)), np.zeros(len(plans), bool)
        for action in plans.T:
            now, won, _ = step(now, action)
        found = won
        if found.any():
            return n, {tuple(p) for p in plans[found]}
    return -1, set()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(5, 1), (5, 2), (6, 1)]))
def test_all_shortest_plans_are_found(seed, shape):
    "The search finds exactly what trying all sequences finds."
    w = room(*shape)(seed, 1)
    plans = all_shortest_plans(w)
    length, expected = brute_force(w, 7)
    if length > 0:
        assert plans.length[0] == length and plans.number[0] == len(expected)
        assert {tuple(p) for p in every_plan(plans, 0)} == expected
    else:
        assert plans.length[0] > 7


@pytest.mark.parametrize("name", list(TASKS))
def test_drawn_plans_solve_their_world_in_the_stated_steps(name):
    w = task(name).make(1, 12)
    plans = all_shortest_plans(w, task(name).actions)
    assert (plans.length > 0).all()
    drawn, won_at = draw_plans(plans, np.arange(12), rng(0)), np.zeros(12, int)
    for k, action in enumerate(drawn.T):
        w, won, _ = step(w, np.where(action < 0, DONE, action))
        won_at = np.where(won & (won_at == 0), k + 1, won_at)
    assert (won_at == plans.length).all()


def test_plans_are_drawn_evenly():
    w = room(6, 3)(0, 400)
    plans = all_shortest_plans(w)
    k = int(plans.number.argmax())
    drawn = draw_plans(plans, np.full(8000, k), rng(1))[:, : plans.length[k]]
    found, count = np.unique(drawn, axis=0, return_counts=True)
    assert len(found) == plans.number[k] >= 8
    expected = 8000 / len(found)
    assert ((count - expected) ** 2 / expected).sum() < len(found) + 5 * np.sqrt(2 * len(found))


def test_no_plan_where_there_is_none():
    "A goal behind walls has no plan, and the search says so instead of running on."
    w = room(6)(0, 1)
    grids = w.grids.copy()
    x, y = np.argwhere(grids[0, ..., 0] == GOAL)[0]
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        if grids[0, x + dx, y + dy, 0] == EMPTY:
            grids[0, x + dx, y + dy] = (2, 5, 0)
    shut = Worlds(grids, w.grid, w.position, w.direction, w.carrying, w.target, "reach", True)
    if grids[0, w.position[0, 0], w.position[0, 1], 0] == EMPTY:
        assert all_shortest_plans(shut).length[0] == -1


def test_no_layout_is_in_two_splits():
    made = make_task(DataConfig(tasks=("crossing_s9n1",), episodes=200, test=30), "crossing_s9n1")
    parts = {
        s: {int(e["layout"]) for e, p in zip(made.episodes, made.splits, strict=True) if p == s}
        for s in ("train", "val")
    }
    held = set(made.worlds["test"].layout.tolist())
    assert parts["train"] and parts["val"] and held
    assert not parts["train"] & parts["val"] and not held & (parts["train"] | parts["val"])
    every = parts["train"] | parts["val"] | held
    assert len(every) == 42 and len(held) == 8  # of 42 layouts that MiniGrid makes


def test_splits_do_not_depend_on_order():
    w = room(8)(0, 500)
    ids = layout_ids(w)
    back = split_layouts(ids[::-1])[::-1]
    assert (split_layouts(ids) == back).all()


def test_another_deal_holds_out_others():
    ids = layout_ids(task("fourrooms").make(0, 400))
    tests = [set(ids[split_layouts(ids, deal=d) == 2].tolist()) for d in range(9)]
    assert len(set.union(*tests)) > 0.75 * len(set(ids.tolist()))
    for held in tests[1:]:
        assert len(held) == len(tests[0]) and len(held & tests[0]) < 0.4 * len(held)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_makes_demonstrations_that_start_anywhere(name):
    pytest.importorskip("minigrid")
    cfg = DataConfig(tasks=(name,), episodes=60, test=8, val=4, anywhere=1.0)
    made = make_task(cfg, name)
    lost = 0.5 if name == "many_plans" else 0.1  # it leaves long plans out
    n = round(60 * task(name).episodes)
    assert len(made.episodes) > (1 - lost) * 0.9 * n
    assert all(0 < len(e["action"]) <= task(name).longest for e in made.episodes)


def test_nobody_starts_behind_a_wall():
    w = task("multiroom").make(0, 40)
    moved = anywhere(w, rng(0))
    plans = all_shortest_plans(moved, task("multiroom").actions)
    assert (plans.length > 0).all() and (moved.position != w.position).any()
    assert (inside(w)[np.arange(40), *moved.position.T]).all() and inside(w).mean() < 0.3


def test_fingerprints_see_the_last_byte_of_every_word():
    "Two doors change their state together: the top bytes of two words, by the same amount."
    grid = np.zeros((1, 16, 16, 3), np.uint8)
    flat, found = grid.reshape(-1), []
    for a, b in itertools.combinations(range(7, flat.size, 8), 2):
        flat[:] = 0
        flat[a], flat[b] = 1, 2
        found.append(int(fingerprints(grid, np.zeros(1, int))[0]))
    assert len(set(found)) == len(found) > 4000


def test_a_search_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAJBOOK_CACHE", str(tmp_path))
    cfg = DataConfig(tasks=("empty_random", "fourrooms_full"), episodes=20, test=5, val=5)
    for _ in range(2):
        with pytest.raises(TrajbookError, match="side = 7"):
            shared_folder("toy", "data", cfg, lambda path: make_data(cfg, path))
    assert not [p for p in tmp_path.rglob("*") if "worlds" in p.name]


def test_the_data_is_the_same_twice_and_comes_back(tmp_path):
    cfg = DataConfig(tasks=("empty_random", "goto_local", "many_plans"), episodes=60, test=9, val=5)
    for name in ("a", "b"):
        make_data(cfg, tmp_path / name)
    one, two = (load_demonstrations(tmp_path / n) for n in ("a", "b"))
    assert one.fingerprint == two.fingerprint and len(one) > 150
    episode = one[0]
    assert len(episode["obs"]) == len(episode["action"]) + 1 and episode["obs"].shape[1:] == (
        7,
        7,
        3,
    )
    first, second = (
        load_worlds(tmp_path / n / "worlds" / "many_plans.test.safetensors") for n in ("a", "b")
    )
    assert (first.number >= 6).all() and (first.length <= 12).all() and len(first.length) == 9
    assert (first.worlds.grids == second.worlds.grids).all() and first.worlds.rule == "open"
    plans = all_shortest_plans(first.worlds, task("many_plans").actions)
    assert (plans.length == first.length).all() and (plans.number == first.number).all()


def test_a_random_start_is_on_an_empty_cell():
    w = anywhere(task("fourrooms").make(0, 20), rng(0))
    assert (w.grids[w.grid, w.position[:, 0], w.position[:, 1], 0] == EMPTY).all()


def test_views_fit_or_say_why_not():
    w = task("fourrooms").make(0, 2)
    assert observe(w, "partial").shape == (2, 7, 7, 3)
    with pytest.raises(TrajbookError, match="side = 7"):
        observe(w, "full")
    small = observe(room(6, 3)(0, 2), "full")
    assert (small[:, 4:] == (2, 5, 0)).all() and small.shape == (2, 7, 7, 3)


def test_equal_observations_have_equal_keys():
    w = room(8)(3, 300)
    obs = observe(w, "partial")
    keys = observation_keys(obs, w.direction, w.target)
    rows = np.concatenate([obs.reshape(300, -1), w.direction[:, None]], 1)
    assert len(np.unique(keys)) == len(np.unique(rows, axis=0)) < 300


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"tasks": ("fourroms",)}, "fourrooms"),
        ({"tasks": ()}, "data.tasks"),
        ({"side": 5}, "data.side"),
        ({"anywhere": 1.5}, "data.anywhere"),
        ({"episodes": 3}, "data.episodes"),
    ],
)
def test_impossible_data_is_refused(changes, words):
    with pytest.raises(TrajbookError, match=words):
        DataConfig(**changes)


def test_tokens_do_not_collide_with_actions():
    assert END == 7 and FORWARD < END
