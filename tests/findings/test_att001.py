"""ATT001: attention spelt out in all manners, and the twin of each that calls one kernel."""

import importlib.util
import math
import re
import sys

import pytest
import torch
from findings.attention import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    WIDTH,
    Decoder,
    causal,
    fused,
    heads_first,
    tokens_first,
    traced_decoder,
)
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import Confidence, registered
from fxroof.analyzer.rewrite import Draft
from fxroof.rules import materialized_attention_scores  # noqa: F401  # registers it
from support import ROOT
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "ATT001")
SCALE = 1 / math.sqrt(HEAD_DIM)


def offset_of(q, k):
    return k.shape[1] - q.shape[1]


def visible(q, k):
    return torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(diagonal=offset_of(q, k))


def minus_infinity(q, k):
    full = torch.full((q.shape[1], k.shape[1]), float("-inf"), device=q.device, dtype=q.dtype)
    return full.triu(1 + offset_of(q, k))


def bidirectional(q, k, v):
    q, k, v = heads_first(q, k, v)
    return tokens_first((q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v)


def masked_fill_and_upcast(q, k, v):
    hidden = ~visible(q, k)
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD_DIM)
    scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return tokens_first(torch.matmul(F.dropout(probabilities, 0.1, training=False), v))


def additive_triu(q, k, v):
    mask = minus_infinity(q, k)
    q, k, v = heads_first(q, k, v)
    return tokens_first(F.softmax((q * SCALE) @ k.mT + mask, dim=-1) @ v)


def mask_before_scores(q, k, v):
    mask = minus_infinity(q, k)[None, None]
    q, k, v = heads_first(q, k, v)
    return tokens_first((mask + q @ (k * SCALE).permute(0, 1, 3, 2)).softmax(-1) @ v)


def where_with_smallest(q, k, v):
    kept = visible(q, k)
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(2, 3)) * SCALE
    smallest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return tokens_first(torch.where(kept, scores, smallest).softmax(-1).type_as(v) @ v)


def einsum_token_major(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    scores = scores + minus_infinity(q, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def einsum_heads_first(q, k, v):
    kept = visible(q, k)
    q, k, v = heads_first(q, k, v)
    scores = torch.einsum("...id,...jd->...ij", q, k) / HEAD_DIM**0.5
    weights = torch.softmax(scores.masked_fill(kept.logical_not(), -1e9), dim=-1)
    return tokens_first(torch.einsum("...ij,...jd->...id", weights, v))


def folded_bmm(q, k, v):
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    mask = minus_infinity(q, k)
    q, k, v = (t.transpose(1, 2).reshape(batch * HEADS, -1, HEAD_DIM) for t in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2))
    scores = scores.view(batch, HEADS, queries, keys) + mask
    weights = F.softmax(scores.view(batch * HEADS, queries, keys), dim=-1)
    out = torch.bmm(weights, v).view(batch, HEADS, queries, HEAD_DIM)
    return tokens_first(out)


def folded_baddbmm(q, k, v):
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    mask = minus_infinity(q, k)
    q, k, v = (t.transpose(1, 2).reshape(batch * HEADS, -1, HEAD_DIM) for t in (q, k, v))
    nothing = torch.empty(batch * HEADS, queries, keys, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=SCALE)
    out = torch.bmm((scores + mask).softmax(-1), v)
    return tokens_first(out.view(batch, HEADS, queries, HEAD_DIM))


def mask_in_baddbmm(q, k, v):
    batch, queries = q.shape[:2]
    mask = minus_infinity(q, k)
    q, k, v = (t.transpose(1, 2).reshape(batch * HEADS, -1, HEAD_DIM) for t in (q, k, v))
    out = torch.baddbmm(mask[None], q, k.mT, alpha=SCALE).softmax(-1) @ v
    return tokens_first(out.view(batch, HEADS, queries, HEAD_DIM))


def in_place(q, k, v):
    hidden = visible(q, k) == 0
    q, k, v = heads_first(q, k, v)
    scores = q @ k.mT
    scores *= SCALE
    scores.masked_fill_(hidden, float("-inf"))
    return tokens_first(scores.softmax(-1) @ v)


def positions_compared(q, k, v):
    rows = torch.arange(q.shape[1], device=q.device)[:, None] + offset_of(q, k)
    columns = torch.arange(k.shape[1], device=q.device)[None, :]
    mask = torch.zeros(q.shape[1], k.shape[1], dtype=q.dtype, device=q.device).masked_fill(columns > rows, -1e4)
    q, k, v = heads_first(q, k, v)
    return tokens_first((q @ k.mT * SCALE + mask[None, None]).softmax(-1) @ v)


def one_minus_mask(q, k, v):
    kept = visible(q, k).to(q.dtype)
    q, k, v = heads_first(q, k, v)
    scores = q @ k.mT / math.sqrt(HEAD_DIM) + (1.0 - kept) * torch.finfo(q.dtype).min
    return tokens_first(scores.softmax(-1) @ v)


def both_scaled(q, k, v):
    root = HEAD_DIM**-0.25
    kept = visible(q, k)
    q, k, v = heads_first(q * root, k * root, v)
    scores = (q @ k.transpose(-1, -2)).float()
    return tokens_first(scores.masked_fill(~kept, -torch.inf).softmax(-1).to(v.dtype) @ v)


def movedim_and_sqrt(q, k, v):
    mask = minus_infinity(q, k)
    q, k, v = (t.movedim(1, 2) for t in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / torch.sqrt(torch.tensor(float(HEAD_DIM)))
    out = (scores + mask).softmax(-1) @ v
    return out.permute(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)


def repeat_interleaved(q, k, v):
    q, k, v = heads_first(q, k, v)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    kept = torch.tril(torch.ones(q.shape[2], k.shape[2]), diagonal=k.shape[2] - q.shape[2])
    return tokens_first((q @ k.mT * SCALE).masked_fill(kept == 0, float("-inf")).softmax(-1) @ v)


def expanded_and_reshaped(q, k, v):
    batch, length = k.shape[:2]
    mask = minus_infinity(q, k)
    k, v = (
        t[:, :, :, None, :].expand(-1, -1, -1, HEADS // KV_HEADS, -1).reshape(batch, length, HEADS, HEAD_DIM)
        for t in (k, v)
    )
    q, k, v = heads_first(q, k, v)
    return tokens_first(torch.softmax(q @ k.mT * SCALE + mask, -1) @ v)


def one_kv_head_broadcast(q, k, v):
    mask = minus_infinity(q, k)
    q, k, v = heads_first(q, k, v)
    return tokens_first((q @ k.mT * SCALE + mask).softmax(-1) @ v)


def grouped_in_five_dimensions(q, k, v):
    mask = minus_infinity(q, k)
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    k, v = (t.transpose(1, 2).unsqueeze(2) for t in (k, v))
    out = (q @ k.mT * SCALE + mask).softmax(-1) @ v
    return out.permute(0, 3, 1, 2, 4).flatten(2)


SPELLINGS = {
    bidirectional: (lambda q, k, v: fused(q, k, v), HEADS),
    masked_fill_and_upcast: (causal, HEADS),
    additive_triu: (causal, HEADS),
    mask_before_scores: (causal, HEADS),
    where_with_smallest: (causal, HEADS),
    einsum_token_major: (causal, HEADS),
    einsum_heads_first: (causal, HEADS),
    folded_bmm: (causal, HEADS),
    folded_baddbmm: (causal, HEADS),
    mask_in_baddbmm: (causal, HEADS),
    in_place: (causal, HEADS),
    positions_compared: (causal, HEADS),
    one_minus_mask: (causal, HEADS),
    both_scaled: (causal, HEADS),
    movedim_and_sqrt: (causal, HEADS),
    repeat_interleaved: (causal, KV_HEADS),
    expanded_and_reshaped: (causal, KV_HEADS),
    one_kv_head_broadcast: (causal, 1),
    grouped_in_five_dimensions: (causal, KV_HEADS),
}


def agrees(graph, twin):
    ours, theirs = figures(graph), figures(twin)
    assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_becomes_its_twin(spelling):
    good, kv_heads = SPELLINGS[spelling]
    twins = traced_decoder(good, kv_heads)
    for phase, graph in traced_decoder(spelling, kv_heads).items():
        found = list(RULE.check(situation(graph)))
        assert [m.confidence for m in found] == [Confidence.HIGH] * 2, phase
        agrees(rewritten(graph, RULE), twins[phase])
        assert not list(RULE.check(situation(twins[phase])))


def unscaled(q, k, v):  # GPT-Neo
    q, k, v = heads_first(q, k, v)
    return tokens_first((q @ k.mT).softmax(-1) @ v)


def unscaled_twin(q, k, v):
    return fused(q, k, v, scale=1.0)


def scaled_by_a_half(q, k, v):
    q, k, v = heads_first(q, k, v)
    return tokens_first(((q / 2) @ k.mT).softmax(-1) @ v)


def scaled_by_a_half_twin(q, k, v):
    return fused(q, k, v, scale=0.5)


@pytest.mark.parametrize(
    ("bad", "good", "scale", "before"),
    [
        (unscaled, unscaled_twin, ", scale=1", False),
        (scaled_by_a_half, scaled_by_a_half_twin, ", scale=0.5", True),
        (bidirectional, fused, "", False),
        (additive_triu, causal, "", True),
    ],
)
def test_the_remedy_scales_as_the_program_does(bad, good, scale, before):
    graph, twin = (traced_decoder(attend)["prefill"] for attend in (bad, good))
    agrees(rewritten(graph, RULE), twin)
    for match in RULE.check(situation(graph)):
        assert re.findall(r", scale=[^,)]*", match.remedy.code) == ([scale] if scale else [])
        assert ("not scaled before" in match.remedy.text) == before
    q, k, v = (torch.randn(2, 5, HEADS, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(bad(q, k, v), good(q, k, v))


def sliding_window(q, k, v):
    q, k, v = heads_first(q, k, v)
    return tokens_first((q @ k.mT * SCALE).masked_fill(~in_window(q, k), float("-inf")).softmax(-1) @ v)


def in_window(q, k):
    length, offset = k.shape[2], k.shape[2] - q.shape[2]
    near = torch.arange(length)[None, :] > torch.arange(q.shape[2])[:, None] + offset - 128
    return near & (torch.arange(length)[None, :] <= torch.arange(q.shape[2])[:, None] + offset)


def windowed(q, k, v):
    return fused(q, k, v, attn_mask=in_window(*(t.transpose(1, 2) for t in (q, k))))


def test_a_known_mask_that_is_more_than_causal_is_kept():
    for phase, graph in traced_decoder(sliding_window).items():
        found = list(RULE.check(situation(graph)))
        assert [m.confidence for m in found] == [Confidence.HIGH] * 2
        assert all("more than causal" in m.message for m in found)
        agrees(rewritten(graph, RULE), traced_decoder(windowed)[phase])


def written_to(mask):
    mask = mask.clone()
    mask[0] = True
    return mask


def filled_through_a_view(mask):
    mask = mask.clone()
    view = mask[:, 1:]
    mask.fill_(True)
    return mask & F.pad(view, (1, 0), value=True)


NEAR_MISSES = {
    "one key more": (lambda ones: ones.tril(1), "more than causal"),
    "one key less": (lambda ones: ones.tril(-1), "more than causal"),
    "transposed": (lambda ones: ones.tril().mT, "more than causal"),
    "negated": (lambda ones: ~ones.tril(), "more than causal"),
    "window": (lambda ones: ones.tril().triu(-31), "more than causal"),
    "shifted": (lambda ones: ones.tril().roll(1, dims=0), "cannot be told"),
    "written to": (lambda ones: written_to(ones.tril()), "cannot be told"),
    "filled through a view": (lambda ones: filled_through_a_view(ones.tril()), "cannot be told"),
    "flipped": (lambda ones: ones.triu().flip(0), "cannot be told"),
}
HITS = {
    "two triangles": lambda ones: ones.tril(3) & ones.tril(),
    "transposed triangle": lambda ones: ones.triu().mT,
    "negated triangle": lambda ones: ~ones.triu(1),
    "slice of more": lambda ones: torch.ones(1024, 1024, dtype=torch.bool).tril()[: ones.shape[0], : ones.shape[1]],
    "rows and columns moved alike": lambda ones: torch.ones(1024, 1024).tril()[100:356, 100:356] == 1,
    "in place": lambda ones: ones.clone().tril_(),
    "numbers": lambda ones: torch.zeros(256, 256).sub(ones.triu(1).float() * 1e9) == 0,
    "side by side": lambda ones: torch.cat([ones[:, :0], ones.tril()], dim=-1),
}


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        ones = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        return (q.bfloat16() @ k.bfloat16().mT).masked_fill(~self.mask(ones), -torch.inf).softmax(-1) @ v.bfloat16()


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_mask_that_is_nearly_causal_is_kept(name):
    mask, words = NEAR_MISSES[name]
    (found,) = RULE.check(situation(traced(Masked(mask), *((2, 4, 256, 64),) * 3)))
    assert words in found.message
    assert "attn_mask" in found.remedy.code


@pytest.mark.parametrize("name", HITS)
def test_a_mask_that_is_causal_is_proved_to_be(name):
    assert HITS[name](torch.ones(256, 256, dtype=torch.bool)).equal(torch.ones(256, 256, dtype=torch.bool).tril())
    (found,) = RULE.check(situation(traced(Masked(HITS[name]), *((2, 4, 256, 64),) * 3)))
    assert "its causal mask hides" in found.message


class WithBuffer(nn.Module):
    """Attention whose mask is a buffer, of which a trace knows the size and no values."""

    def __init__(self, spelt_out, additive):
        super().__init__()
        self.decoder = Decoder(self.spelt_out if spelt_out else self.fused)
        full = torch.full((1024, 1024), float("-inf")).triu(1).bfloat16() if additive else torch.ones(1024, 1024).tril()
        self.register_buffer("mask", full)
        self.additive = additive

    def rows(self, q, k):
        return self.mask[k.shape[1] - q.shape[1] : k.shape[1], : k.shape[1]]

    def spelt_out(self, q, k, v):
        mask = self.rows(q, k)
        q, k, v = heads_first(q, k, v)
        scores = q @ k.mT * SCALE
        scores = scores + mask if self.additive else scores.masked_fill(mask == 0, float("-inf"))
        return tokens_first(scores.softmax(-1) @ v)

    def fused(self, q, k, v):
        mask = self.rows(q, k)
        return fused(q, k, v, attn_mask=mask if self.additive else mask != 0)

    def forward(self, tokens, cache=None):
        return self.decoder(tokens, cache)


@pytest.mark.parametrize("additive", [True, False])
def test_a_mask_of_unknown_values_is_kept_and_the_message_says_so(additive):
    twins = graphs_of(WithBuffer(False, additive))
    for phase, graph in graphs_of(WithBuffer(True, additive)).items():
        found = list(RULE.check(situation(graph)))
        assert [m.confidence for m in found] == [Confidence.MEDIUM] * 2
        assert all("cannot be told" in m.message for m in found)
        ours = rewritten(graph, RULE)
        if additive:
            agrees(ours, twins[phase])
        else:  # the twin compares the buffer in every layer, the remedied graph once
            assert figures(ours)["eager bound"] == pytest.approx(figures(twins[phase])["eager bound"], rel=0.01)


def bad_padding(q, k, v):
    kept = visible(q, k)
    lengths = q.float().mean((1, 2, 3)).long()
    padding = torch.arange(k.shape[1])[None] < lengths[:, None]
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.mT * SCALE).masked_fill(~kept, float("-inf"))
    return tokens_first(scores.masked_fill(~padding[:, None, None], float("-inf")).softmax(-1) @ v)


def good_padding(q, k, v):
    kept = visible(q, k)
    lengths = q.float().mean((1, 2, 3)).long()
    padding = torch.arange(k.shape[1])[None] < lengths[:, None]
    mask = padding[:, None, None]
    return fused(q, k, v, attn_mask=kept & mask if q.shape[1] > 1 else mask)


def test_several_masks_become_one():
    twins = traced_decoder(good_padding)
    for phase, graph in traced_decoder(bad_padding).items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == 2
        joined = ["join what is added and what is masked into one attn_mask" in m.remedy.text for m in found]
        assert joined == [phase == "prefill"] * 2
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


class CrossAttention(nn.Module):
    def __init__(self, spelt_out):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.latents = nn.Parameter(torch.zeros(1, 64, WIDTH))
        self.spelt_out = spelt_out
        self.to(torch.bfloat16)

    def forward(self, x):
        q = self.q(self.latents).expand(x.shape[0], -1, -1).unflatten(-1, (HEADS, HEAD_DIM))
        k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in self.kv(x.bfloat16()).chunk(2, dim=-1))
        return bidirectional(q, k, v) if self.spelt_out else fused(q, k, v)


def traced(module, *shapes):
    from fxroof.analyzer.meta import on_meta
    from fxroof.analyzer.trace import trace

    return trace(on_meta(module), tuple(torch.empty(shape, device="meta") for shape in shapes))


def test_cross_attention():
    graph = traced(CrossAttention(spelt_out=True), (2, 256, WIDTH))
    assert len(list(RULE.check(situation(graph)))) == 1
    agrees(rewritten(graph, RULE), traced(CrossAttention(spelt_out=False), (2, 256, WIDTH)))


class Windows(nn.Module):
    """Five dimensions: attention among the windows of a picture."""

    def __init__(self, spelt_out):
        super().__init__()
        self.qkv, self.spelt_out = nn.Linear(WIDTH, 3 * WIDTH), spelt_out
        self.to(torch.bfloat16)

    def forward(self, x):
        batch, windows, length, _ = x.shape
        q, k, v = self.qkv(x.bfloat16()).view(batch, windows, length, 3, HEADS, HEAD_DIM).permute(3, 0, 1, 4, 2, 5)
        if self.spelt_out:
            out = (q @ k.mT * SCALE).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v)))
            out = out.unflatten(0, (batch, windows))
        return out.transpose(2, 3).reshape(x.shape)


def test_any_number_of_leading_dimensions():
    shape = (2, 16, 49, WIDTH)
    graph = traced(Windows(spelt_out=True), shape)
    assert len(list(RULE.check(situation(graph)))) == 1
    agrees(rewritten(graph, RULE), traced(Windows(spelt_out=False), shape))


def test_it_takes_no_notice_of_what_others_did_first():
    """A rewrite leaves alone what another has claimed."""
    graph = traced_decoder(additive_triu)["prefill"]
    first, second = RULE.check(situation(graph))
    draft = Draft(graph)
    draft.claim({first.op})
    first.rewrite(draft)
    second.rewrite(draft)
    calls = [op for op in draft.finish().ops if op.target.startswith("aten.scaled_dot_product_attention")]
    assert len(calls) == 1


def test_it_composes_with_a_cache_written_in_place():
    """In either order, and to what a program has that was written with both."""
    from fxroof.rules import kv_cache_reallocated_by_cat  # noqa: F401  # registers it

    (other,) = (r for r in registered() if r.code == "KVC001")
    graph = traced_decoder(repeat_interleaved, KV_HEADS)["decode"]
    found = []
    for rules in ((RULE, other), (other, RULE)):
        draft = Draft(graph)
        for rule in rules:
            for match in rule.check(situation(graph)):
                match.rewrite(draft)
        found.append(figures(draft.finish()))
    assert found[0] == found[1]
    twin = figures(rewritten(traced_decoder(causal, KV_HEADS)["decode"], other))
    assert found[0] == {name: pytest.approx(value, rel=0.01) for name, value in twin.items()}


class Gating(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.down(self.gate(x).softmax(-1) * self.up(x))


class MatmulGating(nn.Module):
    """A mixture of learned rows: the products are with weights."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.zeros(64, 512)), nn.Parameter(torch.zeros(512, 64))

    def forward(self, x):
        return (x @ self.keys).softmax(-1) @ self.values


class LinearAttention(nn.Module):
    def forward(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Parameter(torch.zeros(64, 10))

    def forward(self, x):
        return (self.body(x).relu() @ self.head).softmax(-1)


class ShowsWeights(nn.Module):
    def forward(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights


class SoftCapped(nn.Module):
    def forward(self, q, k, v):
        return (torch.tanh(q @ k.mT / 50) * 50).softmax(-1) @ v


QKV = ((2, 4, 256, 64),) * 3


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (Gating(), ((2, 128, 64),)),
        (MatmulGating(), ((256, 64),)),
        (LinearAttention(), QKV),
        (Classifier(), ((128, 64),)),
        (ShowsWeights(), QKV),
        (SoftCapped(), QKV),
        (CrossAttention(spelt_out=False), ((2, 256, WIDTH),)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_it_is_silent(module, shapes):
    assert not list(RULE.check(situation(traced(module, *shapes))))


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def edited(tmp_path, path, name, *edits):
    """A module made of another's source with some of it replaced."""
    source = path.read_text()
    for pattern, text in edits:
        source, count = re.subn(pattern, text, source, flags=re.DOTALL)
        assert count == 1, pattern
    (tmp_path / f"{name}.py").write_text(source)
    return loaded(tmp_path / f"{name}.py", name)


def test_the_example(tmp_path):
    """Scores spelt out, heads repeated and a mask made with `tril`, which one line replaces."""
    path = ROOT / "examples" / "mymodel.py"
    bad = loaded(path, "att_example")
    call = "        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)\n\n"
    good = edited(
        tmp_path,
        path,
        "att_example_remedied",
        (r"        # every query head needs.*?(?=        out = out\.transpose)", call),
        (r"causal = torch\.ones\(.*?\)\.tril\(diagonal=start\)", "causal = None"),
    )
    graphs, twins = (
        graphs_of(m.GPT(m.GPTConfig(n_layers=2, dim=512, hidden_dim=1024, vocab_size=500)).eval()) for m in (bad, good)
    )
    for phase, graph in graphs.items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == 2
        assert {graph.ops[m.op].anchor.line for m in found} == {83}
        agrees(rewritten(graph, RULE), twins[phase])


def test_nanogpt(tmp_path):
    """Its mask is a persistent buffer, so it is kept; the library's own remedy passes `is_causal=True`."""
    path = ROOT / "tests" / "models" / "nanogpt_like.py"
    bad = loaded(path, "att_nanogpt")
    call = "            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, :, :T, :T] != 0)\n"
    good = edited(tmp_path, path, "att_nanogpt_remedied", (r"            att = \(q @.*?y = att @ v\n", call))
    graphs, twins = (graphs_of(m.GPT(m.GPTConfig(n_layer=1, vocab_size=500, flash=False)).eval()) for m in (bad, good))
    for phase, graph in graphs.items():
        found = list(RULE.check(situation(graph)))
        assert [m.confidence for m in found] == [Confidence.MEDIUM]
        agrees(rewritten(graph, RULE), twins[phase])


def test_transformers_eager_becomes_sdpa():
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(implementation):
        config = LlamaConfig(
            num_hidden_layers=2,
            hidden_size=512,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=1024,
            vocab_size=500,
            attn_implementation=implementation,
        )
        return graphs_of(LlamaForCausalLM(config).eval().to(torch.bfloat16))

    twins = llama("sdpa")
    for phase, graph in llama("eager").items():
        assert [m.confidence for m in RULE.check(situation(graph))] == [Confidence.HIGH] * 2
        agrees(rewritten(graph, RULE), twins[phase])


def test_grouped_heads_stay_repeated_where_no_kernel_takes_them_with_a_mask():
    """cuDNN takes a mask and grouped heads; on an A100 the kernel that takes a mask takes no grouped heads."""

    def repeated(q, k, v):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
        return sliding_window(q, k, v)

    graph = traced_decoder(repeated, KV_HEADS)["prefill"]
    assert all("enable_gqa" in m.remedy.code for m in RULE.check(situation(graph)))
    others = list(RULE.check(situation(graph, gpu="a100_sxm_80gb")))
    assert len(others) == 2
    assert not any("enable_gqa" in m.remedy.code for m in others)
