"""ATT002: calls that the fast kernels refuse, and the twin without the obstacle."""

import pytest
import torch
from findings.attention import HEAD_DIM, HEADS, KV_HEADS, Decoder, causal, fused, traced_decoder
from findings.situations import figures, graphs_of, situation
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.finding import Confidence, registered
from fxroof.analyzer.meta import on_meta
from fxroof.analyzer.rewrite import Draft
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import load
from fxroof.rules import attention_falls_off_flash  # noqa: F401  # registers it
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "ATT002")


def rewritten(graph, gpu="h100_sxm"):
    draft = Draft(graph)
    for match in RULE.check(situation(graph, gpu=gpu)):
        match.rewrite(draft)
    return draft.finish()


def agrees(graph, twin, gpu="h100_sxm"):
    if gpu == "h100_sxm":
        ours, theirs = figures(graph), figures(twin)
        assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}
    for execution in ("eager", "compiled"):
        (ours, _), (theirs, _) = (analyze_phase(g, load(gpu).gpu, execution) for g in (graph, twin))
        assert ours.seconds.bound == pytest.approx(theirs.seconds.bound, rel=0.01)
        assert ours.bytes.total == pytest.approx(theirs.bytes.total, rel=0.01)


def boolean(q, k, v):
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    return fused(q, k, v, attn_mask=mask)


def additive(q, k, v):
    full = torch.full((q.shape[1], k.shape[1]), float("-inf"), device=q.device, dtype=q.dtype)
    return fused(q, k, v, attn_mask=full.triu(k.shape[1] - q.shape[1] + 1)[None, None])


def compared(q, k, v):
    rows = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    return fused(q, k, v, attn_mask=(rows[:, None] >= torch.arange(k.shape[1], device=q.device))[None, None])


@pytest.mark.parametrize("gpu", ["h100_sxm", "a100_sxm_80gb", "l4"])
@pytest.mark.parametrize("spelling", [boolean, additive, compared], ids=lambda f: f.__name__)
def test_a_mask_that_is_causal_becomes_an_argument(spelling, gpu):
    twins = traced_decoder(causal)
    for phase, graph in traced_decoder(spelling).items():
        found = list(RULE.check(situation(graph, gpu=gpu)))
        assert [m.confidence for m in found] == [Confidence.HIGH] * 2
        words = "exactly causal" if phase == "prefill" else "hides nothing"
        assert all(words in m.message for m in found)
        agrees(rewritten(graph, gpu), twins[phase], gpu)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


def traced(function, *shapes, dtype=torch.bfloat16):
    inputs = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return trace(on_meta(Call(function)), inputs)


def sdpa(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def one_type_down(q, k, v):
    return sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True).float()


def padded(q, k, v):
    q, k, v = (F.pad(t, (0, 80 - t.shape[-1])) for t in (q, k, v))
    return sdpa(q, k, v, scale=76**-0.5)[..., :76]


def unsqueezed(q, k, v):
    return sdpa(q[None], k[None], v[None])[0]


def loose(q, k, v):
    return sdpa(*(t.mT for t in (q, k, v)))


def tight(q, k, v):
    return sdpa(*(t.mT.contiguous() for t in (q, k, v)))


def grouped(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)


def ungrouped(q, k, v, mask):
    k, v = (t.repeat_interleave(4, dim=1) for t in (k, v))
    return sdpa(q, k, v, attn_mask=mask)


SHAPE, LONG = (2, HEADS, 512, HEAD_DIM), (8, HEADS, 8192, HEAD_DIM)
KV = (2, 2, 512, HEAD_DIM)
UNEVEN = ((2, HEADS, 8192, 76),) * 2 + ((2, HEADS, 8192, 72),)


@pytest.mark.parametrize(
    ("bad", "good", "shapes", "dtype", "gpu", "confidence", "words"),
    [
        (
            lambda q, k, v: sdpa(q, k, v, is_causal=True), one_type_down, (LONG,) * 3, torch.float32, "h100_sxm",
            Confidence.MEDIUM, "float32 instead of",
        ),
        (
            lambda q, k, v: sdpa(q, k, v, is_causal=True), one_type_down, (LONG,) * 3, torch.float32, "a100_sxm_80gb",
            Confidence.MEDIUM, "float32 instead of",
        ),
        (sdpa, unsqueezed, (SHAPE[1:],) * 3, torch.bfloat16, "h100_sxm", Confidence.HIGH, "3 dimensions"),
        (loose, tight, ((2, HEADS, HEAD_DIM, 512),) * 3, torch.bfloat16, "h100_sxm", Confidence.HIGH, "not contiguous"),
        (
            grouped, ungrouped, (SHAPE, KV, KV, (512, 512)), torch.bfloat16, "a100_sxm_80gb", Confidence.HIGH,
            "2 KV heads for 8 query heads",
        ),
        (
            sdpa, lambda q, k, v: padded(q, k, v)[..., :72], UNEVEN, torch.bfloat16, "a100_sxm_80gb", Confidence.MEDIUM,
            "differ",
        ),
    ],
    ids=["32-bit", "32-bit on A100", "three dimensions", "loose", "grouped and masked", "padded"],
)  # fmt: skip
def test_each_obstacle_is_named_and_removed(bad, good, shapes, dtype, gpu, confidence, words):
    graph, twin = (traced(f, *shapes, dtype=dtype) for f in (bad, good))
    (found,) = RULE.check(situation(graph, gpu=gpu))
    assert words in found.message
    assert found.confidence is confidence
    assert {op.target.split(".")[1] for op in rewritten(graph, gpu).ops} >= {"scaled_dot_product_attention"}
    agrees(rewritten(graph, gpu), twin, gpu)


def test_a_change_that_costs_more_than_it_gains_is_not_told_of():
    """Grouped heads in 32 bits run unfused: repeating them pays in prefill; a decode step reads its cache once."""
    graphs = graphs_of(Decoder(causal, KV_HEADS, torch.float32), Scenario(batch_size=8, input_len=4096, output_len=64))
    (found, _) = RULE.check(situation(graphs["prefill"], gpu="rtx_4090"))
    assert "epeat the KV heads" in found.remedy.text
    assert "repeat_interleave" in found.remedy.code
    assert not list(RULE.check(situation(graphs["decode"], gpu="rtx_4090")))
    short = traced(lambda q, k, v: sdpa(q, k, v, is_causal=True), *((1, 1, 16, 64),) * 3, dtype=torch.float32)
    assert not list(RULE.check(situation(short)))


def masked(q, k, v):
    return fused(q, k, v, attn_mask=q.float().mean((2, 3))[:, None, :, None].expand(-1, 1, -1, k.shape[1]) > 0)


@pytest.mark.parametrize("gpu", ["h100_sxm", "a100_sxm_80gb", "mi300x"])
def test_it_is_silent(gpu):
    """On fast calls, and on a mask of which nothing is known."""
    for attention, kv_heads in ((causal, HEADS), (causal, KV_HEADS), (masked, HEADS)):
        for graph in traced_decoder(attention, kv_heads).values():
            assert not list(RULE.check(situation(graph, gpu=gpu)))
