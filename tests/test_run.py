"""What no single notebook can check about runs: real child processes, real kernels, real kills."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import nbformat
import pytest
from toy_method import Project, wait_for

import trajbook
from trajbook.core import TrajbookError, expect_error, read_json, write_json
from trajbook.run import check_claims, load_claims, load_results, prepare, publish, result_arrays

SLOW = ("--set", "train.delay=0.05")


@pytest.fixture(params=["process", "notebook"])
def project(request, tmp_path):
    "The toy project as an installed wheel sees it, and as a checkout does."
    return Project(tmp_path, notebooks=request.param == "notebook")


@pytest.fixture
def wheel(tmp_path):
    return Project(tmp_path, notebooks=False)


@pytest.fixture
def checkout(tmp_path):
    return Project(tmp_path, notebooks=True)


def weights(project, name="tiny", seed=0):
    return (project.folder(name, seed) / "checkpoints" / "best" / "config.json").read_bytes()


def step(project, name):
    state = project.folder(name) / "state.json"
    return read_json(state)["step"] if state.exists() else 0


def test_killed_run_resumes_to_the_same_bytes(project):
    assert project.call("run", "toy", "--in-process", "--name", "whole")[0] == 0
    process = project.start("run", "toy", "--name", "killed", *SLOW)
    wait_for(lambda: step(project, "killed") >= 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    info = read_json(project.folder("killed") / "run.json")
    assert info["stages"]["train"]["status"] == "running"
    code, out, err = project.call("run", "toy", "--name", "killed", "--resume", *SLOW)
    assert code == 0, err
    told = [line.split()[1] for line in err.splitlines() if line.startswith("toy/")]
    assert told == ["data", "train", "evaluate"] and "Traceback" not in err, err
    assert "data       done before" in err
    assert "evaluate.error" in out and str(project.folder("killed")) in out
    info = read_json(project.folder("killed") / "run.json")
    assert info["stages"]["train"]["attempts"] == 2
    assert weights(project, "killed") == weights(project, "whole")
    for executed in project.folder("killed").glob("notebooks/*.ipynb"):
        text = executed.read_text()
        assert "lessons must be skipped" not in text and "\\r" not in text


def test_provenance_is_complete(wheel):
    assert wheel.call("run", "toy", "--set", "train.lr=0.2", "--name", "other")[0] == 0
    info = read_json(wheel.folder("other") / "run.json")
    assert info["command"] == "trajbook run toy --preset tiny --seeds 0 --set train.lr=0.2"
    for stage in info["stages"].values():
        assert stage["status"] == "done" and stage["wall_s"] > 0 and stage["cpu_s"] > 0
        assert stage["peak_rss_mb"] > 10 and stage["hardware"]["cores"] >= 1
        assert len(stage["code_hash"]) == 12 and "dirty" in stage and stage["device"] == "cpu"
    results = read_json(wheel.folder("other") / "results.json")
    assert results["schema"] == 1 and results["provenance"]["seeds"] == [0]
    metric = results["metrics"]["evaluate.error"]
    assert set(metric) == {"value", "unit", "ci95", "n_seeds", "better"} and metric["ci95"] is None


def test_papermill_by_hand_agrees_with_the_runner(checkout):
    options = ("--seeds", "1", "--device", "cpu", "--in-process")
    assert checkout.call("run", "toy", *options)[0] == 0
    source = checkout.root / "nbs" / "toy" / "91_train.ipynb"
    notebook = json.loads(source.read_text())  # by hand every cell runs, so the failing one must go
    notebook["cells"] = [c for c in notebook["cells"] if "skipped" not in "".join(c["source"])]
    source.write_text(json.dumps(notebook))
    papermill = [sys.executable, "-m", "papermill", str(source), str(checkout.root / "out.ipynb")]
    papermill += ["-p", "preset", "tiny", "-p", "seed", "1", "-p", "device", "cpu"]
    done = subprocess.run(papermill, env=checkout.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (cached,) = (checkout.root / "data" / "generated" / "runs" / "toy").glob("*")
    best = cached / "checkpoints" / "best" / "config.json"
    assert best.read_bytes() == weights(checkout, seed=1)
    papermill += ["-p", "presett", "full"]
    done = subprocess.run(papermill, env=checkout.env, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown parameter 'presett'" in done.stderr


def test_seeds_side_by_side_share_one_dataset(project):
    options = ("--stages", "data,train") if (project.root / "nbs").exists() else ("--json",)
    code, out, err = project.call("run", "toy", "--seeds", "0,1", "--jobs", "2", *options)
    assert code == 0, err
    pointers = {read_json(project.folder(seed=k) / "data.shared.json")["folder"] for k in (0, 1)}
    assert len(pointers) == 1
    assert weights(project, seed=0) != weights(project, seed=1)
    if "--json" in options:
        metric = json.loads(out)["metrics"]["evaluate.error"]
        assert metric["n_seeds"] == 2 and metric["ci95"] is not None


@pytest.mark.parametrize(
    "fault,code,words",
    [
        ("bug", 1, "error: stage train failed with ValueError: a bug in the toy"),
        ("mistake", 2, "error: train.lr is too brave"),
        ("disk", 2, "error: cannot write"),
        ("pause", 0, "paused: the time is over at step 4; go on with --resume"),
    ],
)
def test_stage_errors_keep_their_kind(wheel, fault, code, words):
    got, _, err = wheel.call("run", "toy", "--set", f"fault={fault}")
    assert (got, words in err) == (code, True), err
    assert "Traceback" not in err
    state = read_json(wheel.folder() / "run.json")["stages"]["train"]["status"]
    assert state == ("paused" if fault == "pause" else "failed")
    assert not (wheel.folder() / "checkpoints").exists()


def test_errors_cross_a_kernel(checkout):
    for fault in ("mistake", "bug"):
        first = ("run", "toy", "--name", fault, "--set", f"fault={fault}")
        assert checkout.call(*first, "--stages", "data", "--in-process")[0] == 0
        code, _, err = checkout.call(*first)
        last = err.splitlines()[-1]
        assert "Traceback" not in err
        if fault == "mistake":
            assert (code, last) == (2, "error: train.lr is too brave")
        else:
            assert code == 1 and "stage train failed with ValueError: a bug in the toy" in last
        assert (checkout.folder(fault) / "notebooks" / "train.ipynb").exists()


def test_second_run_in_the_same_folder(wheel):
    here = ("run", "toy", "--in-process")
    assert wheel.call(*here)[0] == 0
    code, _, err = wheel.call(*here)
    assert code == 0 and err.count("done before") == 3
    code, _, err = wheel.call(*here, "--set", "train.lr=0.5")
    assert code == 2 and "train.lr is 0.1 there, 0.5 here" in err
    module = wheel.package / "toy" / "evaluate.py"
    module.write_text(module.read_text().replace("3.0", "3.5"))
    code, _, err = wheel.call(*here)
    assert code == 2 and "other code" in err and "--resume" in err and "--fresh" in err
    code, _, err = wheel.call(*here, "--resume")
    assert code == 0 and "kept from older code" in err
    old = (wheel.folder() / "checkpoints" / "best" / "config.json").stat().st_mtime_ns
    code, out, err = wheel.call("eval", "toy/tiny")
    assert code == 0 and "3.5" in out
    assert (wheel.folder() / "checkpoints" / "best" / "config.json").stat().st_mtime_ns == old
    code, _, err = wheel.call(*here, "--update")
    assert code == 0 and "starting over" in err and "done before" not in err


def test_starting_a_stage_over_forgets_what_it_left(wheel):
    "The toy goes on from `state.json`, as a training does from its checkpoints."
    here = ("run", "toy", "--in-process")
    assert wheel.call(*here)[0] == 0
    trained, folder = weights(wheel), wheel.folder()
    for wrong in (["running"], ["done", "files"]):  # killed before the end, and finished
        info = read_json(folder / "run.json")
        record = info["stages"]["train"]
        info["stages"]["train"] = {k: record[k] for k in ("code_hash", *wrong[1:])}
        info["stages"]["train"]["status"] = wrong[0]
        write_json(folder / "run.json", info)
        write_json(folder / "state.json", {"w": 99.0, "step": 29})
        code, _, err = wheel.call(*here, "--fresh", "--stages", "train")
        assert code == 0 and "starting over with train, evaluate" in err, err
        assert weights(wheel) == trained
        stages = read_json(folder / "run.json")["stages"]
        assert list(stages) == ["data", "train"] and not (folder / "arrays").exists()
        assert not any("evaluate" in key for key in read_json(folder / "results.json")["metrics"])
        assert wheel.call(*here)[0] == 0


def test_a_reset_that_was_killed_is_finished(wheel):
    here = ("run", "toy", "--in-process")
    assert wheel.call(*here)[0] == 0
    trained, path = weights(wheel), wheel.folder() / "run.json"
    info = read_json(path)
    info["stages"] |= {name: {"status": "waiting"} for name in ("train", "evaluate")}
    write_json(path, info)
    write_json(wheel.folder() / "state.json", {"w": 99.0, "step": 29})
    code, _, err = wheel.call(*here)
    assert code == 0 and err.count("done before") == 1, err
    assert weights(wheel) == trained


def test_starting_over_is_never_half_a_run(wheel):
    here = ("run", "toy", "--in-process")
    assert wheel.call(*here)[0] == 0
    before = weights(wheel)
    for words, said in {
        ("--fresh", "--stages", "evaluate", "--set", "train.lr=0.5"): "without --stages",
        ("--update", "--stages", "evaluate", "--set", "train.lr=0.5"): "do not name stages",
    }.items():
        code, _, err = wheel.call(*here, *words)
        assert code == 2 and said in err and weights(wheel) == before, err
    for name in ("config.json", "run.json"):  # damaged: nothing else could start over
        (wheel.folder() / name).write_text("{")
        code, _, err = wheel.call(*here, "--fresh")
        assert code == 0 and "starting over" in err, err
    assert weights(wheel) == before


def test_who_comes_second_waits_and_a_death_frees_the_folder(wheel):
    process = wheel.start("run", "toy", *SLOW)
    wait_for(lambda: step(wheel, "tiny") >= 1)
    second = wheel.start("run", "toy", *SLOW)
    time.sleep(0.5)
    assert second.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, err = second.communicate(timeout=40)
    assert second.returncode == 0, err


def test_interrupt_from_the_keyboard(project):
    assert project.call("run", "toy", "--stages", "data", "--in-process", *SLOW)[0] == 0
    process = project.start("run", "toy", *SLOW, start_new_session=True)
    wait_for(lambda: step(project, "tiny") >= 2)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    at = step(project, "tiny")
    time.sleep(0.3)
    assert step(project, "tiny") == at < 30


def test_time_limit_pauses_between_stages(wheel):
    code, _, err = wheel.call("run", "toy", "--time-limit", "0")
    assert code == 0 and "paused before data" in err


def test_stage_as_a_program(wheel):
    folder = str(wheel.folder("program"))
    words = ["-m", "trajbook.toy.data", folder, "preset=small", "train.lr=0.3"]
    done = subprocess.run([sys.executable, *words], env=wheel.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_json(wheel.folder("program") / "config.json")["train"]["lr"] == 0.3
    words = ["-m", "trajbook.toy.evaluate", folder]
    done = subprocess.run([sys.executable, *words], env=wheel.env, capture_output=True, text=True)
    assert done.returncode == 2 and "needs stage train" in done.stderr


@pytest.mark.parametrize(
    "given,words",
    [
        ({"preset": "smal"}, "unknown preset 'smal': did you mean 'small'"),
        ({"overrides": {"train.lrr": 1}}, "unknown field 'train.lrr': did you mean 'train.lr'"),
        ({"overrides": {"train.steps": "many"}}, "train.steps = 'many'"),
        ({"overrides": [1]}, "overrides = [1]"),
        ({"seed": "0"}, "seed is '0'"),
        ({"seed": True}, "seed is True"),
        ({"device": 3}, "device = 3"),
        ({"stage": "trian"}, "did you mean 'train'"),
    ],
)
def test_parameters_of_a_notebook(runs, given, words):
    with expect_error(TrajbookError, words):
        prepare("toy", **({"stage": "train"} | given))
    assert not (runs.root / "data" / "generated" / "runs").exists()


# Publishing and claims, in this process: no child is needed to refuse.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Three finished seeds, with committed code."
    project = Project(tmp_path_factory.mktemp("finished"), notebooks=False)
    code, _, err = project.call("run", "toy", "--seeds", "0-2", "--in-process")
    assert code == 0, err
    for k in range(3):
        edit(project.folder(seed=k), lambda r: r.update(dirty=False, commit="a" * 40))
    return project


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    "A copy of the finished project, known to this process."
    project = Project(tmp_path, notebooks=False)
    shutil.copytree(finished.root / "runs", tmp_path / "runs")
    for key, value in project.env.items():
        if key.startswith("TRAJBOOK_"):
            monkeypatch.setenv(key, value)
    monkeypatch.setattr(trajbook, "__path__", [*trajbook.__path__, str(project.package)])
    yield project
    for name in [m for m in sys.modules if m.startswith("trajbook.toy")]:
        del sys.modules[name]


def edit(folder, change):
    "Change every stage's record in a run.json."
    info = json.loads((folder / "run.json").read_text())
    for record in info["stages"].values():
        change(record)
    (folder / "run.json").write_text(json.dumps(info))


def test_publish_joins_seeds(runs):
    path = publish(["toy/tiny"])
    assert path == runs.root / "data" / "results" / "toy" / "tiny-cpu.json"
    result = load_results("toy")
    assert (
        result["kind"] == "cpu"
        and not result["stale"]
        and result["provenance"]["seeds"] == [0, 1, 2]
    )
    error, zero = result["metrics"]["evaluate.error"], result["metrics"]["evaluate.zero"]
    values = result["per_seed"]["evaluate.error"]
    assert error["value"] == pytest.approx(sum(values) / 3) and error["n_seeds"] == 3
    half = 4.302652729911275 * statistics.stdev(values) / 3**0.5  # Student t, 2 degrees of freedom
    assert error["ci95"] == pytest.approx([error["value"] - half, error["value"] + half])
    assert zero["ci95"] is None  # the same for every seed
    pair = result["comparisons"]["evaluate.error - evaluate.zero"]
    assert pair["beats"] is True and pair["value"] == pytest.approx(error["value"] - 3)
    assert result_arrays(result)["evaluate.w"].shape == (3, 1)
    assert result["arrays_left_out"] == ["evaluate.big"]
    assert path.with_name("tiny-cpu-arrays.safetensors").stat().st_size < 1_000_000
    module = runs.package / "toy" / "evaluate.py"
    module.write_text(module.read_text() + "\nx = 1\n")
    assert load_results("toy")["stale"]


@pytest.mark.parametrize(
    "change,words",
    [
        ({"dirty": True}, "not committed"),
        ({"dirty": None}, "not committed"),
        ({"status": "running"}, "unfinished"),
        ({"code_hash": "0" * 12}, "differ in code"),
        ({"hardware": {"cpu": "abacus", "gpu": None}}, "differ in hardware"),
    ],
)
def test_publish_refuses(runs, change, words):
    edit(runs.folder(seed=1), lambda record: record.update(change))
    with expect_error(TrajbookError, words):
        publish(["toy/tiny"])
    assert not (runs.root / "data" / "results").exists()


def test_claims_are_bound_to_published_numbers(runs):
    publish(["toy/tiny"])
    claim = {"id": "1", "document": "toy", "sentence": "Small error.", "status": "verified"}
    claim |= {"key": "evaluate.error", "method": "toy", "preset": "tiny", "page": "00_core"}
    claim |= {"versus": "evaluate.zero", "relation": "below"}
    runs.write("nbs/00_core.ipynb", "{}")
    broken = [
        ({"key": "evaluate.none"}, "no published result"),
        ({"page": "99_none"}, "does not exist"),
        ({"status": "sure"}, "allowed are"),
        ({"status": "open", "key": None}, "without a reason"),
        ({"sentence": ""}, "has no sentence"),
        ({"value": 3}, "unknown field"),
        ({"relation": "above"}, "its rule does not hold"),
        ({"versus": "evaluate.none"}, "without a rule"),
        ({"status": "refuted"}, "its rule holds"),
        ({"says": [5, None]}, "its rule does not hold"),
    ]
    rows = [claim, *(claim | {"id": str(i + 2)} | b for i, (b, _) in enumerate(broken)), claim]
    runs.write("data/claims.json", json.dumps(rows))
    assert load_claims()[0]["metric"]["n_seeds"] == 3
    problems = check_claims()
    assert len(problems) == len(broken) + 1 and "listed twice" in problems[-1]
    for (_, words), problem in zip(broken, problems, strict=False):
        assert words in problem


def test_a_page_that_breaks_after_its_stage_does_not_stop_the_run(checkout):
    path = checkout.root / "nbs" / "toy" / "91_train.ipynb"
    page = nbformat.read(path, 4)
    page.cells.append(nbformat.v4.new_code_cell("1 / 0  # a picture that cannot be drawn"))
    nbformat.write(page, path)
    code, out, err = checkout.call("run", "toy")
    assert code == 0 and "evaluate.error" in out
    assert "done; its page broke afterwards: stage train failed with ZeroDivisionError" in err
    assert (checkout.folder("tiny") / "notebooks" / "train.ipynb").exists()
