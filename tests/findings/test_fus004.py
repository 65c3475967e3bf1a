"""FUS004: activations that are spelt out, and twins that call the op."""

import math

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import decomposed_activation  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "FUS004")
WIDTH = 512


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def new_gelu(x):  # transformers, nanoGPT
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_pytorch_tanh(x):  # transformers, Gemma
    return x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def fast_gelu(x):  # transformers, GPT-J
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_of_megatron(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def gelu_of_openai(x):
    cdf = 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * cdf


def gelu_in_float32(x):
    h = x.float()
    return (0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h.pow(3.0))))).to(x.dtype)


def gelu_erf(x):  # transformers, BERT
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_erf_of_fairseq(x):
    return x * (torch.erf(x * 0.70710678) + 1) / 2


def gelu_erf_short(x):  # constants of five digits
    return x * 0.5 * (1.0 + torch.erf(x / 1.41421))


def swish(x):
    return x * torch.sigmoid(x)


def swish_reversed(x):
    return x.sigmoid().mul(x)


def swish_by_exp(x):
    return x / (1 + torch.exp(-x))


def swish_in_float32(x):
    h = x.float()
    return (h * h.sigmoid()).type_as(x)


def swish_in_place(x):  # timm
    return x.mul_(x.sigmoid())


def swish_into_the_gate(x):
    return x.sigmoid().mul_(x)


def logistic(x):
    return 1 / (1 + torch.exp(-x))


def softplus_by_log(x):
    return torch.log(1 + torch.exp(x))


def softplus_by_log1p(x):
    return x.exp().log1p()


def mish_of_softplus(x):  # transformers
    return x * torch.tanh(F.softplus(x))


def mish_by_log(x):
    return x * torch.tanh(torch.log(1 + torch.exp(x)))


def hard_swish(x):  # MobileNetV3
    return x * F.relu6(x + 3) / 6


def hard_swish_by_clamp(x):
    return x * (x + 3).clamp(0, 6).div(6)


def hard_swish_of_gate(x):
    return x * F.hardsigmoid(x)


def hard_sigmoid(x):
    return F.relu6(x + 3.0) / 6.0


def log_of_sigmoid(x):
    return torch.log(torch.sigmoid(x))


def elu_by_where(x):
    return torch.where(x > 0, x, torch.exp(x) - 1)


def elu_by_expm1(x):
    return torch.where(x > 0, x, 1.0 * torch.expm1(x))


def glu_of_halves(x):
    a, b = x.chunk(2, dim=-1)
    return a * torch.sigmoid(b)


def glu_split(x):
    a, b = torch.split(x, WIDTH // 2, dim=-1)
    return b.sigmoid() * a


def glu(x):
    return F.glu(x, dim=-1)


PAIRS = [
    (new_gelu, gelu_tanh), (gelu_pytorch_tanh, gelu_tanh), (fast_gelu, gelu_tanh), (gelu_of_megatron, gelu_tanh),
    (gelu_of_openai, gelu_tanh), (gelu_in_float32, gelu_tanh), (gelu_erf, F.gelu), (gelu_erf_of_fairseq, F.gelu),
    (gelu_erf_short, F.gelu), (swish, F.silu), (swish_reversed, F.silu), (swish_by_exp, F.silu),
    (swish_in_float32, F.silu), (swish_into_the_gate, F.silu), (logistic, torch.sigmoid),
    (softplus_by_log, F.softplus), (softplus_by_log1p, F.softplus), (mish_of_softplus, F.mish), (mish_by_log, F.mish),
    (hard_swish, F.hardswish), (hard_swish_by_clamp, F.hardswish), (hard_swish_of_gate, F.hardswish),
    (hard_sigmoid, F.hardsigmoid), (log_of_sigmoid, F.logsigmoid), (elu_by_where, F.elu), (elu_by_expm1, F.elu),
    (glu_of_halves, glu), (glu_split, glu),
]  # fmt: skip


def silu_in_place(x):
    return F.silu(x, inplace=True)


class Mlp(nn.Module):
    def __init__(self, act, dtype=torch.bfloat16):
        super().__init__()
        self.act = act
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH // 2 if "glu" in act.__name__.split("_") else WIDTH, WIDTH)
        self.to(dtype)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def forward_of(act):
    return graphs_of(Mlp(act), inputs=("x=4x1024x512:bf16",))["forward"]


@pytest.mark.parametrize(
    ("bad", "good"), [*PAIRS, (swish_in_place, silu_in_place)], ids=lambda f: getattr(f, "__name__", str(f))
)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good):
    graph, twin = forward_of(bad), forward_of(good)
    (match,) = RULE.check(situation(graph))
    assert "test_fus004.py" in str(graph.ops[match.op].anchor)
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


@pytest.mark.parametrize(("bad", "good"), PAIRS, ids=lambda f: getattr(f, "__name__", str(f)))
def test_the_remedy_computes_the_same(bad, good):
    x = torch.linspace(-8, 8, 2 * WIDTH).view(2, WIDTH)
    torch.testing.assert_close(bad(x.clone()), good(x.clone()), rtol=1e-4, atol=2e-5)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x):
    return F.relu(x).square()


def one_op_in_float32(x):
    """Casts around an op spell nothing out (FUS006)."""
    return torch.sigmoid(x.float()).to(x.dtype)


def soft_cap(x):
    return 30.0 * torch.tanh(x / 30.0)


def gate_of_another(x):
    return x * torch.sigmoid(x.flip(-1))


def half_kept(x):
    """The sigmoid is wanted by itself too."""
    gate = x.sigmoid()
    return x * gate + gate


def halves_swapped(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([torch.sigmoid(a) * b, b], -1)


def overwritten_between(x):
    gate = x.sigmoid()
    x.add_(1)
    return x * gate


def wider_result(x):
    return (x.float() * x.float().sigmoid()).sum(-1, keepdim=True).to(x.dtype) * x


def laplace(x):
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def by_a_parameter(x):
    """A slope that is learnt: its value is not in the program."""
    return x * torch.sigmoid(torch.ones(1, dtype=x.dtype, device=x.device) * x)


SILENT = [
    quick_gelu, squared_relu, one_op_in_float32, soft_cap, gate_of_another, half_kept, halves_swapped,
    overwritten_between, wider_result, laplace, by_a_parameter, F.silu, F.gelu, F.mish, glu,
]  # fmt: skip


@pytest.mark.parametrize("other", SILENT, ids=lambda f: f.__name__)
def test_what_is_no_such_activation_is_left_alone(other):
    assert not list(RULE.check(situation(forward_of(other))))


def test_a_compiled_phase_has_none():
    assert not list(RULE.check(situation(forward_of(new_gelu), execution="compiled")))


@pytest.mark.parametrize(
    ("model", "activations"),
    [("gpt2", 4), ("mingpt", 12), ("nanogpt", 0), ("llama-3-8b", 0), ("clip-vit-l14", 0), ("resnet18", 0)],
)
def test_real_models(model, activations):
    for graph in traced(model).graphs.values():
        assert len(list(RULE.check(situation(graph)))) == activations
