"""The benchmark's statistics, its form, and a floor under the speed that the book promises."""

import builtins
import dataclasses
import importlib.util
import json
import statistics

import numpy as np
import pytest
import torch

from trajbook.apps import bench
from trajbook.core import TrajbookError
from trajbook.mae.model import TrajectoryMAE
from trajbook.nn import Encoder, one_thread

SIZE = {"window": 24, "n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 64}
SMALL = bench.document_network(**SIZE, decoder_hidden=(64, 32))
HEADLINE = {
    "forward_fp32_vs_torch_encoder_fastpath_off", "forward_fp32_vs_torch_encoder",
    "forward_fp32_vs_bert_sdpa", "forward_bf16_vs_torch_encoder", "train_bf16_vs_torch_encoder",
    "forward_fp32_share_of_matmul_peak", "forward_bf16_share_of_matmul_peak",
    "full_vs_asymmetric_time",
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return bench.run_bench("mae", rounds=2, network=SMALL, peak_n=64)


def test_every_headline_key_is_there_and_the_form_is_right(result):
    assert set(result["ratios"]) >= HEADLINE
    assert "cpu" in result["hardware"] and result["threads"] == 1
    for key, r in result["ratios"].items():
        if r is None:
            assert result["reasons"][key]
        else:
            assert set(r) == {"value", "lo", "hi"} and 0 < r["lo"] <= r["value"] <= r["hi"]
    assert result == json.loads(json.dumps(result, allow_nan=False))


def test_bf16_headline_needs_amx(monkeypatch):
    keys = [k for k in HEADLINE if "bf16" in k]
    for support, measured, further in (("avx512", False, True), (None, False, False)):
        monkeypatch.setattr(bench, "bf16_support", lambda device="cpu", s=support: s)
        suite = bench.mae_suite(network=SMALL, peak_n=64)
        found = bench.evaluate_suite(suite, dict.fromkeys(suite.sides, [1.0, 1.0]))
        assert all((found["ratios"][k] is not None) == measured for k in keys)
        assert all((f"{k}.avx512" in found["ratios"]) == further for k in keys)
        assert all("AMX" in found["reasons"][k] for k in keys)
    monkeypatch.setattr(bench, "bf16_support", lambda device="cpu": "native")
    suite = bench.mae_suite(network=SMALL, peak_n=64)
    found = bench.evaluate_suite(suite, dict.fromkeys(suite.sides, [1.0, 1.0]))
    assert not found["reasons"] and set(found["ratios"]) >= HEADLINE


def test_without_transformers_the_key_is_null_with_a_reason(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util,
        "find_spec",
        lambda n, *a: None if n == "transformers" else find(n, *a),
    )
    suite = bench.mae_suite(network=SMALL, peak_n=64)
    found = bench.evaluate_suite(suite, dict.fromkeys(suite.sides, [1.0, 1.0]))
    assert found["ratios"]["forward_fp32_vs_bert_sdpa"] is None
    assert "transformers" in found["reasons"]["forward_fp32_vs_bert_sdpa"]
    assert found["ratios"]["forward_fp32_vs_torch_encoder"]["value"] == 1.0


def test_importing_the_module_does_not_import_transformers(monkeypatch):
    real = builtins.__import__

    def guard(name, *args, **kw):
        assert not name.startswith("transformers"), name
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", guard)
    spec = importlib.util.find_spec("trajbook.apps.bench")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_all_sides_have_equal_size():
    s = bench.document_network(window=20)
    assert (s.patch, s.asymmetric, s.decoder_hidden) == (1, False, (1024, 512))
    ours = sum(p.numel() for p in TrajectoryMAE(s).encoder.parameters())
    stock = sum(p.numel() for p in bench.torch_encoder(s).parameters())
    pytest.importorskip("transformers")
    bert = sum(p.numel() for p in bench.BertSdpa(s).parameters())
    assert ours == stock == 4_739_072
    assert bert == ours - 2 * s.d_model  # post-norm: no final norm after the last layer


def test_work_agrees_with_torchs_own_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for network in (SMALL, dataclasses.replace(SMALL, patch=6)):
        model, motion = TrajectoryMAE(network), bench.motion_with_holes(network, 2)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*motion)
        assert counter.get_total_flops() == 2 * bench.forward_flops(network)


def test_what_is_timed_is_the_exported_model():
    suite = bench.mae_suite(network=SMALL, peak_n=32)
    inside = lambda side: next(  # noqa: E731
        c.cell_contents for c in side.__closure__ if isinstance(c.cell_contents, torch.nn.Module)
    )
    models = {n: inside(s) for n, s in suite.sides.items() if n.split(".")[0] in ("ours", "torch")}
    assert {type(m) for m in models.values()} == {TrajectoryMAE}
    assert {type(m.encoder) for n, m in models.items() if n.startswith("ours")} == {Encoder}
    assert not models["ours.fp32"].training and models["ours.fp32"].config == SMALL


def test_interval_covers_a_known_ratio():
    g, inside = np.random.default_rng(0), 0
    for _ in range(200):
        over, under = 2 * g.lognormal(0, 0.1, 9), g.lognormal(0, 0.1, 9)
        r = bench.time_ratio(list(over), list(under), n=300)
        inside += r["lo"] <= 2 <= r["hi"]
    assert inside > 170
    one = bench.time_ratio([3.0], [2.0], factor=4)
    assert one == {"value": 6.0, "lo": 6.0, "hi": 6.0}


def test_switches_are_put_back():
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), one_thread(), bench.fastpath_off():
        assert torch.get_num_threads() == 1 and not torch.backends.mha.get_fastpath_enabled()
        1 / 0  # noqa: B018
    assert (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()) == (threads, fast)


def test_every_trajectory_has_as_many_holes():
    states, is_masked = bench.motion_with_holes(SMALL, 5)
    assert states.shape == (5, 24, 4) and (is_masked.sum(1) == 18).all()


def test_ours_trains_like_torchs_encoder_with_the_same_weights():
    torch.manual_seed(0)
    ours = TrajectoryMAE(SMALL)
    stock = bench.with_encoder(SMALL, bench.torch_encoder(SMALL))
    weights = ours.state_dict()
    parts = ("attention.", "mlp.", "attention_norm.", "mlp_norm.")
    values = [v for p in parts for k, v in weights.items() if k.startswith(f"encoder.blocks.0.{p}")]
    values += [weights["encoder.norm.weight"], weights["encoder.norm.bias"]]
    names = list(stock.encoder.state_dict())
    stock.encoder.load_state_dict(dict(zip(names, values, strict=True)))
    rest = {k: v for k, v in weights.items() if not k.startswith("encoder")}
    stock.load_state_dict(rest, strict=False)
    states, _ = bench.motion_with_holes(SMALL, 2)
    steps = [bench.train_side(m, states) for m in (ours, stock)]
    losses = np.array([[float(step()) for step in steps] for _ in range(3)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)
    assert losses[-1, 0] < losses[0, 0]


def test_kept_results_are_read_back(result, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAJBOOK_RESULTS", str(tmp_path))
    with pytest.raises(TrajbookError, match="trajbook bench mae"):
        bench.read_bench("mae")
    assert bench.write_bench(result) == tmp_path / "bench" / "mae-cpu.json"
    assert bench.read_bench("mae") == result
    assert bench.bench_path("mae", "cuda").name == "mae-gpu.json"
    text = str(bench.bench_table(result))
    assert all(f"`{k}`" in text for k in HEADLINE)
    for draw in (bench.ratio_picture, bench.speed_picture, bench.shares_picture):
        assert draw(result).png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(method="maee"), "'maee'"),
        (dict(device="tpu"), "'tpu'"),
        (dict(rounds=0), "at least 1"),
        pytest.param(
            dict(device="cuda"), "'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU"),
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, words):
    with pytest.raises(TrajbookError, match=words):
        bench.run_bench(**options)


def test_json_text():
    text = bench.run_bench("mae", rounds=1, as_json=True, network=SMALL, peak_n=32)
    assert set(json.loads(text)["ratios"]) >= HEADLINE


@pytest.mark.slow
def test_forward_pass_is_faster_than_torchs_encoder():
    s = bench.document_network(n_layers=2)
    with one_thread():
        motion = bench.motion_with_holes(s, 2)
        peers = {"ours": TrajectoryMAE(s), "torch": bench.with_encoder(s, bench.torch_encoder(s))}
        sides = {name: bench.forward_side(m, *motion) for name, m in peers.items()}
        sides["peak"] = bench.matmul_side(torch.float32)
        times = {k: statistics.median(v) for k, v in bench.measure(sides, 5).items()}
    assert times["torch"] / times["ours"] > 1.25  # promised for six layers on a quiet core: 1.5
    assert 2 * bench.forward_flops(s) / (2 * 2048**3) * times["peak"] / times["ours"] > 0.5  # 0.62


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_bench():
    found = bench.run_bench("mae", "cuda", rounds=2, network=SMALL, peak_n=256)
    assert all(found["ratios"][k] is not None for k in HEADLINE if "bert" not in k)
