"""FUS006: casts to float32 that are undone at once, and twins without them."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import Confidence, registered
from fxroof.rules import dtype_pingpong  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "FUS006")
WIDTH = 512


def up_and_down(m, x, h):
    return h.float().to(torch.bfloat16)


def nothing(m, x, h):
    return h


def silu_in_float32(m, x, h):
    return F.silu(h.float()).to(h.dtype)


def silu(m, x, h):
    return F.silu(h)


def sum_in_float32(m, x, h):
    return (x.float() + h.to(torch.float32)).type_as(x)


def sum_of_one_cast(m, x, h):
    return (x + h.float()).bfloat16()


def plain_sum(m, x, h):
    return x + h


def scaled_in_float32(m, x, h):
    return (h.float() * 0.125).to(x.dtype)


def scaled(m, x, h):
    return h * 0.125


def norm_in_float32(m, x, h):  # CLIP
    weight, bias = m.norm.weight.float(), m.norm.bias.float()
    return F.layer_norm(h.float(), (WIDTH,), weight, bias).type(h.dtype)


def norm(m, x, h):
    return m.norm(h)


def product_in_float32(m, x, h):
    return F.linear(h.float(), m.gate.weight.float()).to(h.dtype)


def product(m, x, h):
    return F.linear(h, m.gate.weight)


def scores_in_float32(m, x, h):
    return (h.float() @ x.float().transpose(-2, -1).contiguous()).to(h.dtype) @ x


PAIRS = [
    (up_and_down, nothing), (silu_in_float32, silu), (sum_in_float32, plain_sum), (sum_of_one_cast, plain_sum),
    (scaled_in_float32, scaled), (norm_in_float32, norm), (product_in_float32, product),
]  # fmt: skip


class Block(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.between = between
        self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.down(self.between(self, x, self.up(x)))


def forward_of(between):
    return graphs_of(Block(between), inputs=("x=4x1024x512:bf16",))["forward"]


@pytest.mark.parametrize(("bad", "good"), PAIRS, ids=lambda f: f.__name__)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good):
    graph, twin = forward_of(bad), forward_of(good)
    (match,) = RULE.check(situation(graph))
    assert "test_fus006.py" in str(graph.ops[match.op].anchor)
    assert match.confidence is (Confidence.MEDIUM if bad is product_in_float32 else Confidence.HIGH)
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


@pytest.mark.parametrize(("bad", "good"), PAIRS[:5], ids=lambda f: f.__name__)
@torch.no_grad()
def test_the_remedy_computes_the_same_bits(bad, good):
    torch.manual_seed(0)
    block, (x, h) = Block(good), torch.randn(2, 64, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(bad(block, x, h), good(block, x, h))


@pytest.mark.parametrize(("bad", "good"), PAIRS[5:], ids=lambda f: f.__name__)
@torch.no_grad()
def test_the_remedy_rounds_the_same_sums(bad, good):
    torch.manual_seed(0)
    block, (x, h) = Block(good), torch.randn(2, 64, WIDTH, dtype=torch.bfloat16)
    torch.testing.assert_close(bad(block, x, h), good(block, x, h), rtol=2**-7, atol=2**-7)


UNARY = (
    "neg", "abs", "sigmoid", "tanh", "exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "erf", "sin", "cos",
    "square", "relu",
)  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_pytorch_computes_each_op_in_float32_and_rounds_once(name):
    x = torch.linspace(0.01, 4, 4096).bfloat16()
    op = getattr(torch, name)
    assert torch.equal(op(x), op(x.float()).bfloat16())


def a_wide_tensor_that_others_need_stays(m, x, h):
    wide = h.float()
    return wide.to(h.dtype) + wide.sum(-1, keepdim=True).to(h.dtype)


def test_a_wide_tensor_that_others_need_stays():
    graph = forward_of(a_wide_tensor_that_others_need_stays)
    (match,) = RULE.check(situation(graph))
    assert match.evidence["casts"] == 1
    assert len(rewritten(graph, RULE).ops) < len(graph.ops)
    casts = [op for op in rewritten(graph, RULE).ops if op.target.startswith("aten.to") and op.outputs]
    assert len(casts) == 2


# silence


def two_ops(m, x, h):
    return (h.float().exp() + 1).to(h.dtype)


def wide_operand(m, x, h):
    scale = torch.ones(WIDTH, device=h.device).cumsum(0)
    return (h.float() * scale).to(h.dtype)


def to_another_type(m, x, h):
    return (h.float() * 2).to(torch.float16).to(torch.bfloat16)


def wide_result_used_twice(m, x, h):
    wide = F.silu(h.float())
    return wide.to(h.dtype) * wide.sum(-1, keepdim=True).to(h.dtype)


def cubed(m, x, h):
    """Powers of 16-bit numbers round between factors."""
    return h.float().pow(3).to(h.dtype)


def kept_in_float32(m, x, h):
    return (h.float() @ m.gate.weight.float().t()).softmax(-1).to(h.dtype)


def overwritten(m, x, h):
    kept = h.float().to(torch.bfloat16)
    h.mul_(2)
    return kept + h


def floor_division(m, x, h):
    return torch.div(h.float(), 3, rounding_mode="floor").to(h.dtype)


SILENT = [
    two_ops, wide_operand, to_another_type, wide_result_used_twice, cubed, kept_in_float32, overwritten,
    floor_division, nothing, silu, plain_sum, scores_in_float32,
]  # fmt: skip


@pytest.mark.parametrize("between", SILENT, ids=lambda f: f.__name__)
def test_it_is_silent(between):
    assert not list(RULE.check(situation(forward_of(between))))


def test_a_compiled_phase_has_but_products():
    assert not list(RULE.check(situation(forward_of(silu_in_float32), execution="compiled")))
    assert list(RULE.check(situation(forward_of(product_in_float32), execution="compiled")))


@pytest.mark.parametrize(
    "model",
    ["llama-3-8b", "gpt2", "gptfast", "nanogpt", "mymodel", "moe", "mamba_minimal", "bert-base", "llama_reference"],
)
def test_models_that_do_not(model):
    for graph in traced(model).graphs.values():
        assert not list(RULE.check(situation(graph)))
