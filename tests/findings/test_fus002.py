"""FUS002: norms that are spelt out, and twins that call the fused op."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.analyzer.graph import is_assertion
from fxroof.rules import decomposed_norm
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


def widened_for_the_squares(x, weight, bias):
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(weight.dtype)


def power_of_minus_half(x, weight, bias):
    return x * (x**2).mean(-1, keepdim=True).add(1e-6).pow(-0.5)


def cast_behind_the_weight(x, weight, bias):  # gpt-oss
    h = x.float()
    return (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def weight_widened(x, weight, bias):  # Helium
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight.to(torch.float32) * h).to(x.dtype)


def cast_to_its_own_type(x, weight, bias):
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h.to(x.dtype) * weight


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
        (widened_for_the_squares, rms),
        (power_of_minus_half, rms_bare),
        (cast_behind_the_weight, rms),
        (weight_widened, rms),
        (cast_to_its_own_type, rms),
        (layer_by_hand, layer),
    ],
    ids=lambda f: f.__name__,
)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good):
    graph, twin = forward_of(bad), forward_of(good)
    assert len(list(RULE.check(situation(graph)))) == 1
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


class Alone(nn.Module):
    """A norm whose result is returned: its input, and the type of its weight and bias."""

    def __init__(self, norm, dtype):
        super().__init__()
        self.norm = norm
        self.weight, self.bias = (nn.Parameter(torch.randn(WIDTH, dtype=dtype)) for _ in range(2))
        self.eps = 1e-6

    def forward(self, x):
        return self.norm(x, self.weight, self.bias)


def gemma(x, weight, bias):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def gemma_twin(x, weight, bias):
    return F.rms_norm(x.float(), (WIDTH,), 1 + weight.float(), 1e-6).type_as(x)


def shifted_by_another(x, weight, bias):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (weight.float() * bias.float())).type_as(x)


def shifted_by_another_twin(x, weight, bias):
    return F.rms_norm(x.float(), (WIDTH,), weight.float() * bias.float(), 1e-6).type_as(x)


def one_plus(x, weight, bias):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def one_plus_twin(x, weight, bias):
    return F.rms_norm(x, (WIDTH,), 1 + weight, 1e-6)


def one_plus_cast_twin(x, weight, bias):
    return F.rms_norm(x, (WIDTH,), (1 + weight).to(x.dtype), 1e-6)


def weight_cast_twin(x, weight, bias):
    return F.rms_norm(x, (WIDTH,), weight.to(x.dtype), 1e-6)


def stays_wide(x, weight, bias):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def stays_wide_twin(x, weight, bias):
    return F.rms_norm(x.float(), (WIDTH,), weight.float(), 1e-6)


def narrowed_for_the_weight(x, weight, bias):  # T5 with a residual in float32
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(weight.dtype)


def narrowed_for_the_weight_twin(x, weight, bias):
    return F.rms_norm(x, (WIDTH,), weight.to(x.dtype), 1e-6).to(torch.bfloat16)


def layer_cast_twin(x, weight, bias):
    return F.layer_norm(x, (WIDTH,), weight.to(x.dtype), bias.to(x.dtype), 1e-5)


@pytest.mark.parametrize(
    ("bad", "good", "x", "rows", "code"),
    [
        (cast_then_weight, rms, "bf16", "bf16", "F.rms_norm(x, (dim,), self.weight, self.eps)"),
        (power_of_minus_half, rms_bare, "bf16", "bf16", "F.rms_norm(x, (dim,), eps=self.eps)"),
        (layer_by_hand, layer, "bf16", "bf16", "F.layer_norm(x, (dim,), self.weight, self.bias, self.eps)"),
        (weight_widened, rms, "bf16", "bf16", "F.rms_norm(x, (dim,), self.weight, self.eps)"),
        (gemma, gemma_twin, "bf16", "bf16",
         "F.rms_norm(x.float(), (dim,), 1 + self.weight.float(), self.eps).type_as(x)"),
        (gemma, one_plus_twin, "fp32", "fp32", "F.rms_norm(x, (dim,), 1 + self.weight, self.eps)"),
        (shifted_by_another, shifted_by_another_twin, "bf16", "bf16",
         "F.rms_norm(x.float(), (dim,), weight, self.eps).type_as(x)"),
        (one_plus, one_plus_twin, "bf16", "bf16", "F.rms_norm(x, (dim,), 1 + self.weight, self.eps)"),
        (one_plus, one_plus_cast_twin, "fp32", "bf16",
         "F.rms_norm(x, (dim,), (1 + self.weight).to(x.dtype), self.eps)"),
        (cast_then_weight, weight_cast_twin, "fp32", "bf16",
         "F.rms_norm(x, (dim,), self.weight.to(x.dtype), self.eps)"),
        (cast_behind_the_weight, weight_cast_twin, "bf16", "fp32",
         "F.rms_norm(x, (dim,), self.weight.to(x.dtype), self.eps)"),
        (stays_wide, stays_wide_twin, "bf16", "bf16", "F.rms_norm(x.float(), (dim,), self.weight.float(), self.eps)"),
        (narrowed_for_the_weight, narrowed_for_the_weight_twin, "fp32", "bf16",
         "F.rms_norm(x, (dim,), self.weight.to(x.dtype), self.eps).to(torch.bfloat16)"),
        (layer_by_hand, layer_cast_twin, "fp32", "bf16",
         "F.layer_norm(x, (dim,), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_types_and_weights_of_all_kinds(bad, good, x, rows, code):
    """The rewrite is the trace of the twin, and the code of the remedy computes what the program does."""
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    graph, twin = (
        graphs_of(Alone(norm, types[rows]), inputs=(f"x=4x1024x512:{x}",))["forward"] for norm in (bad, good)
    )
    (match,) = RULE.check(situation(graph))
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}
    assert match.remedy.code == f"x = {code}"
    torch.manual_seed(0)
    module, rows_of_x = Alone(bad, types[rows]), torch.randn(8, WIDTH).to(types[x])
    known = {"self": module, "x": rows_of_x, "dim": WIDTH, "F": F, "torch": torch}
    known["weight"] = module.weight.float() * module.bias.float()
    result, expected = eval(code, known), module(rows_of_x)  # noqa: S307  # the remedy's own text
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def weight_of_each_row(x, weight, bias):
    """The product with another activation is no weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x


def cast_to_a_third_type(x, weight, bias):
    h = x.float()
    return (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(torch.float16)


def widened_by_what_follows(x, weight, bias):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype).float()


def widened_behind(x, weight, bias):
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).float()


@pytest.mark.parametrize(
    "norm",
    [weight_of_each_row, cast_to_a_third_type, widened_by_what_follows, widened_behind],
    ids=lambda f: f.__name__,
)
def test_what_follows_a_norm_and_is_no_part_of_it(norm):
    graph = graphs_of(Alone(norm, torch.bfloat16), inputs=("x=4x1024x512:bf16",))["forward"]
    (found,) = situation(graph).once(decomposed_norm.found)
    ops = [index for index, op in enumerate(graph.ops) if not is_assertion(op)]
    assert found.last == ops[-2]


def weight_used_again(x, weight, bias):
    return one_plus(x, weight, bias) + (1 + weight)


def weight_kept(x, weight, bias):
    row = 1 + weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * row, row


@pytest.mark.parametrize(
    ("norm", "ops"), [(gemma, ["to", "add"]), (one_plus, ["add"]), (weight_used_again, ["add"]), (weight_kept, [])]
)
def test_ops_that_only_make_the_weight(norm, ops):
    graph = graphs_of(Alone(norm, torch.bfloat16), inputs=("x=4x1024x512:bf16",))["forward"]
    (found,) = situation(graph).once(decomposed_norm.found)
    assert [graph.ops[i].target.split(".")[1] for i in found.weight_ops] == ops


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


@pytest.mark.parametrize(("model", "norms"), [("mymodel", 9), ("llama-3-8b", 9)])
def test_real_models(model, norms):
    graph = traced(model).graphs["decode"]
    found = list(RULE.check(situation(graph)))
    assert len(found) == norms
    assert all(m.evidence["ops"] >= 6 for m in found)
