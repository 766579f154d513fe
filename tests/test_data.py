"""What no lesson can check about `trajbook.data`: kills, many processes, damaged files, odd shapes."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trajbook.core import TrajbookError, sha256_file
from trajbook.data import (
    WALK_SCHEMA,
    Batches,
    Field,
    Trajectories,
    assign_split,
    generate,
    map_safetensors,
    random_walk,
)

CONFIG = {"max_steps": 30, "sleep_s": 0.0}
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def slow_walk(config, seed, index):
    time.sleep(config["sleep_s"])
    with open(os.environ.get("COUNT_CALLS", os.devnull), "a") as calls:
        calls.write(f"{index}\n")
    return random_walk(config, seed, index)


def failing_walk(config, seed, index):
    if index == 7:
        raise ZeroDivisionError("no walk today")
    return random_walk(config, seed, index)


def life(config, seed, index):
    """A learning history of one to three walks."""
    walks = [random_walk(config, seed, 10 * index + k) for k in range(1 + index % 3)]
    return [w | {"goal": index} for w in walks]


def contents(path):
    return {f.name: sha256_file(f) for f in sorted(Path(path).iterdir())}


def walks(n=12, **more):
    episodes = [random_walk(CONFIG, 0, i) for i in range(n)]
    return Trajectories.from_episodes(episodes, WALK_SCHEMA, **more)


# --- generation ---------------------------------------------------------------------------------


def test_any_number_of_workers_and_any_piece_size_gives_the_same_bytes(folder):
    split = {"train": 0.75, "test": 0.25}
    for name, workers, size in (("one", 1, None), ("two", 2, None), ("odd", 2, 7)):
        generate(
            random_walk, 40, WALK_SCHEMA, config=CONFIG, seed=1, path=folder / name,
            workers=workers, shard_episodes=size, split=split, shard_mb=0.003,
        )  # fmt: skip
    assert contents(folder / "one") == contents(folder / "two") == contents(folder / "odd")
    assert len(contents(folder / "one")) > 3
    plain = [random_walk(CONFIG, 1, i) for i in range(40)]
    by_hand = Trajectories.from_episodes(plain, WALK_SCHEMA, split, seed=1)
    assert Trajectories.open(folder / "two", verify=True).fingerprint == by_hand.fingerprint
    assert not list(folder.glob("*.partial"))


def test_histories_are_generated_whole(folder):
    schema = [*WALK_SCHEMA.values(), Field("goal", "int64", level="history")]
    arguments = {
        "config": CONFIG,
        "seed": 0,
        "shard_mb": 0.002,
        "split": {"train": 0.5, "test": 0.5},
    }
    data = generate(life, 12, schema, path=folder / "lives", shard_episodes=5, **arguments)
    again = generate(life, 12, schema, path=folder / "lives", shard_episodes=5, **arguments)
    assert data.fingerprint == again.fingerprint and len(data.histories) == 12
    for h, part in enumerate(data.histories):
        assert len(part) == 1 + h % 3 and {e.goal for e in part} == {h}
        assert len({e.split for e in part}) == 1, "a history is never split"
    assert data.split("train").labels["goal"].tolist() == sorted(data.split("train").labels["goal"])


def start_generation(path, sleep_s, calls, workers=2):
    code = (
        "from test_data import *\n"
        f"generate(slow_walk, 48, WALK_SCHEMA, config={CONFIG | {'sleep_s': sleep_s}}, seed=5,"
        f" path={str(path)!r}, workers={workers}, shard_episodes=4, shard_mb=0.0005)"
    )
    env = dict(os.environ, TQDM_DISABLE="1", COUNT_CALLS=str(calls))
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen([sys.executable, "-c", code], env=env)


def wait_for(condition, timeout_s=30):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def test_kill_9_while_making_and_while_joining_then_resume_gives_the_same_bytes(folder):
    psutil = pytest.importorskip("psutil")
    path, work, calls = folder / "walks", folder / "walks.partial", folder / "calls"

    first = start_generation(path, 0.02, calls)
    wait_for(lambda: len(list(work.glob("piece-*"))) >= 3)
    children = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_for(lambda: not any(c.is_running() and c.status() != "zombie" for c in children))
    done = len(list(work.glob("piece-*")))
    assert 3 <= done < 12 and not path.exists()

    second = start_generation(path, 0.02, calls)
    wait_for(lambda: list(work.glob(".joined.*/shard-*")))
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    assert not path.exists() and len(list(work.glob("piece-*"))) == 12
    made = len(calls.read_text().split())
    assert made < 48 + 3 * 4, "finished pieces were made again"

    assert start_generation(path, 0.02, calls).wait() == 0
    assert len(calls.read_text().split()) == made, "all was made, only the joining was left"
    assert [p.name for p in sorted(folder.iterdir())] == ["calls", "walks", "walks.lock"]
    generate(
        slow_walk, 48, WALK_SCHEMA, config=CONFIG | {"sleep_s": 0.0}, seed=5,
        path=folder / "whole", shard_episodes=4, shard_mb=0.0005,
    )  # fmt: skip
    shards = [
        {k: v for k, v in contents(folder / d).items() if "shard" in k} for d in ("walks", "whole")
    ]
    assert shards[0] == shards[1] and len(shards[0]) > 10


def test_an_error_names_the_item_and_keeps_what_is_done(folder):
    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError) as caught:
            generate(
                failing_walk, 8, WALK_SCHEMA, config=CONFIG, seed=0, path=folder / f"w{workers}",
                shard_episodes=2, workers=workers,
            )  # fmt: skip
        assert "item 7" in " ".join(caught.value.__notes__)
        assert len(list((folder / f"w{workers}.partial").glob("piece-*"))) == 3


def test_pieces_of_other_data_are_not_used(folder):
    path, work = folder / "walks", folder / "walks.partial"
    for seed in (1, 2):
        with pytest.raises(ZeroDivisionError):
            generate(
                failing_walk, 8, WALK_SCHEMA, config=CONFIG, seed=seed, path=path, shard_episodes=2
            )
    (work / "piece-000000002.safetensors").write_bytes(b"cut short")
    arguments = {"config": CONFIG, "seed": 2, "shard_episodes": 2}
    data = generate(random_walk, 8, WALK_SCHEMA, path=path, **arguments)
    assert np.array_equal(data[0].action, random_walk(CONFIG, 2, 0)["action"])
    with pytest.raises(TrajbookError, match="config.*delete it or choose another"):
        generate(random_walk, 8, WALK_SCHEMA, path=path, config={"max_steps": 3}, seed=2)
    with pytest.raises(TrajbookError, match="already holds other data .split"):
        generate(random_walk, 8, WALK_SCHEMA, path=path, split=["train"] * 8, **arguments)
    with pytest.raises(TrajbookError, match="top level of a module"):
        generate(lambda c, s, i: {}, 8, WALK_SCHEMA, path=folder / "x", workers=2, **arguments)
    with pytest.raises(TrajbookError, match="cannot make 0 items"):
        generate(random_walk, 0, WALK_SCHEMA, path=folder / "x", **arguments)


def test_two_callers_at_once_make_the_data_once(folder):
    callers = [start_generation(folder / "walks", 0.01, folder / "calls", 1) for _ in range(2)]
    assert [c.wait(60) for c in callers] == [0, 0]
    assert len((folder / "calls").read_text().split()) == 48


def test_workers_start_light():
    heavy = "torch pyarrow minari pandas matplotlib pydantic gymnasium"
    code = f"import sys, trajbook.data; print([m for m in {heavy.split()} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- storage ------------------------------------------------------------------------------------

MIXED = [
    Field("obs", "float64", (3,), "m", final=True),
    Field("image", "uint8", (2, 2), final=True),
    Field("action", "int16"),
    Field("terminated", "bool"),
    Field("kind", "int8", level="episode", categories=("a", "b")),
    Field("goal", "float32", (2,), level="history"),
]


def make_episode(draw, n):
    flags = np.zeros(n, bool)
    flags[-1] = draw.random() < 0.5
    return {
        "obs": draw.normal(size=(n + 1, 3)),
        "image": draw.integers(0, 256, (n + 1, 2, 2)),
        "action": draw.integers(-9, 9, n),
        "terminated": flags,
        "kind": draw.integers(0, 2),
    }


@st.composite
def mixed_data(draw):
    lengths = draw(
        st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6)
    )
    gen, items = np.random.default_rng(draw(st.integers(0, 99))), []
    for history in lengths:
        goal = gen.normal(size=2).astype(np.float32)
        items.append([make_episode(gen, n) | {"goal": goal} for n in history])
    return items


def assert_same(a, b):
    assert len(a) == len(b) and a.schema == b.schema and a.splits == b.splits
    for x, y in zip(a, b, strict=True):
        assert x.split == y.split
        for name in a.schema:
            assert x[name].dtype == y[name].dtype == a.schema[name].dtype
            assert np.array_equal(x[name], y[name])


@quick
@given(items=mixed_data(), shard_mb=st.sampled_from([1e-6, 3e-4, 1]), data=st.data())
def test_ragged_episodes_survive_saving(folder, items, shard_mb, data):
    split = data.draw(st.lists(st.sampled_from("ab"), min_size=len(items), max_size=len(items)))
    ds = Trajectories.from_episodes(items, MIXED, split)
    back = Trajectories.open(ds.save(folder / "ds", shard_mb=shard_mb), verify=True)
    assert_same(ds, back)
    assert back.fingerprint == ds.fingerprint == pickle.loads(pickle.dumps(back)).fingerprint
    for name in ds.schema:
        assert np.array_equal(ds[name], back[name])
        assert np.array_equal(np.concatenate(list(back.chunks(name))), ds[name])
    flat = [e for item in items for e in item]
    for e, episode in enumerate(back):
        assert np.array_equal(episode.obs, flat[e]["obs"]) and np.array_equal(
            episode.goal, flat[e]["goal"]
        )
    part = back.split(split[0])
    assert_same(part, Trajectories.open(part.save(folder / "part"), verify=True))
    assert_same(part[::1], part) and len(part.histories) == split.count(split[0])


@quick
@given(order=st.permutations(range(9)), keep=st.integers(1, 9))
def test_a_selection_is_a_data_set(folder, order, keep):
    ds = walks(9, split=["x", "y", "z"] * 3)
    part = ds.select(order[:keep])
    back = Trajectories.open(part.save(folder / "part", shard_mb=1e-4))
    assert_same(part, back)
    assert part.fingerprint == back.fingerprint
    offsets = part.offsets("obs")
    for i in range(keep):
        assert np.array_equal(part["obs"][offsets[i] : offsets[i + 1]], ds[order[i]].obs)


def test_the_fingerprint_sees_every_change():
    episodes = [random_walk(CONFIG, 0, i) for i in range(3)]
    base = Trajectories.from_episodes(episodes, WALK_SCHEMA).fingerprint
    assert base == Trajectories.from_episodes(list(walks(3)), WALK_SCHEMA).fingerprint
    changed = [dict(e) for e in episodes]
    changed[1] = changed[1] | {"step_size": changed[1]["step_size"] + 1e-3}
    other_unit = [*list(WALK_SCHEMA.values())[:2], Field("step_size", unit="cm", level="episode")]
    others = [
        Trajectories.from_episodes(changed, WALK_SCHEMA),
        Trajectories.from_episodes(episodes[::-1], WALK_SCHEMA),
        Trajectories.from_episodes(episodes, other_unit),
        Trajectories.from_episodes(episodes, WALK_SCHEMA, ["a", "a", "b"]),
        Trajectories.from_episodes([episodes[:2], episodes[2:]], WALK_SCHEMA),
    ]
    assert len({base, *(o.fingerprint for o in others)}) == 6


def test_data_are_read_only(folder):
    ds = walks(3)
    for data in (ds, Trajectories.open(ds.save(folder / "ds"))):
        with pytest.raises(ValueError, match="read-only"):
            data[0].obs[0] = 1.0


def sparse_data_set(path, episodes, steps, width):
    """A data set of zeros that takes no room on the disk."""
    rows, path = episodes * steps, Path(path)
    path.mkdir()
    sizes = {
        "obs": (("F32"), [rows, width], rows * width * 4),
        "_n_steps": ("I64", [episodes], episodes * 8),
    }
    header, at = {}, 0
    for name in ("_n_steps", "obs"):
        dtype, shape, size = sizes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path / "shard-00000.safetensors", "wb") as f:
        f.write(
            len(text).to_bytes(8, "little") + text + np.full(episodes, steps, np.int64).tobytes()
        )
        f.truncate(8 + len(text) + at)
        size = f.seek(0, 2)
    row = {
        "file": "shard-00000.safetensors",
        "bytes": size,
        "episodes": episodes,
        "steps": rows,
        "sha256": "",
    }
    schema = [{"name": "obs", "dtype": "float32", "shape": [width], "unit": "m"}]
    head = {"format": 1, "trajbook": "0", "episodes": episodes, "steps": rows, "splits": []}
    head |= {"fingerprint": "x", "provenance": {}, "schema": schema, "shards": [row]}
    (path / "dataset.json").write_text(json.dumps(head))


def test_a_big_file_is_opened_sliced_and_windowed_without_loading_it(folder):
    sparse_data_set(folder / "big", episodes=20_000, steps=1_000, width=50)  # 4 GB
    code = f"""
import resource, psutil, time
import numpy as np
from trajbook.data import Batches, Trajectories
rss = lambda: psutil.Process().memory_info().rss / 1e6
before, begin = rss(), time.perf_counter()
ds = Trajectories.open({str(folder / "big")!r})
opened = time.perf_counter() - begin
windows = ds.windows(100)
begin = time.perf_counter()
ds[12345].obs.sum()
one = time.perf_counter() - begin
next(Batches(windows, ["obs"], 32))
part = ds.select(np.arange(0, 20000, 3)).windows(10)
part.gather([0, len(part) - 1])
piece = next(ds.chunks("obs"))
print(rss() - before, opened, one, piece.shape[0])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    grown_mb, opened_s, one_s, rows = map(float, out.stdout.split())
    assert rows == 20_000_000
    assert grown_mb < 150 and opened_s < 3 and one_s < 0.5  # 4 GB take longer to read


def test_a_thousand_shards_do_not_need_a_thousand_handles(folder):
    ds = Trajectories.from_episodes([{"x": np.full(2, i)} for i in range(300)], [Field("x")])
    back = Trajectories.open(ds.save(folder / "many", shard_mb=8e-6))
    assert len(back._store.shards) == 300
    assert np.array_equal(back["x"], ds["x"])
    if Path("/proc/self/fd").exists():
        held = [
            os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink() and f.exists()
        ]
        assert sum("shard-" in h for h in held) <= 64


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "ds"
    walks(6, split={"train": 0.5, "test": 0.5}).save(path)
    return path


def damaged_copy(sound, folder, name, change):
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    for file in sound.iterdir():
        (copy / file.name).write_bytes(
            change(file.read_bytes()) if file.name == name else file.read_bytes()
        )
    return copy


@quick
@given(keep=st.floats(0, 0.999))
def test_a_shard_cut_anywhere_is_refused(sound, folder, keep):
    name = "shard-00000.safetensors"
    copy = damaged_copy(sound, folder, name, lambda b: b[: int(len(b) * keep)])
    with pytest.raises(TrajbookError, match="shard-00000.*damaged"):
        Trajectories.open(copy)
    with pytest.raises(TrajbookError, match="damaged"):
        map_safetensors(copy / name)


@quick
@given(at=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_header_never_crashes(sound, folder, at, value):
    name = "shard-00000.safetensors"
    copy = damaged_copy(sound, folder, name, lambda b: b[:at] + bytes([value]) + b[at + 1 :])
    try:
        data = Trajectories.open(copy)
        [e.obs.sum() for e in data]
    except TrajbookError as e:
        assert "shard-00000" in str(e)


junk = st.sampled_from([None, -1, 3.5, "x", [], {}, [None], True, [[]], 10**30])


@settings(quick, max_examples=150)
@given(data=st.data())
def test_a_changed_dataset_json_never_crashes(sound, folder, data):
    head = json.loads((sound / "dataset.json").read_text())
    where = head
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [
            v
            for v in (where.values() if isinstance(where, dict) else where)
            if isinstance(v, dict | list) and v
        ]
        where = data.draw(st.sampled_from(inner)) if inner else where
    key = data.draw(
        st.sampled_from(list(where) if isinstance(where, dict) else list(range(len(where))))
    )
    if data.draw(st.booleans()):
        del where[key]
    else:
        where[key] = data.draw(junk)
    copy = damaged_copy(sound, folder, "dataset.json", lambda b: json.dumps(head).encode())
    try:
        assert len(Trajectories.open(copy)) == 6
    except TrajbookError as e:
        assert str(copy) in str(e)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h.update(format=99, trajbook="9.9"), "format 99 by trajbook 9.9"),
        (lambda h: h["shards"][0].update(file="../sound/ds/shard-00000.safetensors"), "outside"),
        (lambda h: h["shards"][0].update(file="gone.safetensors"), "does not exist"),
        (lambda h: h["shards"][0].update(steps=3), "number of steps"),
        (lambda h: h["schema"][0].update(shape=[3]), "type and shape"),
        (lambda h: h["schema"][0].update(dtype="pickle"), "dtype 'pickle'"),
        (lambda h: h["splits"].pop(), "do not add up"),
    ],
)
def test_wrong_heads_are_refused_by_name(sound, folder, change, words):
    head = json.loads((sound / "dataset.json").read_text())
    change(head)
    copy = damaged_copy(sound, folder, "dataset.json", lambda b: json.dumps(head).encode())
    with pytest.raises(TrajbookError, match=words):
        Trajectories.open(copy)


def test_places_that_cannot_be_read_or_written(sound, folder):
    (folder / "file").write_text("not a folder")
    with pytest.raises(TrajbookError, match="no dataset.json"):
        Trajectories.open(folder)
    with pytest.raises(TrajbookError, match="cannot write"):
        walks(2).save(folder / "file" / "ds")
    with pytest.raises(TrajbookError, match="damaged"):
        Trajectories.open(damaged_copy(sound, folder, "dataset.json", lambda b: b[:-20]))
    with pytest.raises(TrajbookError, match="no episodes to save"):
        walks(2)[:0].save(folder / "empty")


# --- windows and batches ------------------------------------------------------------------------


@quick
@given(
    items=mixed_data(),
    length=st.integers(1, 9),
    stride=st.integers(1, 9),
    shard_mb=st.sampled_from([1e-6, 1]),
)
def test_windows_cover_and_pad(folder, items, length, stride, shard_mb):
    ds = Trajectories.open(Trajectories.from_episodes(items, MIXED).save(folder / "ds", shard_mb))
    windows = ds.windows(length, min(stride, length))
    batch = windows.gather(np.arange(len(windows)), [*ds.schema, "next_obs"])
    pad, seen = batch["is_padding"], {e: set() for e in range(len(ds))}
    assert len(set(batch["sample_id"])) == len(windows)
    for w in range(len(windows)):
        e, start = int(windows.episode[w]), int(windows.start[w])
        assert ds.locate(batch["sample_id"][w]) == (e, start)
        n = min(length, ds[e].n_steps - start)
        assert n >= 1 and pad[w].tolist() == [t >= n for t in range(length)]
        seen[e] |= set(range(start, start + n))
        for name, shift in (("obs", 0), ("image", 0), ("action", 0), ("next_obs", 1)):
            field = name.removeprefix("next_")
            expected = ds[e][field][start + shift : start + shift + n]
            assert np.array_equal(batch[name][w, :n], expected) and not batch[name][w, n:].any()
        assert batch["kind"][w] == ds[e].kind and np.array_equal(batch["goal"][w], ds[e].goal)
    assert all(seen[e] == set(range(ds[e].n_steps)) for e in seen)
    whole = ds.windows(length, stride, whole=True)
    assert (whole.n_valid == length).all()
    assert len(whole) == sum(max(0, (n - length) // stride + 1) for n in ds.n_steps)
    starts = ds.windows(length, start_only=True)
    assert starts.episode.tolist() == list(range(len(ds))) and not starts.start.any()
    few = windows.batches(3, ["action"])
    assert np.array_equal(np.concatenate([b["action"] for b in few]), batch["action"])


@quick
@given(items=mixed_data(), length=st.integers(1, 12), shard_mb=st.sampled_from([1e-6, 1]))
def test_windows_through_histories(folder, items, length, shard_mb):
    ds = Trajectories.open(Trajectories.from_episodes(items, MIXED).save(folder / "ds", shard_mb))
    windows = ds.windows(length, by="history")
    names = ["obs", "next_obs", "action", "kind", "goal"]
    batch = windows.gather(np.arange(len(windows)), names)
    w = 0
    for history in ds.histories:
        flat = {
            "obs": np.concatenate([e.obs[:-1] for e in history]),
            "next_obs": np.concatenate([e.obs[1:] for e in history]),
            "action": history["action"],
            "kind": np.repeat(history.labels["kind"], history.n_steps),
        }
        for start in range(0, len(flat["action"]), length):
            n = min(length, len(flat["action"]) - start)
            for name, values in flat.items():
                assert np.array_equal(batch[name][w, :n], values[start : start + n])
                assert not batch[name][w, n:].any()
            assert batch["is_padding"][w].sum() == length - n
            assert np.array_equal(batch["goal"][w], history["goal"][0])
            w += 1
    assert w == len(windows)


def test_sample_ids_do_not_depend_on_the_view_or_the_stride():
    ds = walks(12, split={"train": 0.5, "test": 0.5})
    everything = ds.windows(5, 1)
    ids = everything.gather(np.arange(len(everything)), ["obs"])
    by_id = dict(zip(ids["sample_id"].tolist(), ids["obs"], strict=True))
    for part in (ds.split("test"), ds.select([7, 2])):
        batch = part.windows(5).gather([0, 1, 2], ["obs"])
        for sample_id, obs in zip(batch["sample_id"].tolist(), batch["obs"], strict=True):
            assert np.array_equal(by_id[sample_id], obs)


def test_windows_refuse_what_has_no_meaning():
    ds = walks(3)
    bad = {
        "no windows of length 0": lambda: ds.windows(0),
        "did you mean 'action'": lambda: ds.windows(4).gather([0], ["acton"]),
        "no final row": lambda: ds.windows(4).gather([0], ["next_action"]),
        "by 'life'": lambda: ds.windows(4, by="life"),
        "cannot be shared by 3": lambda: Batches(ds.windows(4), None, 8, world=3),
        "0 windows": lambda: Batches(ds[:0].windows(4), None, 8),
        "there is no split 'val'; this data set has: none": lambda: ds.split("val"),
        "mask of 2": lambda: ds.select(np.array([True, False])),
        "would be empty": lambda: assign_split(5, {"train": 0.99, "test": 0.01}),
        "add up to 1": lambda: assign_split(5, {"train": 0.9, "test": 0.2}),
    }
    for words, call in bad.items():
        with pytest.raises(TrajbookError) as caught:
            call()
        assert words in str(caught.value)


@quick
@given(
    n=st.integers(1, 40), per_rank=st.integers(1, 6), world=st.integers(1, 4), seed=st.integers(0, 9),
    shuffle=st.booleans(),
)  # fmt: skip
def test_ranks_share_every_epoch_without_repeats(n, per_rank, world, seed, shuffle):
    size = per_rank * world
    ds = Trajectories.from_episodes([{"x": np.arange(n)}], [Field("x")])
    make = [
        Batches(ds.windows(1), ["x"], size, seed, shuffle, rank=r, world=world)
        for r in range(world)
    ]
    steps = -(-3 * n // size)
    stream = np.concatenate([np.concatenate([b.indices(k) for b in make]) for k in range(steps)])
    for epoch in range(3):
        part = stream[epoch * n : (epoch + 1) * n]
        assert len(set(part)) == n
        assert np.array_equal(part, make[0].order(epoch))
    alone = Batches(ds.windows(1), ["x"], size, seed, shuffle)
    assert np.array_equal(np.concatenate([alone.indices(k) for k in range(steps)]), stream)


@quick
@given(before=st.integers(0, 30), seed=st.integers(0, 5))
def test_batches_resume_where_they_were(before, seed):
    windows = walks(8).windows(6)
    stream = Batches(windows, ["obs"], 7, seed)
    for _ in range(before):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [next(stream) for _ in range(4)]
    resumed = Batches(windows, ["obs"], 7, seed)
    resumed.load_state_dict(state)
    for batch in expected:
        again = next(resumed)
        assert all(np.array_equal(again[k], batch[k]) for k in batch)
    with pytest.raises(TrajbookError, match="cannot continue: windows was"):
        Batches(walks(7).windows(6), ["obs"], 7, seed).load_state_dict(state)


def test_splits_keep_groups_together():
    groups = np.arange(100) // 4
    names = assign_split(100, {"train": 0.8, "test": 0.2}, seed=3, groups=groups)
    assert (names == "test").sum() == 20
    assert all(len(set(names[groups == g])) == 1 for g in range(25))
    assert not np.array_equal(
        names, assign_split(100, {"train": 0.8, "test": 0.2}, seed=4, groups=groups)
    )


# --- users' own files ---------------------------------------------------------------------------

CSV = "run,t,x,y,force,end,kind\na,0,1,2,0.5,false,slow\na,1,1.5,2,0.25,TRUE,\nb,0,0,0,1,0,fast\nb,1,0,1,-1,1,fast\n"
OWN = [
    Field("obs", shape=(2,), unit="m"),
    Field("action", unit="N"),
    Field("truncated", "bool"),
    Field("kind", "uint8", level="episode", categories=("slow", "fast")),
]
OPTIONS = {
    "columns": {"obs": ["x", "y"], "action": "force", "truncated": "end"},
    "episode": "run",
    "time": "t",
}


def read_csv(folder, text, **options):
    file = folder / "own.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Trajectories.from_csv(file, OWN, **(OPTIONS | options))


def test_csv_is_read(folder):
    ds = read_csv(folder, CSV)
    assert ds.n_steps.tolist() == [2, 2] and ds.labels["kind"].tolist() == [0, 1]
    assert ds[0].obs.tolist() == [[1, 2], [1.5, 2]] and ds[0].truncated.tolist() == [False, True]
    excel = ("\ufeff" + CSV.replace(",", "; ").replace("\n", "\r\n") + "\r\n").encode()
    assert read_csv(folder, excel, delimiter=";").fingerprint == ds.fingerprint


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("1.5,2", "nan,2", "own.csv, row 3, column 'x': nan is not a finite number"),
        ("1.5,2", "-inf,2", "row 3, column 'x': -inf is not a finite number"),
        ("1.5,2", "1e300,2", "row 3, column 'x': 1e+300 is too large for float32"),
        ("1.5,2", "1e999,2", "row 3, column 'x': inf is not"),
        ("1.5,2", "one,2", "row 3, column 'x': 'one' is not a number"),
        ("1.5,2", "1,5,2", "row 3: 8 cells, the header has 7"),
        ("1.5,2", ",2", "row 3, column 'x': the cell is empty"),
        ("a,1,", "a,0,", "row 3, column 't': time goes from 0.0 to 0.0"),
        ("a,1,", "a,nan,", "row 3, column 't': nan"),
        (",x,", ",z,", "there is no column 'x'"),
        (",force,", ",forces,", "there is no column 'force'; did you mean 'forces'?"),
        (",force,", ",x,", "a column stands twice"),
        ("run,", "walk,", "there is no column 'run'; there are: walk"),
        ("b,1,0,1,-1,1,fast\n", "", "row 4: 1 step(s), at least 2 are needed"),
        ("b,1,", "a,2,", "row 5, column 'run': 'a' was there before"),
        ("b,1,", ",1,", "row 5, column 'run': the cell is empty"),
        ("-1,1,fast", "-1,1,slow", "row 5, column 'kind': 'slow' differs from 'fast'"),
        ("false,slow", "false,medium", "row 2, column 'kind': 'medium' is none of slow, fast"),
        ("0.5,false", "0.5,true", "row 2, column 'end': true before the last step"),
        ("0.5,false", "0.5,2", "row 2, column 'end': 2.0 does not fit bool"),
        (CSV, "", "the file has no rows"),
        (CSV, "run,t,x,y,force,end,kind\n", "the file has no rows"),
        (CSV, b"\xff\xfe\x00", "cannot read"),
        (CSV, 'run,t\n"a', "row 2: 1 cells, the header has 2"),
    ],
)  # fmt: skip
def test_bad_csv_is_refused_by_name(folder, old, new, words):
    assert old in CSV
    text = new if old == CSV else CSV.replace(old, new)
    with pytest.raises(TrajbookError) as caught:
        read_csv(folder, text)
    assert words in str(caught.value) and "own.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_with_a_final_row(folder):
    schema = [Field("obs", final=True), Field("action"), Field("truncated", "bool")]
    text = "episode,obs,action,truncated\n0,1,5,0\n0,2,6,1\n0,3,,\n"
    (folder / "f.csv").write_text(text)
    ds = Trajectories.from_csv(folder / "f.csv", schema)
    assert ds[0].obs.tolist() == [1, 2, 3] and ds[0].action.tolist() == [5, 6]
    for old, new, words in (
        ("0,3,,", "0,3,7,", "row 4, column 'action': the last row"),
        ("0,2,6,1", "0,2,,1", "row 3, column 'action': the cell is empty"),
        ("0,1,5,0\n0,2,6,1", "0,1,5,1\n0,2,6,0", "row 2, column 'truncated': true before the last"),
    ):
        (folder / "f.csv").write_text(text.replace(old, new))
        with pytest.raises(TrajbookError) as caught:
            Trajectories.from_csv(folder / "f.csv", schema)
        assert words in str(caught.value)
    with pytest.raises(TrajbookError, match="cannot read .*gone.csv: No such file"):
        Trajectories.from_csv(folder / "gone.csv", schema)


def test_bad_episodes_are_refused_by_name():
    schema = [
        Field("obs", shape=(2,), final=True),
        Field("action", "int8"),
        Field("terminated", "bool"),
    ]
    good = {"obs": np.zeros((4, 2)), "action": [1, 2, 3], "terminated": [0, 0, 1]}
    bad = {
        "episode 1, row 2, column 'obs[1]': nan": {"obs": [[0, 0], [0, 0], [0, np.nan], [0, 0]]},
        "column 'obs': one row has shape (3,), the schema says (2,)": {"obs": np.zeros((4, 3))},
        "column 'action': 4 rows, but 3 would match": {"action": [1, 2, 3, 4]},
        "row 2, column 'action': 200 does not fit int8": {"action": [1, 2, 200]},
        "row 0, column 'action': 0.5 does not fit int8": {"action": [0.5, 1, 2]},
        "row 1, column 'terminated': true before": {"terminated": [0, 1, 1]},
        "the schema has no field 'acton'; did you mean 'action'?": {"acton": [1, 2, 3]},
        "episode 1, column 'obs': ": {"obs": [[0, 0], [0]]},
        "is not a real number": {"action": ["a", "b", "c"]},
        "0 step(s)": {"obs": np.zeros((1, 2)), "action": [], "terminated": []},
    }
    for words, change in bad.items():
        with pytest.raises(TrajbookError) as caught:
            Trajectories.from_episodes([good, good | change], schema)
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(TrajbookError, match="episode 0: field 'action' is missing"):
        Trajectories.from_episodes([{k: v for k, v in good.items() if k != "action"}], schema)
    with pytest.raises(TrajbookError, match="no episodes"):
        Trajectories.from_episodes([], schema)
    with pytest.raises(TrajbookError, match="history 0, episode 1, column 'goal': differs"):
        goal = [Field("x"), Field("goal", level="history")]
        Trajectories.from_episodes([[{"x": [1], "goal": 1}, {"x": [1], "goal": 2}]], goal)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble", "int32", "bool"])
def test_numbers_of_any_width_are_cast(dtype):
    ds = Trajectories.from_numpy(np.ones((2, 3, 2), dtype), [Field("obs", shape=(2,))])
    assert ds["obs"].dtype == np.float32 and ds["obs"].sum() == 12


def test_numpy_files(folder):
    schema = [Field("obs", shape=(2,), final=True), Field("action"), Field("mass", level="episode")]
    arrays = {"obs": np.ones((2, 5, 2)), "action": np.ones((2, 4)), "mass": [1.0, 2.0], "n": [4, 2]}
    np.savez(folder / "a.npz", **arrays)
    ds = Trajectories.from_numpy(folder / "a.npz", schema, lengths="n")
    assert ds.n_steps.tolist() == [4, 2] and ds[1].obs.shape == (3, 2) and ds[1].mass == 2
    np.save(folder / "a.npy", np.ones((7, 2)))
    assert Trajectories.from_numpy(
        folder / "a.npy", [Field("obs", shape=(2,))]
    ).n_steps.tolist() == [7]
    np.savez(folder / "evil.npz", obs=np.array([{}, {}], object))
    (folder / "cut.npz").write_bytes((folder / "a.npz").read_bytes()[:-60])
    t = np.tile([0.0, 1, 2, 3], (2, 1))
    t[1, 2] = 1
    bad = [
        ("cut.npz", lambda: Trajectories.from_numpy(folder / "cut.npz", schema)),
        ("evil.npz", lambda: Trajectories.from_numpy(folder / "evil.npz", [Field("obs")])),
        ("gone.npz", lambda: Trajectories.from_numpy(folder / "gone.npz", schema)),
        ("there is no array 'm'", lambda: Trajectories.from_numpy(folder / "a.npz", schema, lengths="m")),
        ("no field 'n'", lambda: Trajectories.from_numpy(folder / "a.npz", schema)),
        ("do not match the 3 lengths", lambda: Trajectories.from_numpy(np.ones((2, 4)), [Field("x")], lengths=[1] * 3)),
        ("shape (2, 4, 1)", lambda: Trajectories.from_numpy(np.ones((2, 4, 1)), [Field("x", shape=(2,))])),
        ("episode 1, row 2, column 't': time goes from 1.0 to 1.0",
         lambda: Trajectories.from_numpy({"x": np.ones((2, 4)), "t": t}, [Field("x")], time="t")),
        ("numbers of episodes differ",
         lambda: Trajectories.from_numpy({"x": np.ones((2, 4)), "m": [1.0]}, [Field("x"), Field("m", level="episode")])),
    ]  # fmt: skip
    for words, call in bad:
        with pytest.raises(TrajbookError) as caught:
            call()
        assert words in str(caught.value), str(caught.value)


@settings(quick, max_examples=15)
@given(items=mixed_data())
def test_parquet_round_trip(folder, items):
    pytest.importorskip("pyarrow")
    ds = Trajectories.from_episodes(
        items, MIXED, ["train", "test"] * (len(items) // 2) + ["x"] * (len(items) % 2)
    )
    ds = Trajectories(ds._store)
    ds.provenance["seed"] = 7
    back = Trajectories.from_parquet(ds.to_parquet(folder / "a.parquet"))
    assert_same(ds, back)
    assert back.fingerprint == ds.fingerprint and back.provenance == {"seed": 7}


def test_parquet_of_others(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    states = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    columns = {
        "episode_index": [0, 0, 1, 1],
        "observation.state": states,
        "action": [1, 2, None, 4],
    }
    pyarrow.parquet.write_table(pa.table(columns), folder / "a.parquet")
    names = {
        "columns": {"obs": ["observation.state_0", "observation.state_1"]},
        "episode": "episode_index",
    }
    schema = [Field("obs", shape=(2,))]
    ds = Trajectories.from_parquet(folder / "a.parquet", schema, **names)
    assert ds[1].obs.tolist() == states[2:]
    with pytest.raises(TrajbookError, match="a.parquet, row 3, column 'action': the cell is empty"):
        Trajectories.from_parquet(
            folder / "a.parquet", [*schema, Field("action", "int64")], **names
        )
    with pytest.raises(TrajbookError, match="needs a schema"):
        Trajectories.from_parquet(folder / "a.parquet")
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:100])
    with pytest.raises(TrajbookError, match="cannot read .*b.parquet"):
        Trajectories.from_parquet(folder / "b.parquet", schema)


def test_a_missing_library_says_what_to_install(monkeypatch, folder):
    for name in ("pyarrow", "pyarrow.parquet", "minari"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrajbookError, match="pip install pyarrow"):
        walks(2).to_parquet(folder / "a.parquet")
    with pytest.raises(TrajbookError, match="pip install pyarrow"):
        Trajectories.from_parquet(folder / "a.parquet")
    with pytest.raises(TrajbookError, match=r"pip install \"minari\[hdf5\]\""):
        Trajectories.from_minari("some/data-v0")


def test_minari_round_trip(folder):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    gen, items = np.random.default_rng(0), []
    for lengths in ((3, 1), (2,), (4, 4)):
        goal = gen.normal(size=2)
        items.append([make_episode(gen, n) | {"goal": goal} for n in lengths])
    ds = Trajectories.from_episodes(items, MIXED, ["train", "test", "train"], {"seed": 3})
    back = Trajectories.from_minari(ds.to_minari(folder / "mixed"))
    assert_same(ds, back)
    assert back.fingerprint == ds.fingerprint and back.provenance == {"seed": 3}
    theirs = minari.MinariDataset(folder / "mixed" / "data")
    episode = theirs[1]
    assert (
        np.array_equal(episode.observations, ds[1].obs)
        and episode.truncations[-1] != episode.terminations[-1]
    )
    assert sorted(p.name for p in folder.iterdir()) == ["mixed"]
    with pytest.raises(TrajbookError, match="it exists"):
        ds.to_minari(folder / "mixed")
    with pytest.raises(TrajbookError, match="final row"):
        Trajectories.from_numpy(np.ones((2, 3)), [Field("obs")]).to_minari(folder / "other")
    with pytest.raises(TrajbookError, match="cannot read the Minari data set"):
        Trajectories.from_minari("nobody/nothing-v0")


def test_minari_of_others_with_dictionaries(folder):
    minari, gym = pytest.importorskip("minari"), pytest.importorskip("gymnasium")
    schema = [Field("obs_pos", shape=(2,), final=True), Field("obs_grid", "uint8", (3,), final=True),
              Field("action", "int64", categories=("left", "right")), Field("reward")]  # fmt: skip
    draw = np.random.default_rng(1)
    episodes = [
        {"obs_pos": draw.normal(size=(n + 1, 2)), "obs_grid": draw.integers(0, 9, (n + 1, 3)),
         "action": draw.integers(0, 2, n), "reward": draw.normal(size=n)}
        for n in (3, 5)
    ]  # fmt: skip
    ds = Trajectories.from_episodes(episodes, schema)
    path = ds.to_minari(folder / "dicts")
    theirs = minari.MinariDataset(path / "data")
    assert isinstance(theirs.observation_space, gym.spaces.Dict)
    assert isinstance(theirs.action_space, gym.spaces.Discrete)
    theirs.storage.update_metadata({"trajbook": "{}"})
    foreign = Trajectories.from_minari(theirs)
    assert set(foreign.schema) == {
        "obs_pos",
        "obs_grid",
        "action",
        "reward",
        "terminated",
        "truncated",
    }
    assert np.array_equal(foreign["obs_pos"], ds["obs_pos"]) and foreign[0].truncated.tolist() == [
        False,
        False,
        True,
    ]
    assert foreign.provenance == {"source": "minari:trajbook/dicts-v0"}
