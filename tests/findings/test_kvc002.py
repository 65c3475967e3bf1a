"""KVC002: models that run over the whole prefix for every token, and the twin that keeps its keys and values."""

import math

import pytest
import torch
from findings.situations import SCENARIO, graphs_of, retracing, situation
from fxroof.analyzer.finding import Confidence, registered
from fxroof.analyzer.savings import timed
from fxroof.rules import no_kv_cache
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "KVC002")
WIDTH, HEADS, LAYERS, VOCABULARY, LONGEST = 1024, 8, 3, 32000, 1024


def spelt_out(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def both_ways(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, attend, cached):
        super().__init__()
        self.attend, self.cached = attend, cached
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        if cached:
            shape = (SCENARIO.batch_size, HEADS, LONGEST, WIDTH // HEADS)
            self.register_buffer("k_cache", torch.zeros(shape))
            self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x, start):
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for t in self.qkv(x).split(WIDTH, dim=-1)
        )
        if self.cached:
            self.k_cache[:batch, :, start : start + length] = k
            self.v_cache[:batch, :, start : start + length] = v
            k, v = (c[:batch, :, : start + length] for c in (self.k_cache, self.v_cache))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, WIDTH))


class Model(nn.Module):
    def __init__(self, attend, *, cached):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.attentions = nn.ModuleList(Attention(attend, cached) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.to(torch.bfloat16)


class Uncached(Model):
    def __init__(self, attend):
        super().__init__(attend, cached=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), 0)
        return self.head(x[:, -1:])


class Cached(Model):
    def __init__(self, attend):
        super().__init__(attend, cached=True)

    def forward(self, tokens, start_pos: int):
        x = self.embed(tokens)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), start_pos)
        return self.head(x[:, -1:])


def uncached(attend, execution="eager"):
    with torch.device("meta"):
        model = Uncached(attend)
    graph = graphs_of(model)["decode"]
    return situation(graph, execution=execution, retraced=retracing(model))


@pytest.mark.parametrize("execution", ["eager", "compiled"])
@pytest.mark.parametrize("attend", [fused, spelt_out])
def test_the_cached_step_is_that_of_the_twin(attend, execution):
    place = uncached(attend, execution)
    (match,) = RULE.check(place)
    assert match.confidence is Confidence.HIGH
    assert place.graph.ops[match.op].module == "attentions.0"
    with torch.device("meta"):
        twin = graphs_of(Cached(fused))["decode"]
    theirs = timed(twin, place.gpu, execution)
    times = place.analysis.seconds
    # the twin's context is shorter by the token that is being decoded
    assert times.bound - match.saving[0] == pytest.approx(theirs.bound, rel=0.01)
    assert times.estimate - match.saving[1] == pytest.approx(theirs.estimate, rel=0.01)
    assert match.saving[0] > 0.5 * times.bound


def test_it_is_silent_where_tokens_see_those_after_them():
    assert not list(RULE.check(uncached(both_ways)))


@pytest.mark.parametrize("name", ["mymodel", "gptfast", "llama_reference", "gpt2", "mamba_minimal"])
def test_it_is_silent_on_models_with_a_cache_or_without_attention(name):
    place = traced(name)
    found = situation(place.graphs["decode"], retraced=retracing(place.model.module))
    assert not list(RULE.check(found))


@pytest.mark.parametrize(("name", "sure"), [("nanogpt", Confidence.HIGH), ("mingpt", Confidence.MEDIUM)])
def test_real_models(name, sure):
    place = traced(name)
    scenario = place.workload.scenario
    found = situation(place.graphs["decode"], scenario=scenario, retraced=retracing(place.model.module))
    (match,) = RULE.check(found)
    assert match.confidence is sure
    assert match.evidence["tokens_computed"] == scenario.batch_size * (scenario.context_len + 1)


def test_nothing_is_promised_where_the_model_cannot_be_traced_again():
    with torch.device("meta"):
        graph = graphs_of(Uncached(fused))["decode"]
    assert not list(no_kv_cache.check(situation(graph)))
