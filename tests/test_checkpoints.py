"""Checkpoints: what is written comes back to the last bit, and everything else is refused."""

import json
import os
import pickle
import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trajbook.checkpoint
from trajbook.checkpoint import (
    FORMAT,
    find_class,
    load,
    load_training_state,
    pack,
    read_header,
    rng_state,
    save_checkpoint,
    save_training_state,
    set_rng_state,
    unpack,
)
from trajbook.core import TrajbookError

ABOUT = {
    "inputs": {"x": {"shape": ["B", "D"], "dtype": "float32", "unit": "m"}},
    "outputs": {"y": {"shape": ["B", "D"], "dtype": "float32", "unit": "1"}},
}


@dataclass(frozen=True)
class NetConfig:
    width: int = 4
    layers: int = 2
    tied: bool = False


class Net(nn.Module):
    Config = NetConfig

    def __init__(self, config):
        super().__init__()
        if config.width < 1:
            raise ValueError("width must be positive")
        self.config = config
        self.layers = nn.ModuleList(
            nn.Linear(config.width, config.width) for _ in range(config.layers)
        )
        if config.tied:
            self.layers[1].weight = self.layers[0].weight
        self.register_buffer("mean", torch.arange(config.width, dtype=torch.float32))
        self.register_buffer("seen", torch.tensor(3, dtype=torch.int64))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x - self.mean)
        return x


Net.__module__ = "trajbook._test_model"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    module = types.ModuleType("trajbook._test_model")
    module.Net, module.Plain = Net, nn.Linear
    monkeypatch.setitem(sys.modules, "trajbook._test_model", module)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "net", Net(NetConfig()), method="test", **ABOUT)


def edit(path, **changes):
    "Change fields of a header, keeping the rest."
    header = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(header))


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_needs_only_the_folder(tmp_path, tied):
    torch.manual_seed(1)
    net = Net(NetConfig(width=5, tied=tied))
    statistics = {"mean": [0.0, 1.5], "std": [1.0, 2.0]}
    path = save_checkpoint(
        tmp_path / "a", net, method="test", normalizer=statistics, extra={"seed": 1}, **ABOUT
    )
    state = torch.get_rng_state()
    back = load(path, method="test")
    assert torch.equal(state, torch.get_rng_state())
    assert back.config == net.config and not back.training
    for name, value in net.state_dict().items():
        assert (
            torch.equal(back.state_dict()[name], value)
            and value.dtype == back.state_dict()[name].dtype
        )
    assert (back.layers[0].weight is back.layers[1].weight) == tied
    header = read_header(path)
    assert header["normalizer"] == statistics and header["extra"] == {"seed": 1}
    assert header["inputs"] == ABOUT["inputs"] and header["format"] == FORMAT


def test_same_weights_are_the_same_bytes_and_a_folder_is_replaced(tmp_path, saved):
    net = load(saved)
    other = save_checkpoint(tmp_path / "other", net, method="test", **ABOUT)
    for name in ("model.safetensors", "config.json"):
        assert (other / name).read_bytes() == (saved / name).read_bytes()
    with torch.no_grad():
        net.mean += 1
    save_checkpoint(saved, net, method="test", **ABOUT)
    assert load(saved).mean[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "other"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("os:system", "may only name a model of trajbook"),
        ("torch.nn:Linear", "may only name a model of trajbook"),
        ("trajbook_evil.model:Net", "may only name a model of trajbook"),
        ("trajbook:Net", "may only name a model of trajbook"),
        ("trajbook.__main__:Net", "may only name a model of trajbook"),
        ("trajbook..core:Net", "may only name a model of trajbook"),
        ("trajbook.core:Path.home", "may only name a model of trajbook"),
        ("trajbook._test_model:Net\n", "may only name a model of trajbook"),
        ("trajbook._test_model:" + "N" * 100_000, "has no model"),
        ("trajbook.not_there:Net", "has no model"),
        ("trajbook._test_model:Plain", "is not a model that a checkpoint may name"),
        ("trajbook.core:progress", "is not a model that a checkpoint may name"),
        ("trajbook.config:TrainConfig", "is not a model that a checkpoint may name"),
    ],
)
def test_hostile_class(saved, name, words):
    edit(saved, **{"class": name})
    with pytest.raises(TrajbookError, match=words) as error:
        load(saved)
    one_sentence(error)


def test_only_models_of_trajbook_are_written(tmp_path):
    with pytest.raises(TrajbookError, match="may only name a model of trajbook"):
        save_checkpoint(tmp_path / "x", nn.Linear(1, 1), method="test", **ABOUT)
    assert not list(tmp_path.iterdir()) and find_class("trajbook._test_model:Net") is Net


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": FORMAT + 1}, "was written by a newer trajbook: format 2"),
        ({"format": "1"}, "has no format number"),
        ({"format": True}, "has no format number"),
        ({"method": "other"}, "of the method 'other', not 'test'"),
        ({"method": None}, "lacks the field 'method'"),
        ({"model": [1]}, "lacks the field 'model'"),
        ({"model": {"width": 5}}, "with shape .4,., and the model needs .5,."),
        ({"model": {"layers": 1}}, "has 2 tensors that the model does not have"),
        ({"model": {"layers": 3}}, "lacks 2 tensors that the model has"),
        ({"model": {"width": 0}}, "cannot be built from its config"),
        ({"model": {"width": 10**6}}, "cannot be built from its config"),
        ({"model": {"layers": 10**9, "width": 100}}, "cannot be built from its config"),
        ({"model": {"widht": 4}}, "widht"),
        ({"model": {"width": "four"}}, "width"),
        ({"sha256": "0" * 64}, "its SHA-256 is another"),
    ],
)
def test_header_that_does_not_fit(saved, changes, words):
    edit(saved, **changes)
    with pytest.raises(TrajbookError, match=words) as error:
        load(saved, method="test")
    one_sentence(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format": NaN}', "not JSON"),
        (b'{"format": 1, "x": -Infinity}', "not JSON"),
        (b'{"format": 1', "not JSON"),
        (b"[1, 2]", "no format number"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"format": 1, "x": "' + b"a" * 17_000_000 + b'"}', "is larger than"),
    ],
)
def test_hostile_json(saved, content, words):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(TrajbookError, match=words) as error:
        load(saved)
    one_sentence(error)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


def weights_files():
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    yield "pickle", pickle.dumps(Evil()), "never opens"
    yield "empty", b"", "cut off"
    yield "header of 2**60 bytes", struct.pack("<Q", 2**60) + b"{}", "cut off or damaged"
    yield "header of 90 MB, not there", struct.pack("<Q", 90_000_000) + b"{}", "cut off or damaged"
    yield "not JSON", struct.pack("<Q", 4) + b"nope", "cut off or damaged"
    yield "other tensors", struct.pack("<Q", len(header)) + header + bytes(16), "tensors that"
    overlapping = header.replace(b"[0, 16]", b"[0, 99]")
    yield "offsets", struct.pack("<Q", len(overlapping)) + overlapping + bytes(16), "damaged"


@pytest.mark.parametrize(("case", "content", "words"), list(weights_files()))
def test_hostile_weights(saved, tmp_path, monkeypatch, case, content, words):
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(TrajbookError, match=words) as error:
        load(saved)
    one_sentence(error)
    assert not (tmp_path / "pickle-was-run").exists()


def test_renamed_torch_save_is_never_unpickled(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, saved / "model.safetensors")
    with pytest.raises(TrajbookError, match="never opens"):
        load(saved)
    assert not (tmp_path / "pickle-was-run").exists()


def test_cut_off_and_changed_anywhere(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    for i in range(0, len(whole), 17):
        file.write_bytes(whole[:i])
        with pytest.raises(TrajbookError, match="cut off"):
            load(saved)
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        with pytest.raises(TrajbookError):
            load(saved)
    file.write_bytes(whole)
    load(saved)


def test_missing_parts(tmp_path, saved):
    for path, words in [
        (tmp_path / "nowhere", "there is no such folder"),
        (saved / "config.json", "there is no such folder"),
        (tmp_path, "it has no config.json"),
    ]:
        with pytest.raises(TrajbookError, match=words) as error:
            load(path)
        one_sentence(error)
    (saved / "model.safetensors").unlink()
    with pytest.raises(TrajbookError, match="cannot be read: no such file"):
        load(saved)


def test_a_failed_write_leaves_the_old_checkpoint(saved, tmp_path):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(TrajbookError):
        save_checkpoint(saved, Net(NetConfig()), method="test", extra={"x": float("nan")}, **ABOUT)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajbookError, match="cannot write") as error:
        save_checkpoint(tmp_path / "file" / "net", Net(NetConfig()), method="test", **ABOUT)
    one_sentence(error)


def same(a, b) -> bool:
    "Equal in value, type, data type and order."
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        )
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from(["float32", "int64", "bool", "uint32"]).map(lambda d: np.arange(3).astype(d))
    | st.sampled_from([torch.bfloat16, torch.int32, torch.bool, torch.float64]).map(
        lambda d: torch.arange(3).to(d)
    )
    | st.just(torch.tensor(2.5)) | st.just(torch.zeros(0, 3))
)  # fmt: skip
keys = st.text(max_size=2) | st.integers(0, 3) | st.just("$")
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(nested)
def test_any_state_survives_packing(state):
    tensors = {}
    packed = json.loads(json.dumps(pack(state, tensors), allow_nan=False))
    assert same(unpack(packed, tensors), state)


def test_training_state_on_disk(tmp_path):
    set_rng_state(rng_state())
    generator = np.random.default_rng(3)
    net = Net(NetConfig())
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "numpy": generator.bit_generator.state}
    state |= {
        "rng": rng_state(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "inf": -np.inf,
    }
    path = save_training_state(tmp_path / "state-1", state, {"step": 1})
    back, meta = load_training_state(path)
    assert same(back, state) and meta == {"step": 1}
    with pytest.raises(TrajbookError, match="it has no config.json"):
        load(path)
    tree = json.loads((path / "state.json").read_text())
    tree["state"]["rng"]["torch"]["value"] = "no such tensor"
    (path / "state.json").write_text(json.dumps(tree))
    with pytest.raises(TrajbookError, match="does not fit its tensors"):
        load_training_state(path)
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)
    with pytest.raises(TrajbookError, match="its SHA-256 is another"):
        load_training_state(path)


def test_the_module_has_no_way_to_unpickle():
    source = Path(trajbook.checkpoint.__file__).read_text()
    assert "read_tensors" in source
    assert not any(word in source for word in ("import pickle", "torch.load", "weights_only"))
