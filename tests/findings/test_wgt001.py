"""WGT001: linears that wait for their weights, and twins whose weights are packed."""

import dataclasses

import pytest
import torch
from findings.situations import figures, graphs_of, situation
from fxroof.analyzer.finding import registered
from fxroof.analyzer.packed import PackedLinear
from fxroof.analyzer.rewrite import Draft
from fxroof.rules import memory_bound_weight_streaming  # noqa: F401  # registers it
from torch import nn

(RULE,) = (r for r in registered() if r.code == "WGT001")
INNER, ROWS = 4096, 14336  # more than a cache holds


class Mlp(nn.Module):
    def __init__(self, packing=None):
        super().__init__()
        self.embed = nn.Embedding(300, INNER)
        self.up, self.down = nn.Linear(INNER, ROWS), nn.Linear(ROWS, INNER, bias=False)
        self.head = nn.Linear(INNER, 300, bias=False)
        self.to(torch.bfloat16)
        if packing is not None:
            self.up, self.down, self.head = (packing(m) for m in (self.up, self.down, self.head))

    def forward(self, tokens, cache=None):
        x = self.embed(tokens)
        kept = x[:, -1:] if cache is None else cache + x
        return self.head(x + self.down(nn.functional.relu(self.up(x)))), kept


def packed(dtype, per_byte, scale, group):
    def pack(linear):
        rows, inner = linear.weight.shape
        tensors = {
            "_qweight": torch.empty(rows, -(-inner // per_byte), dtype=dtype, device="meta"),
            "_scales": torch.empty(rows, -(-inner // min(group, inner)), dtype=scale, device="meta"),
        }
        return PackedLinear(linear, tensors, zeros=False, ordered=False)

    return pack


TWINS = {
    "fp8 weights": packed(torch.float8_e4m3fn, 1, torch.float32, 10**9),
    "int8 weights": packed(torch.int8, 1, torch.float32, 10**9),
    "int4 weights": packed(torch.uint8, 2, torch.bfloat16, 128),
}


@pytest.fixture(scope="module")
def graphs():
    with torch.device("meta"):
        return graphs_of(Mlp())


def test_it_fires_in_decode_and_not_where_arithmetic_takes_longer(graphs):
    assert len(list(RULE.check(situation(graphs["decode"])))) == 3
    many = dataclasses.replace(graphs["prefill"])
    fired = [many.ops[m.op].module for m in RULE.check(situation(many))]
    assert "up" not in " ".join(fired)


@pytest.mark.parametrize("name", TWINS)
def test_each_width_is_the_trace_of_its_twin(graphs, name):
    draft = Draft(graphs["decode"])
    for match in RULE.check(situation(graphs["decode"])):
        rewrite = match.alternatives.get(name, match.rewrite)
        assert rewrite is not None
        rewrite(draft)
    with torch.device("meta"):
        module = Mlp(TWINS[name])
    twin = graphs_of(module)["decode"]
    assert figures(draft.finish()) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


def test_only_widths_that_the_part_multiplies_are_offered(graphs):
    a100 = next(iter(RULE.check(situation(graphs["decode"], gpu="a100_sxm_80gb"))))
    b200 = next(iter(RULE.check(situation(graphs["decode"], gpu="b200"))))
    assert set(a100.alternatives) == {"int4 weights"}
    assert set(b200.alternatives) == {"int8 weights", "int4 weights", "nvfp4 weights"}
