"""The whole of a method as a user runs it: by command, by hand through papermill, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from trajbook.config import load_method
from trajbook.core import read_json, read_jsonl, root

BIN = Path(sys.executable).parent
# Fewer trajectories than `tiny`: what is tested here is that nothing depends on how a run is started.
OVERRIDES = {
    "mae": {"train.save_every": 2, "train.log_every": 1},
    "moe": {
        "train.save_every": 2,
        "train.log_every": 1,
        "train.steps": 10,
        "variants": ["moe", "gru"],
    },
    "masked_diffusion": {
        "train.save_every": 2,
        "train.log_every": 1,
        "train.steps": 10,
        "variants": ["diffusion", "bc"],
        "data.tasks": ["crossing_s9n1", "many_plans"],
    },
}
MOMENTS = {
    "mae": ("data", "train", "evaluate"),
    "moe": ("train", "evaluate", "experts"),
    "masked_diffusion": ("train", "evaluate", "plans"),
}


def short(method: str) -> list[str]:
    "The overrides as words of a command line."
    pairs = (
        f"{k}={v if isinstance(v, int) else json.dumps(v)}" for k, v in OVERRIDES[method].items()
    )
    return [word for pair in pairs for word in ("--set", pair)]


def environment(folder: Path) -> dict:
    "Runs and cache of their own, one thread, no progress bars; a process that dies says where."
    places = {"TRAJBOOK_RUNS": str(folder / "runs"), "TRAJBOOK_CACHE": str(folder / "cache")}
    rules = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **places, **rules}


def trajbook(folder: Path, *words: str, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [BIN / "trajbook", *words],
        env=environment(folder),
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done


def weights(run: Path) -> dict[str, bytes]:
    "Bytes of every final and best model of a run."
    found = sorted((run / "checkpoints").glob("**/model.safetensors"))
    chosen = [p for p in found if p.parent.name in ("final", "best")]
    return {p.parent.relative_to(run).as_posix(): p.read_bytes() for p in chosen}


def numbers(run: Path) -> dict[str, float]:
    "Recorded values that do not measure time or memory."
    metrics = read_json(run / "results.json")["metrics"]
    noisy = ("speedup", "slowdown", "memory", "per_s", "rate", "hours", "time", "seconds")
    return {k: m["value"] for k, m in metrics.items() if not any(w in k for w in noisy)}


@pytest.fixture(scope="module", params=list(OVERRIDES))
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(method, tmp_path_factory) -> Path:
    "The folder of a run that nothing disturbed."
    folder = tmp_path_factory.mktemp("whole")
    trajbook(folder, "run", method, "--preset", "tiny", *short(method), "--name", "test")
    return folder / "runs" / method / "test" / "seed-0"


@pytest.mark.slow
def test_run_folder_is_complete(whole):
    info = read_json(whole / "run.json")
    assert {s["status"] for s in info["stages"].values()} == {"done"}
    for name in ("config.json", "log.jsonl", "results.json", "figures"):
        assert (whole / name).exists(), name
    for stage in info["stages"]:
        nb = nbformat.read(whole / "notebooks" / f"{stage}.ipynb", as_version=4)
        assert not [c for c in nb.cells if "lesson" in c.metadata.get("tags", [])]
    assert weights(whole)


@pytest.mark.slow
def test_papermill_by_hand_gives_the_same_weights(method, whole, tmp_path):
    "The notebook alone, started in an unrelated folder, computes the earlier stages by itself."
    overrides = json.dumps({"overrides": OVERRIDES[method]})
    source = root() / "nbs" / f"{load_method(method).notebooks['train']}.ipynb"
    words = [BIN / "papermill", source, "out.ipynb", "-p", "preset", "tiny", "-y", overrides]
    quiet = ["--no-progress-bar", "--log-output"]  # what its processes print belongs to the failure
    done = subprocess.run(
        [*words, *quiet], cwd=tmp_path, env=environment(tmp_path), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-6000:]
    (run,) = (tmp_path / "cache" / "runs" / method).glob("tiny-*")
    assert not list(run.glob("*.lock.d"))
    by_hand = weights(run)
    assert by_hand and by_hand == {k: v for k, v in weights(whole).items() if k in by_hand}


def kill_tree(process: subprocess.Popen) -> None:
    "SIGKILL to the process and everything it has started, at once."
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [psutil.Process(process.pid), *family]:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    process.wait()
    psutil.wait_procs(family, timeout=10)


def kill_when(folder: Path, ready, words: list[str]) -> None:
    "Start the command, wait until `ready()` says so, kill it with everything below it."
    process = subprocess.Popen(
        [BIN / "trajbook", *words],
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 240
        while not ready():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < end, "the moment to kill never came"
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            kill_tree(process)


def stage_is(run: Path, stage: str, status: str) -> bool:
    "Whether run.json says that `stage` is in `status`."
    if not (run / "run.json").exists():
        return False
    return read_json(run / "run.json")["stages"].get(stage, {}).get("status") == status


@pytest.mark.slow
def test_killed_three_times_and_resumed(method, whole, tmp_path):
    "kill -9 in three stages, training among them; the result is the same to the byte."
    run = tmp_path / "runs" / method / "test" / "seed-0"
    words = ["run", method, "--preset", "tiny", *short(method), "--name", "test"]
    for i, stage in enumerate(MOMENTS[method]):
        rows = 3 if stage == "train" else 0

        def ready(stage=stage, rows=rows) -> bool:
            return stage_is(run, stage, "running") and len(read_jsonl(run / "log.jsonl")) >= rows

        kill_when(tmp_path, ready, [*words, *["--resume"] * (i > 0)])
    trajbook(tmp_path, *words, "--resume")
    assert weights(run) == weights(whole)
    assert numbers(run) == numbers(whole)
    rows = [(r["name"], r["step"]) for r in read_jsonl(run / "log.jsonl") if "loss" in r]
    assert len(rows) == len(set(rows)), "a step is logged twice"
