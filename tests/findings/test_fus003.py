"""FUS003: rotary embeddings that are spelt out; what one kernel for them moves is what a compiler's kernel moves."""

import pytest
import torch
from findings.situations import H100, graphs_of, rewritten, situation
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.finding import registered
from fxroof.rules import decomposed_rotary  # noqa: F401  # registers it
from support import traced
from torch import nn

(RULE,) = (r for r in registered() if r.code == "FUS003")
BATCH, HEADS, LENGTH, DIM = 4, 8, 512, 64
ROWS = 2 * BATCH * HEADS * LENGTH * DIM
TABLE = 2 * LENGTH * DIM


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def llama(x, cos, sin):  # transformers
    return x * cos + rotate_half(x) * sin


def by_chunk(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-x2, x1), dim=-1) * sin)


def in_float32(x, cos, sin):
    h = x.float()
    return (h * cos.float() + rotate_half(h) * sin.float()).to(x.dtype)


def every_two(x, cos, sin):  # GPT-J
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def minus_the_other(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos - torch.cat((x2, -x1), dim=-1) * sin


def halves(x, cos, sin):  # Llama in many research repositories, gpt-oss
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = torch.chunk(x, 2, dim=-1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)


def neighbours(x, cos, sin):
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)


def neighbours_in_float32(x, cos, sin):  # gpt-fast
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    out = torch.stack([pairs[..., 0] * c - pairs[..., 1] * s, pairs[..., 1] * c + pairs[..., 0] * s], -1)
    return out.flatten(3).type_as(x)


def halves_backwards(x, cos, sin):
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = x.split(DIM // 2, dim=-1)
    return torch.cat((-x2 * s + x1 * c, s * x1 + c * x2), dim=-1)


def in_part(x, cos, sin):  # GPT-NeoX
    turned, kept = x[..., : DIM // 2], x[..., DIM // 2 :]
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    return torch.cat((turned * c + rotate_half(turned) * s, kept), dim=-1)


SPELLINGS = [
    llama, by_chunk, in_float32, every_two, minus_the_other, halves, neighbours, neighbours_in_float32,
    halves_backwards, in_part,
]  # fmt: skip


class Rotated(nn.Module):
    def __init__(self, rotate):
        super().__init__()
        self.rotate = rotate

    def forward(self, x, cos, sin):
        return self.rotate(x, cos, sin)


def forward_of(rotate, dtype="bf16"):
    rows = f"{BATCH}x{HEADS}x{LENGTH}x{DIM}:{dtype}"
    inputs = (f"x={rows}", f"cos={LENGTH}x{DIM}:{dtype}", f"sin={LENGTH}x{DIM}:{dtype}")
    return graphs_of(Rotated(rotate), inputs=inputs)["forward"]


def run(graph, execution):
    phase, _ = analyze_phase(graph, H100, execution)
    return phase.executions.of(execution)


def moved(graph, execution):
    return run(graph, execution).bytes_l2


@pytest.mark.parametrize("rotate", SPELLINGS, ids=lambda f: f.__name__)
def test_one_kernel_moves_what_a_compiler_s_kernel_moves(rotate):
    graph = forward_of(rotate)
    (match,) = RULE.check(situation(graph))
    assert "test_fus003.py" in str(graph.ops[match.op].anchor)
    after = rewritten(graph, RULE)
    written = {in_float32: 2 * TABLE}.get(rotate, 0)  # tables that this program widens by itself
    if not written:
        assert len(run(after, "eager").kernels) == 1
        assert moved(after, "eager") == pytest.approx(moved(graph, "compiled"), rel=0.001)
    assert match.evidence["bytes"] - match.evidence["fused_bytes"] == moved(graph, "eager") - moved(after, "eager")
    assert match.evidence["fused_bytes"] <= 2 * ROWS + 2 * (TABLE + written)


def as_complex(x, table, _):  # Meta's Llama
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


def test_a_complex_product_is_a_rotation():
    inputs = (f"x={BATCH}x{HEADS}x{LENGTH}x{DIM}:bf16", f"cos={LENGTH}x{DIM // 2}x2:fp32", "sin=1:fp32")

    def rotate(x, table, _):
        return as_complex(x, torch.view_as_complex(table), _)

    graph = graphs_of(Rotated(rotate), inputs=inputs)["forward"]
    (match,) = RULE.check(situation(graph))
    assert match.evidence["fused_bytes"] == 2 * ROWS + 4 * LENGTH * DIM
    assert "unflatten" in match.remedy.code
    assert moved(rewritten(graph, RULE), "eager") == 2 * ROWS + 4 * LENGTH * DIM


def test_its_remedy_in_real_numbers_computes_the_same():
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    cos, sin = angles.cos(), angles.sin()
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    real = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    torch.testing.assert_close(real, as_complex(x, torch.polar(torch.ones_like(angles), angles), None))


def behind_a_norm(x, cos, sin):  # Gemma 3
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return in_float32(h, cos, sin)


def before_attention(x, cos, sin):  # GPT-J
    q, k = llama(x, cos, sin).float(), x.float()
    return (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1).to(x.dtype) @ x


def widened_for_both(x, cos, sin):
    """The cast that widens what the norm returns is the rotation's; the one that ends the norm is not."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return llama(h.to(x.dtype), cos, sin)


@pytest.mark.parametrize(
    ("program", "alone"), [(behind_a_norm, in_float32), (before_attention, llama), (widened_for_both, llama)]
)
def test_casts_of_norms_and_attention_are_theirs(program, alone):
    graph = forward_of(program)
    (match,), (expected,) = (list(RULE.check(situation(g))) for g in (graph, forward_of(alone)))
    assert match.evidence == expected.evidence
    assert graph.ops[match.op].target == "aten.add.Tensor"


def weighted_sum(x, cos, sin):
    return x * cos + x * sin


def both_negated(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, -x1), dim=-1) * sin


def of_another(x, cos, sin):
    return x * cos + rotate_half(x.exp()) * sin


def sums_with_numbers(x, cos, sin):
    """A bias that happens to be a number, and a join of such sums."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 + 1.0, x2 - 1.0), dim=-1) + 0.5


def reflected(x, cos, sin):
    """(a c + b s, b c + a s) turns nothing."""
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * c + x2 * s, x2 * c + x1 * s), dim=-1)


def joined_products(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos[..., : DIM // 2], x2 * sin[..., : DIM // 2]), dim=-1)


def of_three_tables(x, cos, sin):
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * (s * 2)), dim=-1)


@pytest.mark.parametrize(
    "other",
    [weighted_sum, both_negated, of_another, sums_with_numbers, reflected, joined_products, of_three_tables],
    ids=lambda f: f.__name__,
)
def test_what_turns_nothing_is_left_alone(other):
    assert not list(RULE.check(situation(forward_of(other))))


def test_a_complex_filter_is_no_rotation():
    """Fourier filters (GFNet, FNO) multiply spectra with weights."""

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 9, 32, 2))

        def forward(self, x):
            spectrum = torch.fft.rfft2(x, dim=(1, 2))
            return torch.fft.irfft2(spectrum * torch.view_as_complex(self.weight), s=(16, 16), dim=(1, 2))

    graph = graphs_of(Filter(), inputs=("x=4x16x16x32",))["forward"]
    assert not list(RULE.check(situation(graph)))


def test_a_compiled_phase_has_none():
    assert not list(RULE.check(situation(forward_of(llama), execution="compiled")))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("llama-3-8b", 8), ("qwen3-8b", 8), ("phi-3-mini", 8), ("gptfast", 8), ("llama_reference", 8), ("moe", 8),
        ("mymodel", 8), ("gpt2", 0), ("nanogpt", 0), ("bert-base", 0), ("mamba_minimal", 0), ("resnet18", 0),
    ],
)  # fmt: skip
def test_real_models(model, found):
    for graph in traced(model).graphs.values():
        assert len(list(RULE.check(situation(graph)))) == found
