"""ATT004: softmax in float32 between 16-bit tensors, and the twin without casts."""

import pytest
import torch
from findings.attention import HEADS, heads_first, tokens_first, traced_decoder
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import float32_softmax_roundtrip, materialized_attention_scores
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "ATT004")


def told(scores):
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def cast(scores):
    return torch.softmax(scores.float(), dim=-1).type_as(scores)


def cast_and_told(scores):
    return scores.to(torch.float32).softmax(3, dtype=torch.float32).to(torch.bfloat16)


def with_dropout_between(scores):
    return F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32), 0.1, training=False).to(scores.dtype)


def narrow(scores):
    return F.softmax(scores, dim=-1)


def sinks(softmax):
    """Attention with a logit that every query may attend to instead, which no kernel of PyTorch takes."""

    def attend(q, k, v):
        q, k, v = heads_first(q, k, v)
        scores = q @ k.transpose(-2, -1) * 0.125
        scores = torch.cat([scores, scores.new_zeros(*scores.shape[:-1], 1)], dim=-1)
        return tokens_first(softmax(scores)[..., :-1] @ v)

    return attend


def plain(softmax):
    def attend(q, k, v):
        q, k, v = heads_first(q, k, v)
        return tokens_first(softmax(q @ k.transpose(-2, -1) * 0.125) @ v)

    return attend


@pytest.mark.parametrize("spelling", [told, cast, cast_and_told, with_dropout_between], ids=lambda f: f.__name__)
def test_every_spelling_becomes_its_twin(spelling):
    twins = traced_decoder(sinks(narrow))
    for phase, graph in traced_decoder(sinks(spelling)).items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == 2
        assert all(m.evidence["bytes"] >= 2 * m.evidence["needed_bytes"] for m in found)
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {k: pytest.approx(v, rel=0.01) for k, v in theirs.items()}
        assert not list(RULE.check(situation(twins[phase])))


def test_what_one_kernel_could_do_is_left_to_it():
    graph = traced_decoder(plain(told))["prefill"]
    assert len(situation(graph).once(materialized_attention_scores.found)) == 2
    assert not situation(graph).once(float32_softmax_roundtrip.found)


class Router(nn.Module):
    """Scores of 8 experts by `weigh`, which are used to choose two."""

    def __init__(self, weigh):
        super().__init__()
        self.weigh, self.gate = weigh, nn.Linear(64, HEADS)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.weigh(self.gate(x))


def chosen_in_float32(scores):
    return F.softmax(scores, dim=-1, dtype=torch.float32).topk(2).values.to(scores.dtype)


def used_in_float32_too(scores):
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32)
    return probabilities.to(scores.dtype), probabilities.sum(0)


def returned_in_float32_too(scores):
    probabilities = F.softmax(scores.float(), dim=-1)
    return probabilities.to(scores.dtype), probabilities


def stays_in_float32(scores):
    return F.softmax(scores.float(), dim=-1)


def scaled_in_float32(scores):
    return F.softmax(scores.float() * 0.125, dim=-1).to(scores.dtype)


def over_another_dimension(scores):
    return F.softmax(scores, dim=0, dtype=torch.float32).to(scores.dtype)


def from_one_type_to_another(scores):
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(torch.float16)


@pytest.mark.parametrize(
    "weigh",
    [
        chosen_in_float32,
        used_in_float32_too,
        returned_in_float32_too,
        stays_in_float32,
        scaled_in_float32,
        over_another_dimension,
        from_one_type_to_another,
        narrow,
    ],
    ids=lambda f: f.__name__,
)
def test_near_misses(weigh):
    graph = graphs_of(Router(weigh), inputs=("x=512x64:bf16",))["forward"]
    assert not list(RULE.check(situation(graph)))


@pytest.mark.parametrize("spelling", [told, cast, cast_and_told])
def test_the_remedy_changes_no_number(spelling):
    torch.manual_seed(0)
    scores = (4 * torch.randn(2, 3, 16, 200)).bfloat16()
    torch.testing.assert_close(narrow(scores), spelling(scores), rtol=2**-7, atol=0)


@pytest.mark.parametrize("model", ["mymodel", "llama_reference", "llama-3-8b", "gpt2", "moe", "qwen3-30b-a3b"])
def test_real_models(model):
    """Those that spell attention out could call a kernel: ATT001 says so."""
    for graph in traced(model).graphs.values():
        assert not list(RULE.check(situation(graph)))
