"""A toy method in a temporary project, for tests of the runner: data -> train -> evaluate."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat

HEAD = """
import json, time
from dataclasses import dataclass, field
import numpy as np
from trajbook.config import Method
from trajbook.core import TrajbookError, rng, write_json, read_json, progress
from trajbook.run import stage
"""
MODULES = {
    "data": """
@dataclass(frozen=True)
class DataConfig:
    n: int = 50
    seed: int = 0

@dataclass(frozen=True)
class TrainConfig:
    steps: int = 30
    lr: float = 0.1
    delay: float = 0.0

@dataclass(frozen=True)
class ToyConfig:
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    preset: str = "tiny"
    fault: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

METHOD = Method(
    name="toy", title="A toy", config=ToyConfig,
    presets={"tiny": ToyConfig(), "small": ToyConfig(data=DataConfig(n=200))},
    stages=("data", "train", "evaluate"), headline=("evaluate.error", "evaluate.zero"),
    notebooks={s: f"toy/9{i}_{s}" for i, s in enumerate(("data", "train", "evaluate"))},
)

def make(cfg, path):
    from trajbook.core import atomic_folder
    with atomic_folder(path) as folder:
        np.save(folder / "x.npy", 3 + rng(cfg.seed, "toy").normal(size=cfg.n))

@stage("toy", "data")
def run_stage(cfg, run):
    run.share("data", cfg.data, lambda path: make(cfg.data, path))
""",
    "train": """
class Paused(TrajbookError):
    pass

@stage("toy", "train")
def run_stage(cfg, run):
    x = np.load(run.shared("data") / "x.npy")
    w, first, state = rng(cfg.seed, "init").normal(), 0, run.path("state.json")
    if state.exists():
        w, first = (read_json(state)[k] for k in ("w", "step"))
    for step in progress(range(first, cfg.train.steps), desc="train"):
        w -= cfg.train.lr * (w - x[step % len(x)])
        write_json(state, {"w": w, "step": step + 1})
        if cfg.fault == "bug" and step == 3:
            raise ValueError("a bug in the toy")
        if cfg.fault == "mistake" and step == 3:
            raise TrajbookError("train.lr is too brave")
        if cfg.fault == "disk" and step == 3:
            open("/dev/full", "w").write("x" * 100000)
        if cfg.fault == "pause" and step == 3:
            raise Paused("the time is over at step 4")
        time.sleep(cfg.train.delay)
    write_json(run.path("checkpoints", "best", "config.json"), {"w": w})
""",
    "evaluate": """
@stage("toy", "evaluate")
def run_stage(cfg, run):
    w = read_json(run.checkpoint("best") / "config.json")["w"]
    run.record("evaluate.error", abs(w - 3), unit="m", better="lower")
    run.record("evaluate.zero", 3.0, unit="m", better="lower")
    run.compare("evaluate.error", "evaluate.zero")
    run.save_arrays(w=np.array([w]), big=np.zeros(300_000))

def demo(run, out):
    (out / "demo.txt").write_text(run.label)
""",
}


def notebook(stage: str, number: int) -> nbformat.NotebookNode:
    "A stage notebook: an exported definition, a lesson that must be skipped, and the run."
    code, md = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [
        md(f"# {stage}"),
        code(f"from trajbook.run import open_run, prepare\nfrom trajbook.toy.{stage} import run_stage"),
        code(HEAD + MODULES[stage]),  # defines run_stage again, as a chapter does
        code("raise RuntimeError('lessons must be skipped')", metadata={"tags": ["lesson"]}),
        code('preset = "tiny"\noverrides = {}\nseed = 0\nrun_dir = ""\ndevice = "auto"', metadata={"tags": ["parameters"]}),
        code(f'cfg, folder = prepare("toy", "{stage}", preset, overrides, seed, run_dir, device)\nrun_stage(cfg, folder)'),
        code("open_run(folder)"),
    ]  # fmt: skip
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


class Project:
    "A temporary project with the toy method, and the command line in it."

    def __init__(self, root: Path, notebooks: bool):
        self.root = root
        self.package = root / "package" / "trajbook"
        for name, text in {"__init__": "", **{k: HEAD + v for k, v in MODULES.items()}}.items():
            self.write(f"package/trajbook/toy/{name}.py", text)
        site = f"import trajbook\ntrajbook.__path__.append({str(self.package)!r})\n"
        self.write("site/sitecustomize.py", site)
        if notebooks:
            for i, stage in enumerate(MODULES):
                text = nbformat.writes(notebook(stage, i))
                self.write(f"nbs/toy/9{i}_{stage}.ipynb", text)
            self.write("nbs/00_core.ipynb", nbformat.writes(nbformat.v4.new_notebook()))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TRAJBOOK_")}
        self.env |= {
            "TRAJBOOK_ROOT": str(root),
            "PYTHONPATH": str(root / "site"),
            "OMP_NUM_THREADS": "1",
        }
        self.env |= {"COLUMNS": "100"}

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def start(self, *words: str, **options) -> subprocess.Popen:
        call = "import sys; from trajbook.apps.cli import main; sys.exit(main())"
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # a program that was started in the background ignores Ctrl-C, and so would its children
        pipe["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, "-c", call, *map(str, words)], env=self.env, cwd=self.root, **pipe | options)  # fmt: skip

    def call(self, *words: str, **options) -> tuple[int, str, str]:
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def folder(self, name: str = "tiny", seed: int = 0) -> Path:
        return self.root / "runs" / "toy" / name / f"seed-{seed}"


def wait_for(condition, seconds: float = 20.0) -> None:
    "Wait until a condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
