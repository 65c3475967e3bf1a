"""FUS002: norms that are spelt out, and twins that call the fused op."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import decomposed_norm  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "FUS002")
WIDTH = 512


def pow_then_cast(x, weight, bias):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def cast_then_weight(x, weight, bias):
    h = x.to(torch.float32)
    h = h * torch.rsqrt((h * h).mean(dim=-1, keepdim=True) + 1e-6)
    return h.to(x.dtype) * weight


def square_and_divide(x, weight, bias):
    return x / torch.sqrt(x.square().mean(x.dim() - 1, keepdim=True) + 1e-6) * weight


def power_of_minus_half(x, weight, bias):
    return x * (x**2).mean(-1, keepdim=True).add(1e-6).pow(-0.5)


def rms(x, weight, bias):
    return F.rms_norm(x, (WIDTH,), weight, 1e-6)


def rms_bare(x, weight, bias):
    return F.rms_norm(x, (WIDTH,), None, 1e-6)


def layer_by_hand(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def layer(x, weight, bias):
    return F.layer_norm(x, (WIDTH,), weight, bias, 1e-5)


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to(torch.bfloat16)

    def forward(self, x):
        return x + self.up(self.norm(x, self.weight, self.bias))


def forward_of(norm):
    return graphs_of(Normed(norm), inputs=("x=4x1024x512:bf16",))["forward"]


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        (pow_then_cast, rms),
        (cast_then_weight, rms),
        (square_and_divide, rms),
        (power_of_minus_half, rms_bare),
        (layer_by_hand, layer),
    ],
    ids=lambda f: f.__name__,
)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good):
    graph, twin = forward_of(bad), forward_of(good)
    assert len(list(RULE.check(situation(graph)))) == 1
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


def max_norm(x, weight, bias):
    return x / torch.sqrt(x.pow(2).amax(-1, keepdim=True) + 1e-6)


def over_tokens(x, weight, bias):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def of_another(x, weight, bias):
    return (x + bias) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def cubed(x, weight, bias):
    return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("other", [max_norm, over_tokens, of_another, cubed, rms, layer], ids=lambda f: f.__name__)
def test_what_is_no_norm_is_left_alone(other):
    assert not list(RULE.check(situation(forward_of(other))))


@pytest.mark.parametrize(("model", "norms"), [("mymodel", 49), ("llama-3-8b", 9)])
def test_real_models(model, norms):
    graph = traced(model).graphs["decode"]
    found = list(RULE.check(situation(graph)))
    assert len(found) == norms
    assert all(m.evidence["ops"] >= 6 for m in found)
