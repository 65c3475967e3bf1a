"""ATT003: keys and values copied for the query heads, and the twin that passes them as they are."""

import pytest
import torch
from findings.attention import HEAD_DIM, HEADS, KV_HEADS, causal, fused, heads_first, tokens_first, traced_decoder
from findings.situations import figures, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import repeated_kv_heads  # noqa: F401  # registers it
from support import LAYERS, traced
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "ATT003")
GROUP = HEADS // KV_HEADS


def attend(q, k, v):
    return tokens_first(F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1))


def interleaved(q, k, v):
    q, k, v = heads_first(q, k, v)
    return attend(q, k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=-3))


def interleaved_token_major(q, k, v):
    k, v = (torch.repeat_interleave(t, GROUP, dim=2) for t in (k, v))
    return attend(*heads_first(q, k, v))


def expanded_and_reshaped(q, k, v):
    q, k, v = heads_first(q, k, v)
    batch, _, length, _ = k.shape
    k, v = (
        t[:, :, None].expand(batch, KV_HEADS, GROUP, length, HEAD_DIM).reshape(batch, -1, length, HEAD_DIM)
        for t in (k, v)
    )
    return attend(q, k, v)


def expanded_token_major(q, k, v):
    k, v = (t.unsqueeze(3).expand(-1, -1, -1, GROUP, -1).flatten(2, 3) for t in (k, v))
    return attend(*heads_first(q, k, v))


def expanded_and_cloned(q, k, v):
    q, k, v = heads_first(q, k, v)
    k, v = (
        t.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).contiguous().view(q.shape[0], HEADS, -1, HEAD_DIM) for t in (k, v)
    )
    return attend(q, k, v)


@pytest.mark.parametrize(
    "spelling",
    [interleaved, interleaved_token_major, expanded_and_reshaped, expanded_token_major, expanded_and_cloned],
    ids=lambda f: f.__name__,
)
def test_every_spelling_becomes_its_twin(spelling):
    twins = traced_decoder(causal, KV_HEADS)
    for phase, graph in traced_decoder(spelling, KV_HEADS).items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == 2
        assert all(m.evidence["copied_bytes"] == GROUP * m.evidence["kv_bytes"] for m in found)
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


def test_one_head_repeated():
    def tiled(q, k, v):
        q, k, v = heads_first(q, k, v)
        return attend(q, k.repeat(1, HEADS, 1, 1), v.repeat(1, HEADS, 1, 1))

    twins = traced_decoder(causal, 1)
    for phase, graph in traced_decoder(tiled, 1).items():
        assert len(list(RULE.check(situation(graph)))) == 2
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


def tiled(q, k, v):
    """Head i of the query meets KV head i modulo 2, which is not how grouped heads are counted."""
    q, k, v = heads_first(q, k, v)
    return attend(q, k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1))


@pytest.mark.parametrize(
    ("attention", "kv_heads"),
    [(causal, HEADS), (causal, KV_HEADS), (tiled, KV_HEADS)],
    ids=["plain", "grouped", "tiled"],
)
def test_it_is_silent(attention, kv_heads):
    for graph in traced_decoder(attention, kv_heads).values():
        assert not list(RULE.check(situation(graph)))


def test_it_is_silent_where_no_kernel_takes_grouped_heads():
    """An A100 has no kernel for grouped heads and a mask, nor for grouped heads in 32 bits."""

    def masked(q, k, v):
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril().triu(-128)
        k, v = (t.repeat_interleave(GROUP, dim=2) for t in (k, v))
        return fused(q, k, v, attn_mask=mask)

    graph = traced_decoder(masked, KV_HEADS)["prefill"]
    assert list(RULE.check(situation(graph)))
    assert not list(RULE.check(situation(graph, gpu="a100_sxm_80gb")))
    graph = traced_decoder(interleaved, KV_HEADS, torch.float32)["prefill"]
    assert not list(RULE.check(situation(graph)))


def capped(scores):
    return torch.tanh(scores / 50.0) * 50.0


def visible(scores):
    length, keys = scores.shape[-2:]
    if length == 1:
        return scores
    mask = torch.full((length, keys), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    return scores + mask


def probabilities(scores):
    return torch.softmax(visible(capped(scores * HEAD_DIM**-0.5)), dim=-1, dtype=torch.float32).to(scores.dtype)


def sunk(scores):
    """A learned logit more in each row, as models with attention sinks have; it is dropped behind softmax."""
    scores = visible(scores * HEAD_DIM**-0.5)
    sinks = scores.new_zeros((*scores.shape[:-1], 1))
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def repeat_kv(t):
    batch, heads, length, dim = t.shape
    return t[:, :, None].expand(batch, heads, GROUP, length, dim).reshape(batch, heads * GROUP, length, dim)


def spelt(softmax):
    def attention(q, k, v):
        q, k, v = heads_first(q, k, v)
        k, v = repeat_kv(k), repeat_kv(v)
        return tokens_first(torch.matmul(softmax(torch.matmul(q, k.transpose(2, 3))), v))

    return attention


def spelt_token_major(softmax):
    def attention(q, k, v):
        k, v = (t.repeat_interleave(GROUP, dim=2) for t in (k, v))
        q, k, v = heads_first(q, k, v)
        return tokens_first(softmax(q @ k.mT) @ v)

    return attention


def spelt_as_rows(softmax):
    """The twin: query heads that share a KV head are rows of one product."""

    def attention(q, k, v):
        q, k, v = heads_first(q, k, v)
        batch, heads, length, dim = q.shape
        scores = q.reshape(batch, k.shape[1], GROUP * length, dim) @ k.mT
        probs = softmax(scores.view(batch, heads, length, -1))
        out = probs.reshape(batch, k.shape[1], GROUP * length, -1) @ v
        return tokens_first(out.view(batch, heads, length, dim))

    return attention


@pytest.mark.parametrize("softmax", [probabilities, sunk], ids=["capped", "sunk"])
@pytest.mark.parametrize("spelling", [spelt, spelt_token_major], ids=["expanded", "interleaved"])
def test_products_that_no_kernel_does_become_their_twin(spelling, softmax):
    twins = traced_decoder(spelt_as_rows(softmax), KV_HEADS)
    for phase, graph in traced_decoder(spelling(softmax), KV_HEADS).items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == 2
        assert all(m.evidence["copied_bytes"] == GROUP * m.evidence["kv_bytes"] for m in found)
        assert "rows of one product" in found[0].remedy.text
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


@pytest.mark.parametrize("softmax", [probabilities, sunk], ids=["capped", "sunk"])
def test_the_twin_computes_the_same(softmax):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    written, grouped = (f(softmax)(q, k, v) for f in (spelt, spelt_as_rows))
    assert torch.allclose(written, grouped, atol=1e-5)
    assert torch.allclose(spelt_token_major(softmax)(q, k, v), grouped, atol=1e-5)


def test_what_one_kernel_could_do_is_left_to_att001():
    def plain(q, k, v):
        return spelt(lambda scores: torch.softmax(visible(scores * HEAD_DIM**-0.5), dim=-1))(q, k, v)

    for graph in traced_decoder(plain, KV_HEADS).values():
        assert not list(RULE.check(situation(graph)))


def used_elsewhere(q, k, v):
    q, k, v = heads_first(q, k, v)
    k, v = repeat_kv(k), repeat_kv(v)
    return tokens_first(probabilities(q @ k.mT) @ v + k.mean(dim=2, keepdim=True) + v.mean(dim=2, keepdim=True))


def of_another_order(q, k, v):
    """`repeat` deals KV heads out in turns."""
    q, k, v = heads_first(q, k, v)
    k, v = (t.repeat(1, GROUP, 1, 1) for t in (k, v))
    return tokens_first(probabilities(q @ k.mT) @ v)


def without_softmax(q, k, v):
    q, k, v = heads_first(q, k, v)
    return tokens_first(torch.relu(q @ repeat_kv(k).mT) @ repeat_kv(v))


@pytest.mark.parametrize(
    "attention",
    [spelt_as_rows(probabilities), used_elsewhere, of_another_order, without_softmax],
    ids=["grouped", "used elsewhere", "tiled", "no softmax"],
)
def test_it_is_silent_on_products(attention):
    for graph in traced_decoder(attention, KV_HEADS).values():
        assert not list(RULE.check(situation(graph)))


def test_a_model_with_capped_scores():
    graphs = traced("gemma-2-9b").graphs
    for graph in graphs.values():
        found = list(RULE.check(situation(graph)))
        assert len(found) == LAYERS
        assert "8 KV heads are copied for 16 query heads" in found[0].message


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2", "nanogpt", "moe", "bert-base"])
def test_models_without_it(name):
    for graph in traced(name).graphs.values():
        assert not list(RULE.check(situation(graph)))
