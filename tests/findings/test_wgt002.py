"""WGT002: models in 32 bits, and the same models built in 16."""

from pathlib import Path

import pytest
import torch
from findings.attention import Decoder, causal, traced_decoder
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.analyzer.load import load
from fxroof.analyzer.pricing import price
from fxroof.analyzer.workload import plan
from fxroof.rules import float32_weights  # noqa: F401  # registers it
from support import SHORT, TARGETS, cut, trace_program, traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "WGT002")
WIDTH = 256


def assert_equal(graph, twin):
    assert figures(graph) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


def float32_inside(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def back_by_type_as(x, weight):
    def normed(h):
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    return normed(x.float()).type_as(x) * weight


def weight_cast_too(x, weight):
    h = x.to(torch.float32)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())).type_as(x)


def softmax_in_float32(x, weight):
    return F.softmax(x * weight, dim=-1, dtype=torch.float32).to(x.dtype)


def cast_to_the_type_of_a_weight(x, weight):
    return x.to(weight.dtype) * weight


def weight_cast_to_what_it_meets(x, weight):
    return x * weight.to(x.dtype)


def put_together_before_float32(x, weight):
    h = torch.cat([x.to(weight.dtype), x], dim=-1).float()
    return h.softmax(dim=-1)[..., :WIDTH].to(x.dtype) * weight


def rows_of_a_table(x, weight):
    rows = weight.repeat(7, 1).index_select(0, torch.arange(x.shape[1]) % 7).to(x.dtype)
    return x * rows.unsqueeze(0)


def table_made_in_float32(x, weight):
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), torch.arange(WIDTH, dtype=torch.float32))
    return x * angles.cos().to(x.dtype) + weight


def complex_rotation(x, weight):
    turns = torch.outer(torch.arange(x.shape[1]).float(), torch.arange(WIDTH // 2).float())
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(turns), turns)
    return torch.view_as_real(turned).flatten(2).type_as(x) * weight


def made_in_the_type_of_x(x, weight):
    scores = torch.zeros(x.shape[1], WIDTH, dtype=x.dtype)
    scores[:, :] = weight
    return x + scores


class Model(nn.Module):
    def __init__(self, between, dtype):
        super().__init__()
        self.between = between
        self.embed, self.weight = nn.Embedding(500, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("table", torch.ones(2048, WIDTH), persistent=False)
        self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 500, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.to(dtype)

    def forward(self, tokens, cache=None):
        x = self.embed(tokens) + self.table[: tokens.shape[1]]
        x = x + self.up(self.between(x, self.weight))
        kept = x if cache is None else torch.cat([cache, x], dim=1)
        return self.head(self.norm(x)).float(), kept


@pytest.mark.parametrize(
    "between",
    [
        float32_inside,
        back_by_type_as,
        weight_cast_too,
        softmax_in_float32,
        cast_to_the_type_of_a_weight,
        weight_cast_to_what_it_meets,
        put_together_before_float32,
        rows_of_a_table,
        table_made_in_float32,
        complex_rotation,
        made_in_the_type_of_x,
    ],
    ids=lambda f: f.__name__,
)
def test_what_the_program_asks_for_in_float32_stays(between):
    twins = graphs_of(Model(between, torch.bfloat16))
    for phase, graph in graphs_of(Model(between, torch.float32)).items():
        (found,) = RULE.check(situation(graph))
        assert found.op is None
        assert found.evidence["wide_weight_bytes"] == 2 * found.evidence["narrow_weight_bytes"]
        assert_equal(rewritten(graph, RULE), twins[phase])
        assert not list(RULE.check(situation(twins[phase])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_takes_the_kernels_of_the_narrow_type(dtype):
    twins = traced_decoder(causal, 2)
    for phase, graph in traced_decoder(causal, 2, dtype).items():
        assert_equal(rewritten(graph, RULE), twins[phase])


class Autocast(nn.Module):
    """Casts float32 weights in every step."""

    def __init__(self, dtype, cast_to=torch.bfloat16):
        super().__init__()
        self.inner, self.norm, self.cast_to = Decoder(causal, dtype=dtype), nn.LayerNorm(500).to(dtype), cast_to

    def forward(self, tokens, cache=None):
        with torch.autocast("cuda", dtype=self.cast_to):
            out, kept = self.inner(tokens, cache)
            return self.norm(out), kept


def test_casts_of_weights_in_every_step_go():
    twins = graphs_of(Autocast(torch.bfloat16))
    for phase, graph in graphs_of(Autocast(torch.float32)).items():
        assert list(RULE.check(situation(graph)))
        assert_equal(rewritten(graph, RULE), twins[phase])


def test_the_type_is_what_the_program_casts_to_or_what_the_gpu_multiplies():
    graph = graphs_of(Autocast(torch.float32, torch.float16))["decode"]
    (found,) = RULE.check(situation(graph))
    assert "float16" in found.remedy.code.replace("bfloat16", "")
    graph = traced_decoder(causal, dtype=torch.float32)["decode"]
    codes = {gpu: next(iter(RULE.check(situation(graph, gpu=gpu)))).remedy.code for gpu in ("h100_sxm", "t4")}
    assert "bfloat16" in codes["h100_sxm"]
    assert "torch.float16" in codes["t4"]


class MostlyNarrow(nn.Module):
    """Norms and a router in float32, the rest in 16 bits."""

    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(500, WIDTH).bfloat16(), nn.Linear(WIDTH, 4 * WIDTH).bfloat16()
        self.norm, self.router = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 8)

    def forward(self, tokens, cache=None):
        x = self.embed(tokens)
        kept = x if cache is None else torch.cat([cache, x], dim=1)
        return self.router(self.norm(self.up(x).float())), kept


def test_a_norm_and_a_router_in_float32_are_left_alone():
    for graph in graphs_of(MostlyNarrow()).values():
        assert not list(RULE.check(situation(graph)))


def graphs_in(name, dtype):
    target = TARGETS[name]
    workload = plan(load(cut(target, 2) if Path(target).is_dir() else target, dtype=dtype), SHORT)
    return {p.phase.name: trace_program(p) for p in workload.programs}


@pytest.mark.parametrize("model", ["gptfast", "llama_reference", "gpt2", "gemma-2-9b", "bert-base", "whisper-large-v3"])
def test_real_models_become_what_they_are_in_16_bits(model):
    twins = graphs_in(model, "bf16")
    for phase, graph in graphs_in(model, "fp32").items():
        assert len(list(RULE.check(situation(graph)))) == 1
        assert_equal(rewritten(graph, RULE), twins[phase])


@pytest.mark.parametrize(("model", "findings"), [("mymodel", 0), ("llama-3-8b", 0), ("nanogpt", 2)])
def test_models_as_they_are(model, findings):
    found = [m for graph in traced(model).graphs.values() for m in RULE.check(situation(graph))]
    assert len(found) == findings


def test_it_saves_what_was_expected():
    graph = traced_decoder(causal, dtype=torch.float32, layers=1)["decode"]
    weights = [sum(a.read for c in price(g, situation(g).gpu) for a in c.traffic if g.role(a.tensor) == "weight")
               for g in (graph, rewritten(graph, RULE))]  # fmt: skip
    assert weights[0] == 2 * weights[1]
