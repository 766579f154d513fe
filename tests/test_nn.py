"""trajbook.nn against independent implementations, and properties that no single example can show."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from trajbook import nn as tnn
from trajbook.core import TrajbookError

CLOSE = dict(atol=2e-5, rtol=1e-4)


def noise(*shape, key="x", **kw):
    return torch.randn(*shape, generator=tnn.torch_generator("test_nn", key), **kw)


def shake(module):
    "Random biases, gains and weights, so that a swapped or forgotten one is seen."
    g = tnn.torch_generator("shake")
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return module.eval()


# ---- independent implementations ------------------------------------------------------------


def test_sinusoidal_positions_follow_the_paper_entry_by_entry():
    p = tnn.sinusoidal_positions(50, 16)
    for t in (0, 1, 7, 49):
        for i in range(8):
            angle = t / 10_000 ** (2 * i / 16)
            assert abs(p[t, 2 * i] - math.sin(angle)) < 1e-5
            assert abs(p[t, 2 * i + 1] - math.cos(angle)) < 1e-5
    assert p.shape == (50, 16) and p.dtype == torch.float32


def test_rms_norm_agrees_with_llama_and_keeps_bfloat16():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours, theirs = shake(tnn.RMSNorm(48)), modeling.LlamaRMSNorm(48, eps=1e-6)
    theirs.load_state_dict(ours.state_dict())
    x = 30 * noise(3, 7, 48)
    assert_close(ours(x), theirs(x))
    b = x.bfloat16()
    assert ours.bfloat16()(b).dtype == torch.bfloat16
    assert_close(ours(b), theirs.bfloat16()(b))
    assert torch.isfinite(ours(torch.zeros_like(b))).all()


def test_rope_agrees_with_llama():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=4096)
    q, k = noise(2, 2, 9, 32, key="q"), noise(2, 2, 9, 32, key="k")
    positions = torch.arange(1000, 1009)
    cos, sin = modeling.LlamaRotaryEmbedding(config)(q, positions[None])
    want_q, want_k = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    angles = tnn.Rope(32)(positions)
    assert_close(tnn.apply_rope(q, *angles), want_q, **CLOSE)
    assert_close(tnn.apply_rope(k, *angles), want_k, **CLOSE)


def test_gated_mlp_agrees_with_llama():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    ours = shake(tnn.GatedMLP(32, 80, bias=False))
    theirs = modeling.LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=80))
    gate, up = ours.gate_up.weight.detach().chunk(2)
    theirs.load_state_dict(
        {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": ours.down.weight}
    )
    x = noise(2, 20, 32)
    assert_close(ours(x), theirs(x), **CLOSE)


def load_torch_layer(block):
    "PyTorch's own encoder layer with the weights of a default block."
    a, m = block.attention, block.mlp
    stock = nn.TransformerEncoderLayer(
        a.qkv.in_features,
        a.n_heads,
        m.up.out_features,
        0.0,
        "gelu",
        batch_first=True,
        norm_first=True,
    )
    pairs = {
        "self_attn.in_proj_weight": a.qkv.weight, "self_attn.in_proj_bias": a.qkv.bias,
        "self_attn.out_proj.weight": a.out.weight, "self_attn.out_proj.bias": a.out.bias,
        "linear1.weight": m.up.weight, "linear1.bias": m.up.bias,
        "linear2.weight": m.down.weight, "linear2.bias": m.down.bias,
        "norm1.weight": block.attention_norm.weight, "norm1.bias": block.attention_norm.bias,
        "norm2.weight": block.mlp_norm.weight, "norm2.bias": block.mlp_norm.bias,
    }  # fmt: skip
    stock.load_state_dict(pairs)
    return stock


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_encoder_agrees_with_torch_encoder(grad):
    ours = shake(tnn.Encoder(3, 32, 4, 96))
    stock = nn.TransformerEncoder(load_torch_layer(ours.blocks[0]), 3, nn.LayerNorm(32), False)
    stock.layers = nn.ModuleList(load_torch_layer(b) for b in ours.blocks)
    stock.norm.load_state_dict(ours.norm.state_dict())
    stock.eval()
    x = noise(2, 30, 32)
    is_padding = torch.arange(30) >= torch.tensor([[30], [19]])
    with torch.set_grad_enabled(grad):
        got, want = ours(x, is_padding), stock(x, src_key_padding_mask=is_padding)
        assert_close(got[~is_padding], want[~is_padding], **CLOSE)
    if grad:
        got[~is_padding].square().sum().backward()
        want[~is_padding].square().sum().backward()
        mine, other = ours.blocks[0].attention.qkv.weight.grad, stock.layers[0].self_attn
        assert_close(mine, other.in_proj_weight.grad, atol=1e-4, rtol=1e-3)


def test_causal_encoder_agrees_with_gpt2():
    transformers = pytest.importorskip("transformers")
    ours = shake(tnn.Encoder(2, 32, 4, 96, causal=True))
    config = transformers.GPT2Config(
        vocab_size=2, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=96,
        activation_function="gelu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    theirs = transformers.GPT2Model(config).eval()
    state = {"wpe.weight": torch.zeros(64, 32), "wte.weight": torch.zeros(2, 32)}
    names = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "mlp.up",
             "mlp.c_proj": "mlp.down", "ln_1": "attention_norm", "ln_2": "mlp_norm"}  # fmt: skip
    mine = ours.state_dict()
    for i in range(2):
        for there, here in names.items():
            w, b = (mine[f"blocks.{i}.{here}.{kind}"] for kind in ("weight", "bias"))
            state[f"h.{i}.{there}.weight"] = w.T if w.ndim == 2 else w
            state[f"h.{i}.{there}.bias"] = b
    state |= {f"ln_f.{kind}": mine[f"norm.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    x = noise(2, 40, 32)
    with torch.inference_mode():
        assert_close(ours(x), theirs(inputs_embeds=x).last_hidden_state, **CLOSE)


def test_rotary_gated_encoder_agrees_with_llama():
    transformers = pytest.importorskip("transformers")
    options = dict(causal=True, rope=True, norm="rms", mlp="swiglu", bias=False)
    ours = shake(tnn.Encoder(2, 32, 4, 80, **options))
    config = transformers.LlamaConfig(
        vocab_size=2, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.LlamaModel(config).eval()
    state = {"embed_tokens.weight": torch.zeros(2, 32), "norm.weight": ours.norm.weight}
    for i, b in enumerate(ours.blocks):
        q, k, v = b.attention.qkv.weight.chunk(3)
        gate, up = b.mlp.gate_up.weight.chunk(2)
        pairs = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": b.attention.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "mlp.down_proj": b.mlp.down.weight, "input_layernorm": b.attention_norm.weight,
                 "post_attention_layernorm": b.mlp_norm.weight}  # fmt: skip
        state |= {f"layers.{i}.{name}.weight": w for name, w in pairs.items()}
    theirs.load_state_dict(state)
    x = noise(2, 40, 32)
    with torch.inference_mode():
        assert_close(ours(x), theirs(inputs_embeds=x).last_hidden_state, **CLOSE)


# ---- properties -----------------------------------------------------------------------------

KINDS = {
    "gpt": dict(causal=True),
    "llama": dict(causal=True, rope=True, norm="rms", mlp="swiglu", bias=False),
}


@pytest.fixture(scope="module")
def causal_encoders():
    return {name: shake(tnn.Encoder(2, 16, 2, 32, **kw)) for name, kw in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(T=st.integers(2, 24), data=st.data())
def test_the_future_never_changes_the_past(causal_encoders, kind, T, data):
    t = data.draw(st.integers(1, T - 1))
    encoder, x = causal_encoders[kind], noise(2, T, 16)
    changed = torch.cat([x[:, :t], 50 * noise(2, T - t, 16, key="future")], 1)
    with torch.inference_mode():
        assert_close(encoder(changed)[:, :t], encoder(x)[:, :t], **CLOSE)
        assert not torch.allclose(encoder(changed)[:, t:], encoder(x)[:, t:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_cache_equals_recomputing_for_any_chunks(causal_encoders, kind, lengths):
    encoder, x = causal_encoders[kind], noise(2, sum(lengths), 16)
    cache = encoder.new_cache(sum(lengths))
    with torch.inference_mode():
        parts = [encoder(part, cache=cache) for part in x.split(lengths, 1)]
        assert_close(torch.cat(parts, 1), encoder(x), **CLOSE)


@settings(max_examples=25, deadline=None)
@given(real=st.integers(1, 20), extra=st.integers(0, 20), size=st.sampled_from([0.0, 1.0, 1e4]))
def test_padding_never_matters(real, extra, size):
    encoder = shake(tnn.Encoder(2, 16, 2, 32))
    x = torch.cat([noise(2, real, 16), size * noise(2, extra, 16, key="fill")], 1)
    is_padding = (torch.arange(real + extra) >= real).expand(2, -1)
    with torch.inference_mode():
        assert_close(encoder(x, is_padding)[:, :real], encoder(x[:, :real]), **CLOSE)


def test_cache_with_left_padding_equals_the_unpadded_sequence():
    encoder, x = shake(tnn.Encoder(2, 16, 2, 32, causal=True)), noise(1, 12, 16)
    is_padding = torch.arange(15)[None] < 3
    filled, cache = torch.cat([99 * torch.ones(1, 3, 16), x], 1), encoder.new_cache(15)
    with torch.inference_mode():
        first = encoder(filled[:, :10], is_padding[:, :10], cache)
        second = encoder(filled[:, 10:], is_padding, cache)
        assert_close(torch.cat([first, second], 1)[:, 3:], encoder(x), **CLOSE)


def test_a_sequence_that_is_all_padding_stays_finite_with_gradients():
    encoder = tnn.Encoder(1, 16, 2, 32, causal=True)
    x = noise(2, 6, 16).requires_grad_()
    is_padding = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    encoder(x, is_padding)[1, 2:].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert x.grad[0].abs().max() == 0 and x.grad[1, :2].abs().max() == 0


def test_dropout_acts_in_training_only():
    encoder, x = tnn.Encoder(1, 16, 2, 32, dropout=0.5, attention_dropout=0.5), noise(1, 8, 16)
    assert not torch.allclose(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_scaled_init_sizes_and_count():
    torch.manual_seed(0)
    encoder = tnn.Encoder(8, 64, 4, 256)
    for b in encoder.blocks:
        assert abs(b.attention.qkv.weight.std() * 8 - 1) < 0.05
        assert abs(b.mlp.down.weight.std() * 16 * 4 - 1) < 0.05  # sqrt(2 * 8 layers) = 4
        assert b.mlp.up.bias.abs().max() == 0
    assert tnn.count_parameters(encoder) == sum(p.numel() for p in encoder.parameters())
    tied = nn.ModuleList([encoder, encoder])
    assert tnn.count_parameters(tied) == tnn.count_parameters(encoder)


def test_flops_agree_with_torchs_own_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for mlp in ("gelu", "swiglu"):
        encoder = tnn.Encoder(2, 32, 4, 64, mlp=mlp)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoder(noise(1, 20, 32))
        assert sum(tnn.encoder_flops(2, 32, 64, 20, mlp).values()) == counter.get_total_flops()


def test_generator_depends_on_the_key_only():
    a = torch.rand(4, generator=tnn.torch_generator(3, "noise", 5))
    assert torch.equal(a, torch.rand(4, generator=tnn.torch_generator(3, "noise", 5)))
    assert not torch.equal(a, torch.rand(4, generator=tnn.torch_generator(3, "noise", 6)))
    assert not torch.equal(a, torch.rand(4, generator=tnn.torch_generator("3", "noise", 5)))


# ---- the fused linear layer -----------------------------------------------------------------

fused = pytest.mark.skipif(not tnn._ONEDNN_DTYPES, reason="oneDNN's fused layer is not there")


@fused
@pytest.mark.parametrize("shape", [(40, 24), (2, 40, 24), (2, 3, 40, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_linear_agrees_also_on_strided_input(shape, bias):
    layer = tnn.Linear(24, 56, bias, "gelu")
    for x in (
        noise(*shape),
        noise(*shape[:-1], 48)[..., ::2],
        noise(24, *shape[:-1]).movedim(0, -1),
    ):
        with torch.no_grad():
            assert tnn._fused_linear_fits(x, layer.weight)
            want = F.gelu(
                F.linear(
                    x.double(), layer.weight.double(), None if not bias else layer.bias.double()
                )
            )
            assert_close(layer(x).double(), want, **CLOSE)


@fused
def test_fused_linear_is_left_alone_where_it_would_be_wrong():
    layer, x = tnn.Linear(24, 56), noise(40, 24)
    assert not tnn._fused_linear_fits(x, layer.weight)  # gradients
    with torch.no_grad():
        assert tnn._fused_linear_fits(x, layer.weight)
        assert not tnn._fused_linear_fits(x[:1], layer.weight)  # too small
        assert not tnn._fused_linear_fits(x[:0], layer.weight)
        assert not tnn._fused_linear_fits(x.double(), layer.weight.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not tnn._fused_linear_fits(x, layer.weight)
            assert layer(x).dtype == torch.bfloat16
        assert layer(x[:0]).shape == (0, 56)


def test_encoder_can_be_exported():
    encoder, x = shake(tnn.Encoder(1, 16, 2, 32)), noise(2, 20, 16)
    with torch.no_grad():
        program = torch.export.export(encoder, (x,))
        assert not any("mkldnn" in str(n.target) for n in program.graph.nodes)
        assert_close(program.module()(x), encoder(x), **CLOSE)


def test_half_precision_stays_close():
    encoder, x = tnn.Encoder(2, 32, 4, 64).eval(), noise(2, 40, 32)
    with torch.inference_mode():
        want = encoder(x)
        with torch.autocast("cpu", torch.bfloat16):
            auto = encoder(x).float()
        half = encoder.bfloat16()(x.bfloat16()).float()
    assert (auto - want).abs().mean() < 0.02 and (half - want).abs().mean() < 0.03


# ---- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tnn.sinusoidal_positions(4, 5), "even width"),
        (lambda: tnn.Rope(7), "even head width"),
        (lambda: tnn.Attention(30, 4), "n_heads=4"),
        (lambda: tnn.Attention(30, 0), "n_heads=0"),
        (lambda: tnn.Block(16, 2, 32, norm="batch"), "'layer', 'rms'"),
        (lambda: tnn.Block(16, 2, 32, mlp="relu"), "'gelu', 'swiglu'"),
        (lambda: tnn.Linear(2, 2, activation="relu"), "'gelu'"),
        (lambda: tnn.Attention(16, 2)(noise(1, 4, 16), torch.zeros(1, 3).bool()), "3 of 4"),
        (lambda: tnn.Attention(16, 2)(noise(1, 4, 16), cache=tnn.KVCache(4)), "causal"),
        (lambda: tnn.encoder_flops(1, 16, 32, 4, "relu"), "'gelu', 'swiglu'"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(TrajbookError, match=words):
        call()


def test_a_full_cache_says_so():
    encoder = tnn.Encoder(1, 16, 2, 32, causal=True).eval()
    cache = encoder.new_cache(4)
    with torch.inference_mode():
        encoder(noise(1, 4, 16), cache=cache)
        with pytest.raises(TrajbookError, match="4 positions got 5"):
            encoder(noise(1, 1, 16), cache=cache)
