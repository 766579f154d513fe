"""The training loop: interruptions, several processes and half precision change nothing that counts.

Started as a program (`python test_train.py JOB FOLDER`), this file is the job that the tests kill,
continue, or start twice with torchrun.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trajbook.train
from trajbook.config import TrainConfig
from trajbook.core import TrajbookError, append_jsonl, atomic_folder, atomic_write, read_jsonl, rng
from trajbook.train import (
    Ema,
    Paused,
    Trainer,
    fit,
    live_plot,
    lr_at,
    make_accelerator,
    newest_state,
    share,
)

WIDTH = 6


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, WIDTH)]
    return nn.Sequential(*layers)


def batch_of(step, size=8, rank=0, world=1, parts=1, part=0):
    "Samples of unequal length; a process gets neighbours, so the padding is shared unequally."
    lengths = 1 + np.arange(size) ** 2 % 11
    x = rng(7, "batch", step).normal(size=(size, 11, WIDTH)).astype("float32")
    batch = {"x": x, "is_padding": np.arange(11) >= lengths[:, None]}
    batch["sample_id"] = step * size + np.arange(size)
    at, n = part * world + rank, size // (world * parts)
    return {k: v[at * n : (at + 1) * n] for k, v in batch.items()}


class Data:
    "Endless batches with a position, and a parameter that is never used in odd steps."

    def __init__(self, size=8, rank=0, world=1, parts=1):
        self.step, self.options = 0, {"size": size, "rank": rank, "world": world, "parts": parts}

    def __iter__(self):
        return self

    def __next__(self):
        step, part = divmod(self.step, self.options["parts"])
        self.step += 1
        return batch_of(step, part=part, **self.options)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def masked_loss(model, batch):
    "Predict hidden inputs; masks come from (seed, step, sample id)."
    ids = batch["sample_id"].tolist()
    hidden = np.stack([rng(0, "mask", batch["step"], i).random(11) < 0.5 for i in ids])
    hidden = torch.from_numpy(hidden).to(batch["x"].device)
    scored = hidden & ~batch["is_padding"]
    error = (model(batch["x"] * ~hidden[..., None]) - batch["x"]).square().mean(-1)
    hits = (error < 1).float()
    own = ((hits * scored).sum(), scored.sum())
    return (error * scored).sum(), scored.sum(), {"rmse_like": error.mean().sqrt(), "hits": own}


def config(**changes):
    plain = {"steps": 20, "batch_size": 8, "lr": 0.01, "precision": "fp32", "trackers": ()}
    plain |= {"log_every": 1, "eval_every": 5, "save_every": 4}
    return TrainConfig(**(plain | changes))


def write_weights(model, path):
    "A checkpoint folder, by the same atomic means as a real one."
    data = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
    with atomic_folder(path) as folder:
        atomic_write(folder / "weights", data)


VAL = [batch_of(1000 + i) for i in range(3)]


def train(folder, cfg=None, data=None, dropout=0.0, **options):
    options = {"val_batches": VAL, "device": "cpu", "save": write_weights} | options
    net = network(dropout)
    data = Data() if data is None else data
    return fit(net, masked_loss, data, cfg or config(), folder, **options), net


def weights(folder, name="final"):
    return (Path(folder) / "checkpoints" / name / "weights").read_bytes()


def rows(folder):
    return read_jsonl(Path(folder) / "log.jsonl")


def without_time(found):
    return [{k: v for k, v in r.items() if k != "time_s"} for r in found]


# --- pieces ---------------------------------------------------------------------------------------


def test_schedule_is_the_closed_form():
    cfg = config(steps=200, lr=2.0, warmup_fraction=0.1, min_lr_fraction=0.25)
    for k in range(200):
        cosine = 0.5 * (1 + math.cos(math.pi * (k - 20) / 180))
        expected = 2 * (k + 1) / 20 if k < 20 else 2 * (0.25 + 0.75 * cosine)
        assert math.isclose(lr_at(k, cfg), expected)
    torch_cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch_cosine(optimizer, 200, eta_min=0.5)
    cfg = config(steps=200, lr=2.0, warmup_fraction=0.0, min_lr_fraction=0.25)
    for k in range(200):
        assert math.isclose(lr_at(k, cfg), optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        optimizer.step()
        schedule.step()
    assert lr_at(0, config(steps=1)) > 0 and lr_at(0, config(steps=3, warmup_fraction=1.0)) > 0


def test_ema_is_the_closed_form_and_copies_buffers():
    net = nn.BatchNorm1d(2)
    ema, mine = Ema(net, 0.9), net.weight.detach().clone().double()
    for n in range(1, 50):
        with torch.no_grad():
            net.weight.add_(torch.tensor([0.1, -0.3]))
            net.running_mean.fill_(n)
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        mine = d * mine + (1 - d) * net.weight.detach().double()
        torch.testing.assert_close(ema.model.weight.double(), mine, rtol=1e-5, atol=1e-6)
    assert ema.model.running_mean[0] == 49 and not ema.model.weight.requires_grad


def test_same_as_a_plain_torch_loop(tmp_path):
    cfg = config(steps=30, clip_norm=0.5)
    _, net = train(tmp_path, cfg)
    plain = network()
    opt = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(30):
        batch = {k: torch.as_tensor(v) for k, v in batch_of(step).items()} | {"step": step}
        loss_sum, weight, _ = masked_loss(plain, batch)
        warm, share_done = 2, max(0, step - 2) / 28
        cosine = 0.5 * (1 + math.cos(math.pi * share_done))
        opt.param_groups[0]["lr"] = 0.01 * ((step + 1) / warm if step < warm else cosine)
        opt.zero_grad()
        (loss_sum / weight).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        opt.step()
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_accumulation_is_the_large_batch(tmp_path):
    losses = []
    for parts in (1, 2, 4):
        train(tmp_path / str(parts), config(accumulate=parts), Data(parts=parts))
        losses.append([[r["loss"], r["grad_norm"], r["hits"]] for r in rows(tmp_path / str(parts))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_a_step_in_which_nothing_counts_changes_nothing(tmp_path):
    trainer = Trainer(network(), masked_loss, config(weight_decay=0.0), device="cpu")
    before = [p.clone() for p in trainer.parameters]
    trainer.update([batch_of(0) | {"is_padding": np.ones((8, 11), bool)}])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    found = trainer.drain()
    assert found["loss"] is None and found["grad_norm"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_on_cpu(tmp_path, precision):
    seen, cfg = set(), config(steps=40, precision=precision, ema_decay=0.5)

    def loss_fn(model, batch):
        inner = model.module if hasattr(model, "module") else model
        hook = inner[0].register_forward_hook(lambda m, a, out: seen.add(out.dtype))
        found = masked_loss(model, batch)
        hook.remove()
        assert found[0].dtype == torch.float32
        return found

    net = network()
    fit(net, loss_fn, Data(), cfg, tmp_path, val_batches=VAL, device="cpu")
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert seen == {expected[precision]} and net[0].weight.dtype == torch.float32
    assert "forward" not in vars(net) and net(torch.ones(1, WIDTH)).dtype == torch.float32
    train(tmp_path / "exact", config(steps=40))
    losses = [[r["loss"] for r in rows(f)] for f in (tmp_path, tmp_path / "exact")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0 if precision == "fp32" else 0.02)


def test_one_network_can_be_trained_twice(tmp_path):
    net = network()
    for name, precision in (("a", "bf16"), ("b", "fp32")):
        cfg = config(precision=precision)
        fit(net, masked_loss, Data(), cfg, tmp_path, name=name, device="cpu")
    assert [r["step"] for r in rows(tmp_path) if r["name"] == "b"] == list(range(1, 21))


def test_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert share(config(batch_size=64, accumulate=4)) == {"batch_size": 16, "rank": 1, "world": 2}
    with pytest.raises(TrajbookError, match="cannot be shared by 2 processes"):
        share(config(batch_size=5))
    with pytest.raises(TrajbookError, match="cannot be|would be used"):
        monkeypatch.delenv("RANK")
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setattr("trajbook.train.Accelerator", OneProcess)
        make_accelerator("fp32", "cpu")


class OneProcess:
    "What Accelerate becomes when it does not notice that torchrun started it."

    num_processes, device = 1, torch.device("cpu")

    def __init__(self, **options):
        pass


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_every", "value"), [(1, np.nan), (3, np.inf), (7, np.nan)])
def test_a_loss_that_is_not_finite(tmp_path, log_every, value):
    class Poisoned(Data):
        def __next__(self):
            batch = super().__next__()
            batch["x"][0, 0] = value if self.step == 10 else batch["x"][0, 0]
            return batch

    cfg = config(log_every=log_every, save_every=4)
    with pytest.raises(TrajbookError) as error:
        train(tmp_path, cfg, Poisoned(), name="mae")
    text = str(error.value)
    assert "training 'mae' stopped: the loss of step 10 is not finite" in text
    assert "samples of its batch: 72, 73, 74, 75, 76, 77, 78, 79;" in text
    assert text.endswith("checkpoints/mae/state-8") and "\n" not in text
    assert newest_state(tmp_path / "checkpoints" / "mae")[1]["step"] == 8


def test_a_gradient_that_is_not_finite(tmp_path):
    def loss_fn(model, batch):
        loss, weight, metrics = masked_loss(model, batch)
        if batch["step"] == 3:  # sqrt has an infinite slope at 0
            loss = loss + (0 * next(iter(model.parameters())).sum()).abs().sqrt()
        return loss, weight, metrics

    with pytest.raises(TrajbookError, match="the gradient of step 4 is not finite"):
        fit(network(), loss_fn, Data(), config(), tmp_path, device="cpu")


def test_what_does_not_fit_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(TrajbookError, match="train.lr = 0.01, not 0.02"):
        train(tmp_path, config(lr=0.02))
    with pytest.raises(TrajbookError, match="seed = 0, not 3"):
        train(tmp_path, seed=3)
    train(tmp_path, config(log_every=5))  # changes nothing in the weights
    result, _ = train(tmp_path, config(lr=0.02), resume=False)
    assert result.step == 20 and len(rows(tmp_path)) == 20
    with pytest.raises(TrajbookError, match="the data ended after 2 batches"):
        fit(network(), masked_loss, VAL[:2], config(), tmp_path / "b", device="cpu")
    with pytest.raises(TrajbookError, match="'wandb' is not installed|'wandbb' is not installed"):
        fit(
            network(),
            masked_loss,
            Data(),
            config(trackers=("wandbb",)),
            tmp_path / "c",
            device="cpu",
        )
    if not torch.cuda.is_available():
        with pytest.raises(TrajbookError, match="device 'cuda' is not there"):
            train(tmp_path / "d", device="cuda")


def test_state_of_a_newer_trajbook_is_not_ignored(tmp_path):
    train(tmp_path)
    for path in tmp_path.glob("checkpoints/state-*/state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(TrajbookError, match="newer"):
        train(tmp_path)


# --- what a training leaves behind ----------------------------------------------------------------


def test_files_and_trackers(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    cfg = config(trackers=("tensorboard",), keep_checkpoints=2, ema_decay=0.9)
    said = []
    result, net = train(tmp_path, cfg, name="student", after_eval=[lambda t, row: said.append(row)])
    folder = tmp_path / "checkpoints" / "student"
    names = {"best", "final", "step-16", "step-20", "state-16", "state-20"}
    assert {p.name for p in folder.iterdir()} == names
    found = rows(tmp_path)
    assert [r["step"] for r in found] == list(range(1, 21))
    assert {"name", "step", "loss", "rmse_like", "hits", "grad_norm", "lr", "time_s"} <= set(
        found[0]
    )
    evaluated = [r for r in found if "val_loss" in r]
    assert [r["step"] for r in evaluated] == [5, 10, 15, 20] == [r["step"] for r in said]
    assert "val_grad_norm" not in evaluated[0] and "val_hits" in evaluated[0]
    assert result.best_val == min(r["val_loss"] for r in evaluated)
    raw = b"".join(v.numpy().tobytes() for v in net.state_dict().values())
    assert weights(tmp_path, "student/final") != raw  # the average was saved
    assert weights(tmp_path, "student/final") == weights(tmp_path, "student/step-20")
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "student"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 21))
    np.testing.assert_allclose(
        [e.value for e in events.Scalars("loss")], [r["loss"] for r in found]
    )


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_pruning(tmp_path, keep):
    train(tmp_path, config(save_every=2, keep_checkpoints=keep))
    found = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    states = max(1, keep)
    assert {p for p in found if p.startswith("step")} == {f"step-{20 - 2 * i}" for i in range(keep)}
    assert {p for p in found if p.startswith("state")} == {
        f"state-{20 - 2 * i}" for i in range(states)
    }


def test_live_plot_draws_into_one_output(tmp_path, monkeypatch):
    drawn = []

    class Handle:
        def update(self, figure):
            drawn.append(figure)

    display = lambda figure, display_id: drawn.append(figure) or Handle()  # noqa: E731
    monkeypatch.setattr("IPython.display.display", display)
    train(tmp_path, after_eval=[live_plot("loss", "val_loss", "no_such_column")])
    assert len(drawn) == 4 and len(drawn[-1].axes[0].lines) == 2


# --- interruptions --------------------------------------------------------------------------------

STRESS = {"dropout": 0.3}


def stress():
    return config(steps=24, save_every=3, eval_every=4, log_every=2, ema_decay=0.9)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result, _ = train(folder, stress(), **STRESS)
    return folder, result


def assert_same_training(folder, result, undisturbed):
    other, expected = undisturbed
    assert result == expected
    for name in ("final", "best", "step-24"):
        assert weights(folder, name) == weights(other, name)
    assert without_time(rows(folder)) == without_time(rows(other))


def test_resume_after_an_error_in_any_step(tmp_path, undisturbed):
    for stop in (1, 4, 5, 11, 23):

        class Interrupted(Data):
            def __next__(self, stop=stop):
                if self.step == stop:
                    raise KeyboardInterrupt
                return super().__next__()

        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stress(), Interrupted(), **STRESS)
    result, _ = train(tmp_path, stress(), **STRESS)
    assert_same_training(tmp_path, result, undisturbed)
    result, _ = train(tmp_path, stress(), **STRESS)  # a finished training stays what it is
    assert_same_training(tmp_path, result, undisturbed)


def test_a_time_limit_only_pauses(tmp_path, undisturbed):
    for step in range(1, 24):
        with pytest.raises(Paused, match=f"paused at step {step} of 24"):
            train(tmp_path, stress(), stop_after_s=0, **STRESS)
    result, _ = train(tmp_path, stress(), stop_after_s=0, **STRESS)
    assert result == undisturbed[1] and weights(tmp_path) == weights(undisturbed[0])


def test_a_plain_generator_is_wound_forward(tmp_path, undisturbed):
    plain = lambda: (batch_of(i) for i in itertools.count())  # noqa: E731
    with pytest.raises(Paused):
        train(tmp_path, stress(), plain(), stop_after_s=0, **STRESS)
    result, _ = train(tmp_path, stress(), plain(), **STRESS)
    assert result == undisturbed[1] and weights(tmp_path) == weights(undisturbed[0])


def test_other_random_numbers_of_the_program_do_not_matter(tmp_path, undisturbed):
    torch.manual_seed(99)
    np.random.seed(99)
    result, _ = train(tmp_path, stress(), after_eval=[lambda t, row: None], **STRESS)
    assert_same_training(tmp_path, result, undisturbed)
    torch.manual_seed(0)
    net, _ = network(0.3), torch.rand(7)
    fit(net, masked_loss, Data(), stress(), tmp_path / "other", device="cpu", save=write_weights)
    assert weights(tmp_path / "other") == weights(tmp_path)  # validation takes no part


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, undisturbed):
    train(tmp_path, stress(), **STRESS)
    state = tmp_path / "checkpoints" / "state-24" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="skipped a training state"):
        result, _ = train(tmp_path, stress(), **STRESS)
    assert_same_training(tmp_path, result, undisturbed)


def test_log_is_cut_back_and_other_trainings_keep_their_rows(tmp_path, undisturbed):
    append_jsonl(tmp_path / "log.jsonl", {"name": "other", "step": 99, "loss": 1.0})
    with pytest.raises(Paused):
        train(tmp_path, stress(), stop_after_s=0, **STRESS)
    ahead = [{"name": "", "step": s, "loss": -1.0} for s in (2, 4, 6)]
    append_jsonl(tmp_path / "log.jsonl", *ahead)
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"name": "", "step": 8, "lo')
    train(tmp_path, stress(), **STRESS)
    found = rows(tmp_path)
    assert [r["step"] for r in found if r["name"] == "other"] == [99]
    mine = [r for r in without_time(found) if r["name"] == "" and r["step"] > 2]
    assert mine == without_time(rows(undisturbed[0]))[-len(mine) :] and len(mine) > 9


def start(job, folder, *launcher, **variables):
    "Run this file as a program."
    command = [sys.executable, *launcher, __file__, job, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_kill_9(tmp_path, undisturbed):
    "Killed in the middle of writes and from outside; in between it always goes on."
    job = start("killed", tmp_path)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert said.count("half a folder") >= 3, said
    assert not (tmp_path / "checkpoints" / "final").exists()
    result, _ = train(tmp_path, stress(), **STRESS)
    assert_same_training(tmp_path, result, undisturbed)
    assert not list((tmp_path / "checkpoints").glob(".*"))


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613"]
    job = start("shared", folder, *launcher, ACCELERATE_USE_CPU="true")
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_are_one(tmp_path, two_processes, parts):
    facts = json.loads((two_processes / "facts-0.json").read_text())
    assert (
        facts["world"] == 2
        and facts["paused"] == "training paused at step 11 of 24: the time was up"
    )
    train(tmp_path, config(steps=24, ema_decay=0.9), Data())
    one, two = rows(tmp_path), rows(two_processes / f"parts-{parts}")
    assert [r["step"] for r in two] == [r["step"] for r in one] == list(range(1, 25))
    for key in ("loss", "grad_norm", "hits", "lr"):
        np.testing.assert_allclose(
            [r[key] for r in two[:20]], [r[key] for r in one[:20]], rtol=1e-5
        )
    val = [[r["val_loss"] for r in found if "val_loss" in r] for found in (one, two)]
    np.testing.assert_allclose(val[1], val[0], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together(two_processes):
    said = [json.loads((two_processes / f"facts-{r}.json").read_text())["stopped"] for r in (0, 1)]
    assert said[0] == said[1]
    assert "the loss of step 3 is not finite; samples of its batch: 20, 21, 22, 23;" in said[0]


# --- speed ----------------------------------------------------------------------------------------


def test_overhead_of_a_step():
    "CPU time of one thread, against a bare loop over the same network, taken in turn."
    torch.set_num_threads(1)
    x = [rng(i).normal(size=(16, WIDTH)).astype("float32") for i in range(400)]
    loss_fn = lambda m, b: (m(b["x"]).square().sum(), b["x"].numel(), {})  # noqa: E731

    def bare():
        net = network()
        opt = torch.optim.AdamW(net.parameters(), fused=True)
        begin = time.process_time()
        for batch in x:
            loss = net(torch.from_numpy(batch)).square().mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
        return (time.process_time() - begin) / len(x)

    def ours():
        stepper = Trainer(network(), loss_fn, config(steps=400), device="cpu")
        begin = time.process_time()
        for i, batch in enumerate(x):
            stepper.update([{"x": batch, "sample_id": np.arange(16)}])
            if i % 10 == 9:
                stepper.drain()
        return (time.process_time() - begin) / len(x)

    pairs = [(ours(), bare()) for _ in range(4)][1:]
    assert min(a - b for a, b in pairs) < 1e-3, pairs


# --- the jobs -------------------------------------------------------------------------------------


def die_at(moment):
    "Kill this very process at its n-th fsync: a file is half written, and not yet in its place."
    left, fsync = [moment], os.fsync

    def deadly(handle):
        left[0] -= 1
        if left[0] == 0:
            if not os.path.isdir(f"/proc/self/fd/{handle}"):
                os.ftruncate(handle, 10)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = deadly


class Slow(Data):
    def __next__(self):
        time.sleep(0.02)
        return super().__next__()


def job_killed(folder):
    """Each training is a child that is killed.

    The log's rewriting, best, step and state take several fsyncs each, so that these moments fall
    into the writing of a best model, of a step checkpoint, of a state's tensors and of its JSON.
    """
    for moment in (5, None, 8, 9, 17, 14, 26):
        before = len(rows(folder))
        child = os.fork()
        if child == 0:
            if moment is not None:
                die_at(moment)
            train(folder, stress(), Slow() if moment is None else Data(), **STRESS)
            os._exit(1)
        while moment is None and len(rows(folder)) < before + 3:
            time.sleep(0.01)
        if moment is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
        halves = [p for p in folder.glob("checkpoints/.*") if p.is_dir()]
        print(moment, "half a folder" if halves else "between two writes", halves, flush=True)


def job_shared(folder):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    facts, clock = {}, types.SimpleNamespace(ahead=0.0)
    clock.monotonic = lambda: time.monotonic() + clock.ahead
    trajbook.train.time = clock
    for parts in (1, 2):
        cfg = config(steps=24, ema_decay=0.9, accumulate=parts)
        assert share(cfg) == {"batch_size": 8 // parts, "rank": rank, "world": world}
        # the clock of one process jumps at step 10, and both pause after the next step
        jump = [lambda t, row: setattr(clock, "ahead", 1e6 * (t.step == 10 and t.rank == 1))]
        for options in ({"after_eval": jump, "stop_after_s": 1e5}, {}):
            try:
                data = Data(rank=rank, world=world, parts=parts)
                train(folder / f"parts-{parts}", cfg, data, **(options if parts == 1 else {}))
            except Paused as e:
                facts["paused"] = str(e)
    facts["world"] = torch.distributed.get_world_size()
    try:
        data = Poisoned(rank=rank, world=world)
        train(folder / "poisoned", config(log_every=5), data)
    except TrajbookError as e:
        facts["stopped"] = str(e)
    atomic_write(folder / f"facts-{rank}.json", json.dumps(facts))
    torch.distributed.destroy_process_group()


class Poisoned(Data):
    def __next__(self):
        batch = super().__next__()
        if self.step == 3 and self.options["rank"] == 1:
            batch["x"][:] = np.nan
        return batch


if __name__ == "__main__":
    globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]))
