"""KVC003: caches of 16 bits and more, and twins that keep and read them in 8."""

import functools
from dataclasses import replace

import pytest
import torch
from findings.attention import Decoder, Stack, causal
from findings.situations import figures, graphs_of, situation
from fxroof.analyzer.finding import Confidence, registered
from fxroof.analyzer.memory import Memory
from fxroof.analyzer.rewrite import Draft
from fxroof.analyzer.scenario import Scenario
from fxroof.rules import kv_cache_reallocated_by_cat, wide_kv_cache  # noqa: F401  # register them
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "KVC003")
(GROWN,) = (r for r in registered() if r.code == "KVC001")
HEADS, KV_HEADS, WIDTH = 8, 4, 64
LONG = Scenario(batch_size=64, input_len=2048, output_len=64)
PACKED = {"fp8 cache": torch.float8_e4m3fn, "int8 cache": torch.int8}

# attention that reads a packed cache: shapes, and nothing to compute
_LIBRARY = torch.library.Library("fxroof", "FRAGMENT")
_LIBRARY.impl(
    _LIBRARY.define(
        "attention_packed_cache(Tensor query, Tensor key, Tensor value, Tensor key_scale, Tensor value_scale, "
        "Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, float? scale=None, bool enable_gqa=False) "
        "-> Tensor"
    ),
    lambda query, key, value, *_, **__: torch.empty_like(query),
    "Meta",
)


class Layer(nn.Module):
    packed = None

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH, bias=False, dtype=torch.bfloat16)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False, dtype=torch.bfloat16)
        if self.packed is not None:
            self.register_buffer("k_scale", torch.ones(KV_HEADS))
            self.register_buffer("v_scale", torch.ones(KV_HEADS))

    def split(self, x):
        batch, length, _ = x.shape
        parts = self.qkv(x).split([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH], dim=-1)
        return (t.view(batch, length, -1, WIDTH).transpose(1, 2) for t in parts)

    def attend(self, q, k, v, mask=None):
        if k.dtype != q.dtype:
            scales = (self.k_scale, self.v_scale)
            out = torch.ops.fxroof.attention_packed_cache(q, k, v, *scales, attn_mask=mask, enable_gqa=True)
        else:
            causal = q.shape[2] > 1 and mask is None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))

    def kept(self, *tensors):
        return tuple(t if self.packed is None else t.to(self.packed) for t in tensors)


class Growing(Layer):
    def forward(self, x, past):
        q, k, v = self.split(x)
        if past is None:
            return x + self.attend(q, k, v), self.kept(k, v)
        k, v = self.kept(k, v)
        k, v = torch.cat([past[0], k], dim=2), torch.concat((past[1], v), -2)
        return x + self.attend(q, k, v), (k, v)


class InPlace(Layer):
    """Slices of buffers that hold one position more than the context; what is written becomes what they are."""

    def forward(self, x, past):
        q, k, v = self.split(x)
        if past is None:
            return x + self.attend(q, k, v), self.kept(k, v)
        past[0][:, :, -1:] = k
        past[1][:, :, -1:] = v
        return x + self.attend(q, *past), past


class TokenMajor(Layer):
    """(B, T, H, D) in memory, seen as (B, H, T, D)."""

    def forward(self, x, past):
        q, k, v = self.split(x)
        new = tuple(t.transpose(1, 2) for t in (k, v))
        if past is None:
            return x + self.attend(q, k, v), self.kept(*new)
        past = tuple(torch.cat([old, t], dim=1) for old, t in zip(past, self.kept(*new), strict=True))
        return x + self.attend(q, *(t.transpose(1, 2) for t in past)), past


class Cross(Layer):
    """Keys and values of an encoder's result, made once and read in every step."""

    def forward(self, x, past):
        q, k, v = self.split(x)
        if past is None:
            return x + self.attend(q, k, v), self.kept(k, v)
        return x + self.attend(q, *past), past


def changed(graph, width, *rules, gpu="h100_sxm"):
    draft = Draft(graph)
    for rule in rules:
        for match in rule.check(situation(graph, gpu=gpu)):
            match.alternatives.get(width, match.rewrite)(draft)
    return draft.finish()


@functools.cache
def graphs(layer, packed=None, scenario=LONG):
    kind = type(layer.__name__, (layer,), {"packed": packed})
    return graphs_of(Stack([kind(), kind()]), scenario)


def decode(layer, packed=None, scenario=LONG):
    return graphs(layer, packed, scenario)["decode"]


@pytest.mark.parametrize("width", PACKED)
@pytest.mark.parametrize("layer", [Growing, InPlace, TokenMajor, Cross], ids=lambda c: c.__name__)
def test_each_width_is_the_trace_of_its_twin(layer, width):
    graph = decode(layer)
    found = list(RULE.check(situation(graph)))
    assert len(found) == 2
    assert {graph.ops[m.op].target for m in found} == {"aten.scaled_dot_product_attention.default"}
    assert all(m.confidence is Confidence.HIGH and set(m.alternatives) == {"int8 cache"} for m in found)
    ours, theirs = figures(changed(graph, width, RULE)), figures(decode(layer, PACKED[width]))
    assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}
    assert ours["bytes"] < 0.6 * figures(graph)["bytes"]


def test_what_is_saved_by_hand():
    """Half of what is read of the cache and of what is written to it, less the scales; 2 FLOPs a value that is read."""
    graph = decode(InPlace)
    before, after = figures(graph), figures(changed(graph, "fp8 cache", RULE))
    values = 2 * 2 * LONG.batch_size * KV_HEADS * LONG.context_len * WIDTH  # layers x (K, V) x ...
    rows, scales = values // LONG.context_len, 2 * 2 * KV_HEADS * 4
    assert before["bytes"] - after["bytes"] == values + rows - scales
    assert after["vector"] - before["vector"] == 2 * values
    assert after["FLOPs"] == before["FLOPs"]


@pytest.mark.parametrize("order", [(RULE, GROWN), (GROWN, RULE)], ids=["narrowed first", "in place first"])
def test_with_the_cache_in_place_it_is_the_trace_of_both_remedied(order):
    longer = Scenario(batch_size=64, input_len=2049, output_len=64)  # its cache has the position already
    theirs = figures(decode(InPlace, torch.float8_e4m3fn, longer))
    ours = figures(changed(decode(Growing), "fp8 cache", *order))
    assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


class Static(nn.Module):
    """Buffers of the model's own, with a mask over the positions in use."""

    def __init__(self, packed=None, write="index_copy_"):
        super().__init__()
        layer = type("Own", (Layer,), {"packed": packed})
        self.embed = nn.Embedding(500, HEADS * WIDTH, dtype=torch.bfloat16)
        self.layer, self.write = layer(), write
        self.head = nn.Linear(HEADS * WIDTH, 500, bias=False, dtype=torch.bfloat16)

    def setup_caches(self, max_batch_size, max_seq_length):
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        shape = (max_batch_size, KV_HEADS, max_seq_length, WIDTH)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(shape, dtype=self.layer.packed or torch.bfloat16))
        self.mask = torch.tril(torch.ones(max_seq_length, max_seq_length, dtype=torch.bool))

    def forward(self, idx, input_pos):
        x = self.embed(idx)
        q, k, v = self.layer.split(x)
        for cache, new in ((self.k_cache, k), (self.v_cache, v)):
            (new,) = self.layer.kept(new)
            if self.write == "index_copy_":
                cache.index_copy_(2, input_pos, new)
            else:
                cache[:, :, input_pos] = new
        return self.head(x + self.layer.attend(q, self.k_cache, self.v_cache, self.mask[input_pos][None, None]))


@pytest.mark.parametrize("write", ["index_copy_", "index_put_"])
def test_a_static_cache_is_the_trace_of_its_twin(write):
    graph = graphs_of(Static(write=write), LONG)["decode"]
    (found,) = RULE.check(situation(graph))
    assert found.confidence is Confidence.MEDIUM
    twin = graphs_of(Static(torch.float8_e4m3fn, write), LONG)["decode"]
    ours, theirs = figures(changed(graph, "fp8 cache", RULE)), figures(twin)
    assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


class Looked(Growing):
    """Something else reads the cache too."""

    def forward(self, x, past):
        x, (k, v) = super().forward(x, past)
        return x + k.mean(), (k, v)


class Repeated(Growing):
    def attend(self, q, k, v, mask=None):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.out(out.transpose(1, 2).flatten(2))


class SpeltOut(Growing):
    def attend(self, q, k, v, mask=None):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        return self.out(((q @ k.mT * WIDTH**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Widened(Growing):
    """A packed cache that is made wide again in memory before attention is packed already."""

    packed = torch.float8_e4m3fn

    def attend(self, q, k, v, mask=None):
        return super().attend(q, k.to(q.dtype), v.to(q.dtype))


@pytest.mark.parametrize("layer", [Looked, Repeated, SpeltOut], ids=lambda c: c.__name__)
def test_it_is_silent_where_others_read_the_cache(layer):
    assert not list(RULE.check(situation(decode(layer))))


@pytest.mark.parametrize("layer", [Growing, Widened], ids=lambda c: c.__name__)
def test_it_is_silent_where_the_cache_is_packed(layer):
    assert not list(RULE.check(situation(decode(layer, torch.float8_e4m3fn))))


def test_it_is_silent_in_prefill_and_where_launches_or_weights_set_the_pace():
    assert not list(RULE.check(situation(graphs(Growing)["prefill"])))
    short = Scenario(batch_size=2, input_len=512, output_len=64)
    assert not list(RULE.check(situation(decode(Growing, scenario=short))))
    assert not list(RULE.check(situation(traced("llama-3-8b").graphs["decode"])))


def test_only_widths_that_the_part_has_are_offered():
    graph = decode(Growing)
    assert not next(iter(RULE.check(situation(graph, gpu="a100_sxm_80gb")))).alternatives
    narrowed = changed(graph, "int8 cache", RULE, gpu="a100_sxm_80gb")
    assert any(t.dtype == "int8" for t in narrowed.tensors)


def test_heads_of_their_own_are_named_and_grouped_ones_are_not():
    (grouped, _) = RULE.check(situation(decode(Growing)))
    assert "GQA" not in grouped.remedy.text
    own = graphs_of(Decoder(causal), LONG)["decode"]
    assert all("GQA" in m.remedy.text for m in RULE.check(situation(own)))
    assert len(list(RULE.check(situation(own)))) == 2


def test_it_is_silent_without_a_cache():
    assert not [m for g in traced("nanogpt").graphs.values() for m in RULE.check(situation(g))]


def test_memory_at_the_end_of_the_generation_is_in_the_evidence():
    graph = decode(Growing)
    at_end = 2 * 2 * 64 * KV_HEADS * (2048 + 64) * WIDTH * 2
    known = Memory(
        weights_bytes=0, kv_cache_bytes=at_end, activations_bytes=0, overhead_bytes=0, total_bytes=0,
        usable_bytes=None, fits=None, headroom_bytes=None, max_batch_size=None, max_context_len=None, min_gpus=None,
        context_len=2112,
    )  # fmt: skip
    found = list(RULE.check(replace(situation(graph), memory=known)))
    assert sum(m.evidence["cache_bytes_at_the_end"] for m in found) == pytest.approx(at_end, rel=1e-6)
    assert sum(m.evidence["spared_bytes_at_the_end"] for m in found) == pytest.approx(at_end / 2, rel=1e-6)


def test_eight_bits_with_a_scale_a_head_attend_to_the_same():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 64) for n in (1, 96, 96))

    def narrowed(t):
        scale = t.abs().amax((0, 2, 3), keepdim=True) / 127
        return (t / scale).round().to(torch.int8) * scale

    out = F.scaled_dot_product_attention(q, narrowed(k), narrowed(v))
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=0.03)
