"""KVC001: caches that grow by concatenation, and the twin that writes in place."""

from dataclasses import replace

import pytest
import torch
from findings.attention import Stack
from findings.situations import SCENARIO, figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import kv_cache_reallocated_by_cat  # noqa: F401  # registers it
from torch import nn

(RULE,) = (r for r in registered() if r.code == "KVC001")
HEADS, WIDTH = 8, 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH, bias=False)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False)

    def split(self, x):
        batch, length, _ = x.shape
        return (t.view(batch, length, HEADS, WIDTH).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))

    def attend(self, q, k, v):
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.out(out.transpose(1, 2).flatten(2))


class Growing(Layer):
    def forward(self, x, past):
        q, k, v = self.split(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.concat((past[1], v), -2)
        return x + self.attend(q, k, v), (k, v)


class InPlace(Layer):
    """Slices of buffers that hold one position more than the context."""

    def forward(self, x, past):
        q, k, v = self.split(x)
        if past is not None:
            past[0][:, :, -1:] = k
            past[1][:, :, -1:] = v
            k, v = past
        return x + self.attend(q, k, v), (k, v)


def decoder(layer):
    return Stack([layer().to(torch.bfloat16) for _ in range(3)])


@pytest.fixture(scope="module")
def growing():
    return graphs_of(decoder(Growing))


def test_it_fires_on_each_cat_in_decode_and_not_in_prefill(growing):
    found = list(RULE.check(situation(growing["decode"])))
    assert len(found) == 6
    assert {growing["decode"].ops[m.op].target.split(".")[1] for m in found} <= {"cat", "concat"}
    assert all(m.evidence["cache_bytes"] == 2 * HEADS * 545 * WIDTH * 2 for m in found)
    assert not list(RULE.check(situation(growing["prefill"])))


def test_it_is_silent_where_rows_are_written_in_place():
    for graph in graphs_of(decoder(InPlace)).values():
        assert not list(RULE.check(situation(graph)))


def test_the_rewrite_is_the_trace_of_the_twin(growing):
    # its cache has the position that the step fills already
    longer = replace(SCENARIO, input_len=SCENARIO.input_len + 1)
    twin = graphs_of(decoder(InPlace), longer)["decode"]
    ours, theirs = figures(rewritten(growing["decode"], RULE)), figures(twin)
    assert ours == {name: pytest.approx(value, rel=0.01) for name, value in theirs.items()}
