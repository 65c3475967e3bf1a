"""SHP001: layers off 16 bytes, and twins that are padded and cut."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.finding import registered
from fxroof.hardware.catalog import load
from fxroof.rules import misaligned_matmul  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "SHP001")


class Layer(nn.Module):
    """A linear layer, padded to some number of inputs and outputs."""

    def __init__(self, inner, rows, *, bias=False, wide_inner=None, wide_rows=None, dtype=torch.bfloat16):
        super().__init__()
        self.rows, self.missing = rows, (wide_inner or inner) - inner
        self.layer = nn.Linear(wide_inner or inner, wide_rows or rows, bias=bias).to(dtype)

    def forward(self, x):
        out = self.layer(F.pad(x, (0, self.missing)) if self.missing else x)
        return (out[..., : self.rows] if out.shape[-1] > self.rows else out) * 2


def graph_of(inner, rows, length=8192, *, dtype="bfloat16", **more):
    with torch.device("meta"):
        module = Layer(inner, rows, dtype=getattr(torch, dtype), **more)
    return graphs_of(module, inputs=(f"x=2x{length}x{inner}:{dtype}",))["forward"]


def estimate(graph, gpu="h100_sxm"):
    return analyze_phase(graph, load(gpu).gpu)[0].seconds.estimate


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inner", "rows", "wide"),
    [
        (2048, 50257, {"wide_rows": 50304}),
        (2048, 1004, {"wide_rows": 1008}),
        (4100, 4096, {"wide_inner": 4104}),
        (4097, 2049, {"wide_inner": 4104, "wide_rows": 2112}),
    ],
)
def test_the_rewrite_is_the_trace_of_the_twin(inner, rows, wide, bias):
    graph, twin = graph_of(inner, rows, bias=bias), graph_of(inner, rows, bias=bias, **wide)
    (found,) = RULE.check(situation(graph))
    assert found.evidence["outputs_padded"] == wide.get("wide_rows", rows)
    assert found.evidence["inputs_padded"] == wide.get("wide_inner", inner)
    ours = rewritten(graph, RULE)
    assert figures(ours) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}
    assert estimate(ours) == pytest.approx(estimate(twin), rel=0.01)
    assert not list(RULE.check(situation(twin)))


def test_a_padded_head_takes_less():
    graph = graph_of(2048, 50257)
    assert estimate(rewritten(graph, RULE)) < 0.8 * estimate(graph)


def test_where_nothing_is_published_nothing_is_saved():
    graph = graph_of(2048, 50257)
    after = rewritten(graph, RULE)
    assert estimate(after, "a100_sxm_80gb") >= 0.99 * estimate(graph, "a100_sxm_80gb")


@pytest.mark.parametrize(
    ("inner", "rows", "more"),
    [
        (2048, 50304, {}),
        (2048, 50264, {}),
        (2048, 50257, {"length": 1}),
        (2048, 50257, {"dtype": "float32"}),
    ],
    ids=["64", "8", "memory-bound", "vector units"],
)
def test_it_is_silent(inner, rows, more):
    assert not list(RULE.check(situation(graph_of(inner, rows, **more))))


def test_the_remedy_changes_no_number():
    torch.manual_seed(0)
    layer, wide = Layer(13, 9, dtype=torch.float32), Layer(13, 9, wide_inner=16, wide_rows=16, dtype=torch.float32)
    x = torch.randn(2, 3, 13)
    with torch.no_grad():
        wide.layer.weight.zero_()[:9, :13] = layer.layer.weight
        torch.testing.assert_close(wide(x), layer(x))


@pytest.mark.parametrize(("model", "findings"), [("llama-3-8b", 0), ("gpt2", 0), ("moe", 0)])
def test_real_models(model, findings):
    """The head of gpt2 computes one position a sequence, which memory limits."""
    found = [m for graph in traced(model).graphs.values() for m in RULE.check(situation(graph))]
    assert len(found) == findings
