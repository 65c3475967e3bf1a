"""ATT003: keys and values copied for the query heads, and the twin that passes them as they are."""

import pytest
import torch
from findings.attention import HEAD_DIM, HEADS, KV_HEADS, Decoder, causal, fused, heads_first, tokens_first
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import repeated_kv_heads  # noqa: F401  # registers it
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
    twins = graphs_of(Decoder(causal, KV_HEADS))
    for phase, graph in graphs_of(Decoder(spelling, KV_HEADS)).items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == 2
        assert all(m.evidence["copied_bytes"] == GROUP * m.evidence["kv_bytes"] for m in found)
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}


def test_one_head_repeated():
    def tiled(q, k, v):
        q, k, v = heads_first(q, k, v)
        return attend(q, k.repeat(1, HEADS, 1, 1), v.repeat(1, HEADS, 1, 1))

    twins = graphs_of(Decoder(causal, 1))
    for phase, graph in graphs_of(Decoder(tiled, 1)).items():
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
    for graph in graphs_of(Decoder(attention, kv_heads)).values():
        assert not list(RULE.check(situation(graph)))


def test_it_is_silent_where_no_kernel_takes_grouped_heads():
    """An A100 has no kernel for grouped heads and a mask, nor for grouped heads in 32 bits."""

    def masked(q, k, v):
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril().triu(-128)
        k, v = (t.repeat_interleave(GROUP, dim=2) for t in (k, v))
        return fused(q, k, v, attn_mask=mask)

    graph = graphs_of(Decoder(masked, KV_HEADS))["prefill"]
    assert list(RULE.check(situation(graph)))
    assert not list(RULE.check(situation(graph, gpu="a100_sxm_80gb")))
    graph = graphs_of(Decoder(interleaved, KV_HEADS, torch.float32))["prefill"]
    assert not list(RULE.check(situation(graph)))
