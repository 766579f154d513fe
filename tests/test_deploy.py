"""A deployment starts by itself, answers as the library does, and refuses what was changed."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.request
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from packaging.requirements import Requirement

from trajbook.apps.deploy import deploy
from trajbook.checkpoint import load, save_checkpoint
from trajbook.core import TrajbookError
from trajbook.moe.data import ModelConfig
from trajbook.moe.model import MoEForecaster, describe, forecast

# The book must not be found: the folder is complete without it.
WITHOUT = "import sys, runpy; sys.modules['trajbook'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = MoEForecaster(ModelConfig(d_model=32, n_heads=2, d_ff=32, head_width=32)).eval()
    return save_checkpoint(
        tmp_path_factory.mktemp("model") / "model", model, method="moe", **describe(model.config)
    )


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    return deploy(checkpoint, "tested", tmp_path_factory.mktemp("deploy") / "tested")


def start(folder: Path, *words: str) -> subprocess.CompletedProcess:
    go = [sys.executable, "-c", WITHOUT, folder / "start_server.py", *words]
    return subprocess.run(go, capture_output=True, text=True, timeout=120)


def test_it_starts_without_the_book_and_answers_like_it(folder, checkpoint):
    port = 21000 + hash(str(folder)) % 2000
    go = [sys.executable, "-c", WITHOUT, folder / "start_server.py", "--port", str(port)]
    server = subprocess.Popen(go, stdout=subprocess.PIPE, text=True)
    try:
        history = np.random.default_rng(0).normal(size=(60, 3)).cumsum(0)
        body = json.dumps({"history": history.tolist(), "samples": 3}).encode()
        for _ in range(300):
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/forecast",
                    body,
                    {"Content-Type": "application/json"},
                )
                answer = json.loads(urllib.request.urlopen(request, timeout=5).read())
                break
            except OSError:
                time.sleep(0.1)
        found = forecast(load(checkpoint), torch.from_numpy(history[None]))
        np.testing.assert_allclose(answer["mean"], found.mean[0], rtol=1e-5, atol=1e-5)
        assert np.shape(answer["samples"]) == (3, 32, 3)
        with pytest.raises(urllib.error.HTTPError, match="422"):
            bad = json.dumps({"history": [[0, 0]]}).encode()
            urllib.request.urlopen(
                urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/forecast",
                    bad,
                    {"Content-Type": "application/json"},
                )
            )
    finally:
        server.terminate()
        assert server.wait(30) in (0, -signal.SIGTERM)  # uvicorn ends by the signal, after its work


def needed(lines: list[str]) -> dict[str, Distribution]:
    "The packages that requirements name, and those that these need in turn."
    found, todo = {}, [Requirement(line) for line in lines]
    while todo:
        wanted = todo.pop()
        name = wanted.name.lower().replace("_", "-")
        if name not in found and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            assert found[name].version.partition("+")[0] in wanted.specifier, wanted
            todo += map(Requirement, found[name].requires or [])
    return found


@pytest.fixture(scope="module")
def clean_python(folder, tmp_path_factory) -> Path:
    "A new virtual environment that holds nothing but what the folder's requirements name."
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home)
    (site,) = home.glob("lib/python*/site-packages")
    for package in needed((folder / "requirements.txt").read_text().split()).values():
        for top in {f.parts[0] for f in package.files if f.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(package.locate_file(top))
    return home / "bin" / "python"


def test_it_starts_in_a_clean_environment(folder, clean_python):
    for name in ("trajbook", "scipy", "pip"):
        assert subprocess.run(
            [clean_python, "-I", "-c", f"import {name}"], capture_output=True
        ).returncode
    go = [clean_python, folder / "start_server.py", "--check"]
    done = subprocess.run(go, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "as they should be" in done.stdout, done.stderr


def test_a_requirement_that_is_left_out_is_missed(folder, clean_python, tmp_path):
    fewer = tmp_path / "venv"
    shutil.copytree(clean_python.parents[1], fewer, symlinks=True)
    next(fewer.glob("lib/python*/site-packages/pydantic")).unlink()
    go = [fewer / "bin" / "python", folder / "start_server.py", "--check"]
    done = subprocess.run(go, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "pydantic" in done.stderr


@pytest.mark.parametrize("name", ["model.pt2", "app.py", "golden.json", "distribution.json"])
def test_a_changed_file_is_refused_by_name(folder, name):
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        done = start(folder, "--check")
    finally:
        file.write_bytes(before)
    assert done.returncode == 1 and f"{name} was changed" in done.stderr


@pytest.mark.parametrize(
    "name", ["numpy.py", "hashlib.py", "uvicorn/__init__.py", "__pycache__/app.pyc"]
)
def test_a_file_that_was_laid_beside_is_refused_and_not_run(folder, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("print('planted code runs')")
    go = [sys.executable, copy / "start_server.py", "--check"]
    done = subprocess.run(go, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"{Path(name).parts[0]} is not in the manifest" in done.stderr
    assert "planted" not in done.stdout + done.stderr


def application(folder: Path) -> tuple[dict, object]:
    "The web application of a deployment, in this process."
    facts = json.loads((folder / "manifest.json").read_text())
    code = types.ModuleType("deployed_app")
    sys.modules["deployed_app"] = code
    exec((folder / "app.py").read_text(), code.__dict__)
    return facts, code.make_app(code.Model(folder / "model.pt2", facts), facts)


def test_odd_requests_get_a_sentence(folder):
    "Ragged points, streamed bodies; a motion that rests and then moves has a finite answer."
    facts, app = application(folder)
    client = TestClient(app, raise_server_exceptions=False)
    for history in ([[0, 0], [0, 0, 0]], [[]], [[0, 0]], []):
        assert client.post("/v1/forecast", json={"history": history}).status_code == 422
    streamed = client.post("/v1/forecast", content=iter([b"{}"]))
    assert streamed.status_code == 413
    rest = 1e-3 * np.random.default_rng(0).normal(size=(128, 3))
    rest[64:] += np.linspace(0, 1, 64)[:, None]
    answer = client.post("/v1/forecast", json={"history": rest.tolist()})
    assert answer.status_code == 200 and np.isfinite(answer.json()["scale"]).all()


@pytest.mark.parametrize(("context", "dims"), [(3, 3), (40, 1), (16, 5)])
def test_a_model_of_another_size_can_be_deployed(context, dims, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "d_ff": 32, "head_width": 32}
    model = MoEForecaster(ModelConfig(context=context, horizon=8, dims=dims, **sizes)).eval()
    extra = describe(model.config)
    save_checkpoint(tmp_path / "model", model, method="moe", **extra)
    made = deploy(tmp_path / "model", "other", tmp_path / "other")
    assert "as they should be" in start(made, "--check").stdout


def worse_mean(case: dict) -> None:
    case["answer"]["mean"][3][0] += 0.01


def wide_errors(found: dict) -> None:
    found["error_root"] = [[10 * v for v in row] for row in found["error_root"]]


def light_tails(found: dict) -> None:
    found["dof"] += 1


@pytest.mark.parametrize(
    "name,change,said",
    [("golden.json", worse_mean, "mean"), ("distribution.json", wide_errors, "samples"),
     ("distribution.json", light_tails, "samples")],
)  # fmt: skip
def test_a_wrong_answer_is_noticed(folder, name, change, said):
    "A change that comes with the right checksum is caught by the golden request."
    file, manifest = folder / name, folder / "manifest.json"
    before = file.read_text(), manifest.read_text()
    content, facts = json.loads(before[0]), json.loads(before[1])
    change(content)
    file.write_text(json.dumps(content))
    facts["sha256"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(facts))
    try:
        done = start(folder, "--check")
    finally:
        file.write_text(before[0])
        manifest.write_text(before[1])
    assert done.returncode == 1 and f"another {said}" in done.stderr, done.stderr


def test_the_folder_appears_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("trajbook.apps.deploy.model_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        deploy(checkpoint, "half", tmp_path / "half")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrajbookError, match="no name"):
        deploy(checkpoint, "../evil", tmp_path / "x")


def test_bf16_is_within_its_own_tolerance(checkpoint, tmp_path):
    folder = deploy(checkpoint, "half-size", tmp_path / "bf16", precision="bf16")
    assert start(folder, "--check").returncode == 0
    assert json.loads((folder / "manifest.json").read_text())["precision"] == "bf16"
