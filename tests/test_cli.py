"""The command line as its callers see it: exit codes, one sentence per mistake, nothing half-written."""

import errno
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from toy_method import Project

import trajbook
from trajbook.apps.cli import COMMANDS, main
from trajbook.core import read_json


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A project with two finished seeds of the toy."
    project = Project(tmp_path_factory.mktemp("done"), notebooks=False)
    code, _, err = project.call("run", "toy", "--seeds", "0,1", "--in-process")
    assert code == 0, err
    for path in project.root.glob("**/run.json"):  # as if the tree had not been clean
        path.write_text(re.sub(r'"dirty": (false|null)', '"dirty": true', path.read_text()))
    return project


@pytest.fixture
def here(done, monkeypatch):
    "The same project, known to this process, so that main() can be called directly."
    for key, value in done.env.items():
        if key.startswith("TRAJBOOK_"):
            monkeypatch.setenv(key, value)
    monkeypatch.setattr(trajbook, "__path__", [*trajbook.__path__, str(done.package)])
    monkeypatch.chdir(done.root)
    yield done
    for name in [m for m in sys.modules if m.startswith("trajbook.toy")]:
        del sys.modules[name]


REAL_OPEN = os.fdopen


def refused(capsys, *words):
    "The one sentence of a refused command."
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 2 and not out, (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")  # fmt: skip


def test_help_is_quick_and_light():
    code = "import sys; from trajbook.apps.cli import main; main(['--help']); print('torch' in sys.modules)"  # fmt: skip
    best = 9.0
    for _ in range(3):
        start = time.process_time(), time.monotonic()
        children = os.times().children_user + os.times().children_system
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        cost = os.times().children_user + os.times().children_system - children
        best = min(best, cost, time.monotonic() - start[1])
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert all(command in done.stdout for command in COMMANDS)
    assert best <= 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    out, _ = capsys.readouterr()
    assert "usage: trajbook" in out and (command == "version" or f"  trajbook {command}" in out or "$(trajbook" in out)  # fmt: skip


BAD = [
    (["rum"], "did you mean 'run'"),
    (["run"], "METHOD"),
    (["run", "toyy"], "unknown method 'toyy': did you mean 'toy'"),
    (["run", "toy", "--preset", "smal"], "unknown preset 'smal': did you mean 'small'"),
    (["run", "toy", "--set", "train.lrr=1"], "unknown field 'train.lrr': did you mean 'train.lr'"),
    (["run", "toy", "--train.lrr", "1"], "unknown field 'train.lrr'"),
    (["run", "toy", "--set", "train.lr"], "FIELD=VALUE"),
    (["run", "toy", "--set", "train.steps=many"], "train.steps = 'many'"),
    (["run", "toy", "--set", "train.steps=1.5"], "train.steps = '1.5'"),
    (["run", "toy", "--stages", "trian"], "did you mean 'train'"),
    (["run", "toy", "--seeds", "one"], "0,1,2"),
    (["run", "toy", "--jobs", "x"], "--jobs"),
    (["run", "toy", "--device", "tpu"], "cuda"),
    (["run", "toy", "--name", "../out"], "no name for a run"),
    (["run", "toy", "--config", "none.yaml"], "none.yaml"),
    (["run", "toy", "--time-limit", "soon"], "30m"),
    (["run", "toy", "--prset", "tiny"], "--prset"),
    (["run", "toy", "--seeds", "4-2"], "0,1,2"),
    (["run", "toy", "--jobs", "0"], "at least 1"),
    (["run", "toy", "--fresh", "--resume"], "choose one"),
    (["run", "toy", "--update", "--stages", "train"], "do not name stages"),
    (["run", "toy", "--stages", "evaluate", "--name", "new"], "needs stage data"),
    (["runs", "lisst"], "lisst"),
    (["runs", "show", "toy/tny"], "did you mean toy/tiny"),
    (["eval", "nothing"], "no run 'nothing'"),
    (["compare", "toy/tiny"], "at least two"),
    (["compare", "toy/tiny", "nothing"], "no run 'nothing'"),
    (["compare", "toy/tiny", "published:toy/full"], "no results of toy"),
    (["publish", "toy/tiny"], "not committed"),
    (["embed", "toy", "none.csv"], "no function 'embed'"),
    (["demo", "nobody"], "unknown method"),
    (["bench", "nobody"], "unknown method"),
    (["config", "toy", "--preset", "huge"], "unknown preset"),
]


@pytest.mark.parametrize("words,expected", BAD, ids=[" ".join(w) for w, _ in BAD])
def test_mistakes_are_one_sentence(words, expected, here, capsys):
    before = files(here.root)
    assert expected in refused(capsys, *words, *(["--in-process"] if "evaluate" in words else []))
    assert files(here.root) == before


def test_damaged_files(here, capsys, tmp_path, monkeypatch):
    copied = tmp_path / "runs"
    shutil.copytree(here.root / "runs", copied)
    monkeypatch.setenv("TRAJBOOK_RUNS", str(copied))
    seed = copied / "toy" / "tiny" / "seed-0"
    for name, words in {
        "run.json": ["runs", "show", "toy/tiny/seed-0"],
        "results.json": ["compare", "toy/tiny/seed-0", "toy/tiny/seed-1"],
        "config.json": ["run", "toy", "--in-process"],
    }.items():
        whole = (seed / name).read_text()
        for broken in (whole[: len(whole) // 2], "", "[1]" if name == "run.json" else "\x00"):
            (seed / name).write_text(broken)
            assert name in refused(capsys, *words)
            assert (seed / name).read_text() == broken
        (seed / name).write_text(whole)
    arrays = seed / "arrays" / "evaluate.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:100])
    for k in (0, 1):
        path = copied / "toy" / "tiny" / f"seed-{k}" / "run.json"
        path.write_text(path.read_text().replace('"dirty": true', '"dirty": false').replace('"dirty": null', '"dirty": false'))  # fmt: skip
    assert "evaluate.safetensors" in refused(capsys, "publish", "toy/tiny")


def test_exit_code_of_a_bug(here, capsys, monkeypatch):
    monkeypatch.setattr("trajbook.apps.cli.versions", lambda: 1 / 0)
    assert main(["version"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "--debug" in err and "Traceback" not in err
    assert main(["version", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_the_traceback(here, capsys):
    assert main(["runs", "show", "nothing", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_json_is_all_of_standard_output(here, capsys):
    for words in (["runs"], ["runs", "show"], ["runs", "latest"], ["eval", "toy/tiny"], ["eval", "toy/tiny/seed-0"], ["version"], ["config", "toy"], ["run", "toy", "--seeds", "0,1"], ["compare", "toy/tiny/seed-0", "toy/tiny/seed-1"]):  # fmt: skip
        assert main([*words, "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_looking_at_runs(here, capsys, monkeypatch):
    assert main(["runs"]) == 0 and "toy/tiny/seed-1" in capsys.readouterr().out
    assert main(["runs", "show", "toy/tiny/seed-0"]) == 0
    out = capsys.readouterr().out
    assert "evaluate.error" in out and "trajbook run toy --preset tiny --seeds 0" in out
    assert main(["runs", "latest", "toy"]) == 0
    assert Path(capsys.readouterr().out.strip()) == here.folder(seed=1)
    monkeypatch.setattr("sys.stdin", io.StringIO("0\n"))
    assert main(["runs", "pick"]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == here.folder(seed=0) and "which run?" in err


def test_set_in_all_its_forms(here, capsys):
    first = ["run", "toy", "--in-process", "--name", "forms", "--stages", "data"]
    code = main([*first, "--set", "train.lr=3e-4", "data.n=7", "--set", "fault=none", "--train.steps", "9"])  # fmt: skip
    capsys.readouterr()
    cfg = read_json(here.folder("forms") / "config.json")
    assert code == 0 and cfg["train"]["lr"] == 3e-4 and cfg["data"]["n"] == 7
    assert cfg["fault"] == "none" and cfg["train"]["steps"] == 9
    here.write("change.yaml", "train: {lr: 3e-4, steps: 8}\n")
    assert main(["run", "toy", "--in-process", "--stages", "data", "--name", "file", "--config", "change.yaml"]) == 0  # fmt: skip
    assert read_json(here.folder("file") / "config.json")["train"] == {"steps": 8, "lr": 3e-4, "delay": 0.0}  # fmt: skip
    shutil.rmtree(here.folder("forms").parent), shutil.rmtree(here.folder("file").parent)


def test_compare_writes_one_page_and_one_text(here, capsys, tmp_path):
    sides = ["toy/tiny/seed-0", "toy/tiny/seed-1"]
    assert main(["compare", *sides, "--keys", "evaluate.e*", "--out", str(tmp_path / "r")]) == 0
    assert "evaluate.zero" not in capsys.readouterr().out
    page = (tmp_path / "r" / "compare.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page and "<script" not in page
    assert "toy/tiny/seed-1" in (tmp_path / "r" / "compare.txt").read_text()


def test_compare_presets_with_and_without_training(here, capsys):
    words = ["compare", "--method", "toy", "--presets", "tiny,small", "--keys", "evaluate.error"]
    assert main([*words, "--evaluate-only"]) == 2
    assert "no run 'toy/small'" in capsys.readouterr().err
    assert main(["run", "toy", "--preset", "small", "--in-process"]) == 0
    assert main(words) == 0, capsys.readouterr().err
    assert "toy/small" in capsys.readouterr().out
    assert main([*words, "--evaluate-only"]) == 0
    assert main(["compare", "--method", "toy", "--presets", "tini"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    shutil.rmtree(here.folder("small").parent)


def test_verbs_of_a_method(here, capsys, tmp_path, monkeypatch):
    model = "def embed(model, trajectories):\n    return model + trajectories\n"
    here.write("package/trajbook/toy/model.py", "import numpy as np\n" + model)
    data = here.package / "toy" / "data.py"
    kept = data.read_text()
    data.write_text(kept + "\ndef read_file(path):\n    return np.loadtxt(path, delimiter=',')\n")
    here.write("rows.csv", "1,2\n3,4\n")
    monkeypatch.setattr("trajbook.checkpoint.load", lambda folder, device: np.ones(2))
    importlib.invalidate_caches()
    assert main(["demo", "toy", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "demo.txt").read_text().startswith("toy/tiny/seed-")
    assert main(["embed", "toy", "rows.csv", "--out", str(tmp_path / "v.npy")]) == 0
    assert np.load(tmp_path / "v.npy").tolist() == [[2, 3], [4, 5]]
    capsys.readouterr()
    assert "v.txt" in refused(capsys, "embed", "toy", "rows.csv", "--out", str(tmp_path / "v.txt"))
    assert "does not exist" in refused(capsys, "embed", "toy", "none.csv")
    assert "no checkpoint 'last'" in refused(capsys, "embed", "toy", "rows.csv", "--checkpoint", "last")  # fmt: skip
    assert files(tmp_path) == ["demo.txt", "v.npy"]
    data.write_text(kept)
    (here.package / "toy" / "model.py").unlink()


# A disk that says no. Root may write anywhere, so a read-only file system is mounted for the test.


def mounted(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode  # fmt: skip


@pytest.fixture
def disk(tmp_path, request):
    folder = tmp_path / "disk"
    if not mounted(folder, *request.param):
        pytest.skip("mounting a file system for the test needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("disk", [("ro",)], indirect=True)
def test_read_only_file_system(here, disk, capsys, monkeypatch):
    monkeypatch.setenv("TRAJBOOK_RUNS", str(disk / "runs"))
    assert "read-only file system" in refused(capsys, "run", "toy", "--in-process")
    assert files(disk) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(here, tmp_path, capsys, monkeypatch):
    tmp_path.chmod(0o555)
    monkeypatch.setenv("TRAJBOOK_RUNS", str(tmp_path / "runs"))
    assert "permission denied" in refused(capsys, "run", "toy", "--in-process")
    assert files(tmp_path) == []
    tmp_path.chmod(0o755)


def test_runs_that_are_a_file(here, capsys, monkeypatch, tmp_path):
    (tmp_path / "runs").write_text("")
    monkeypatch.setenv("TRAJBOOK_RUNS", str(tmp_path / "runs"))
    assert "cannot write" in refused(capsys, "run", "toy", "--in-process")


@pytest.mark.parametrize("disk", [("size=64k",)], indirect=True)
def test_full_disk(here, disk, capsys, monkeypatch):
    monkeypatch.setenv("TRAJBOOK_RUNS", str(disk / "runs"))
    code = main(["run", "toy", "--in-process"])  # its arrays are larger than the disk
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: cannot write") and "no space left" in last
    assert "Traceback" not in err
    folder = disk / "runs" / "toy" / "tiny" / "seed-0"
    assert not [f for f in files(folder) if "evaluate" in f or Path(f).name.startswith(".")]
    assert read_json(folder / "run.json")["stages"]["evaluate"]["status"] in ("failed", "running")
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    assert main(["run", "toy", "--in-process", "--resume"]) == 0
    assert "evaluate.error" in capsys.readouterr().out


# The same without root: the disk's answers are put into Python's mouth.


def half_written(*args, **options):
    "A file that takes half of what it is given."
    file = REAL_OPEN(*args, **options)
    whole = file.write

    def write(data):
        whole(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = mock.MagicMock(wraps=file, write=write)
    file.__enter__.return_value = file
    return file


def forbidden(*args, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


FAULTS = {
    "fdopen": (half_written, "no space left"),
    "replace": (forbidden, "permission denied"),
    "open": (forbidden, "permission denied"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_disk_that_refuses(here, capsys, monkeypatch, tmp_path, name):
    "From the first file on, and in the middle of a run: nothing half-written, and a way on."
    monkeypatch.setenv("TRAJBOOK_RUNS", str(tmp_path))
    fault, words = FAULTS[name]
    monkeypatch.setattr(f"os.{name}", fault)
    assert words in refused(capsys, "run", "toy", "--in-process")
    assert files(tmp_path) == []
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["fdopen", "replace"])
def test_disk_that_refuses_at_the_end(here, capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv("TRAJBOOK_RUNS", str(tmp_path))
    assert main(["run", "toy", "--in-process", "--stages", "data,train"]) == 0
    before = files(tmp_path)
    (fault, words), real = FAULTS[name], getattr(os, name)
    pick = lambda *a, **k: (fault if is_product(a[0]) else real)(*a, **k)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(f"os.{name}", pick)
        assert main(["run", "toy", "--in-process"]) == 2
    out, err = capsys.readouterr()
    assert words in err.splitlines()[-1] and "Traceback" not in err
    assert files(tmp_path) == before
    assert (
        read_json(tmp_path / "toy/tiny/seed-0/run.json")["stages"]["evaluate"]["status"] == "failed"
    )
    assert main(["run", "toy", "--in-process"]) == 0
    assert "evaluate.error" in capsys.readouterr().out


def is_product(target) -> bool:
    "Whether a file descriptor or a name is that of the last stage's arrays."
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
    return "evaluate.safetensors" in path


def test_one_damaged_run_hides_no_other(here, capsys, tmp_path, monkeypatch):
    copied = tmp_path / "runs"
    shutil.copytree(here.root / "runs", copied)
    monkeypatch.setenv("TRAJBOOK_RUNS", str(copied))
    (copied / "toy" / "tiny" / "seed-0" / "run.json").write_text("{")
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "unreadable" in out and "toy/tiny/seed-1  done" in out
    assert main(["runs", "--json"]) == 0
    assert "damaged" in {r["run"]: r for r in json.loads(capsys.readouterr().out)}["toy/tiny/seed-0"]["error"]  # fmt: skip


def test_doctor_says_what_to_do(here, capsys, monkeypatch):
    monkeypatch.setattr("trajbook.apps.cli.try_physics", lambda: 1 / 0)
    monkeypatch.setattr("trajbook.apps.cli.try_rendering", lambda: 1 / 0)
    assert main(["doctor", "--json"]) == 2
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["physics"]["state"] == "failed" and "trajbook[env]" in found["physics"]["text"]
    assert found["rendering"]["state"] == "optional" and "libegl1" in found["rendering"]["text"]
    assert found["numpy"]["state"] == "ok" and "has no function 'example'" in found["toy"]["text"]


def test_train_stops_before_the_evaluation(here, capsys):
    assert main(["train", "toy", "--name", "trained", "--in-process", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert {k: v for k, v in row["stages"].items() if v == "done"}.keys() == {"data", "train"}
    assert "belongs to `trajbook run`" in refused(capsys, "train", "toy", "--stages", "data")


def test_latest_and_interactive_stand_for_a_run(here, capsys, monkeypatch):
    assert main(["runs", "show", "--latest", "--json"]) == 0
    newest = json.loads(capsys.readouterr().out)["run"]
    assert main(["runs", "show", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == newest
    monkeypatch.setattr("sys.stdin", io.StringIO("0\n"))
    assert main(["eval", "--interactive", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "which run?" in err and json.loads(out)["method"] == "toy"
    assert "Unrecognized" in refused(capsys, "config", "toy", "--latest")
