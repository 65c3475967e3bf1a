"""DTY001: products on vector units, and twins whose programs allow TF32 or are in float16."""

import contextlib

import pytest
import torch
from findings.attention import HEAD_DIM, Decoder, causal, heads_first, tokens_first, traced_decoder
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.finding import registered
from fxroof.analyzer.rewrite import Draft
from fxroof.hardware.catalog import load
from fxroof.rules import (
    materialized_attention_scores,
    matmul_off_tensor_cores,  # noqa: F401  # registers it
)
from support import traced
from torch import nn

(RULE,) = (r for r in registered() if r.code == "DTY001")
WIDTH = 1024


@contextlib.contextmanager
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Products(nn.Module):
    """One product on (4, 2048, 1024) by `multiply(model, x)`."""

    def __init__(self, multiply, dtype=torch.float32):
        super().__init__()
        self.multiply = multiply
        self.layer, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.conv, self.large = nn.Conv1d(2048, 2048, 3), nn.Linear(WIDTH, 65536)
        self.to(dtype)

    def forward(self, x):
        return self.multiply(self, x)


def graph_of(multiply, dtype="float32"):
    with torch.device("meta"):
        module = Products(multiply, getattr(torch, dtype))
    return graphs_of(module, inputs=(f"x=4x2048x1024:{dtype}",))["forward"]


PRODUCTS = {
    "linear": lambda model, x: model.layer(x),
    "matmul": lambda model, x: x @ model.weight,
    "bmm": lambda model, x: torch.bmm(x, x.transpose(1, 2)),
    "baddbmm": lambda model, x: torch.baddbmm(x, x, model.weight.expand(4, WIDTH, WIDTH)),
    "addmm": lambda model, x: torch.addmm(x[0], x[0], model.weight),
    "einsum": lambda model, x: torch.einsum("bsd,de->bse", x, model.weight),
}


def agree(graph, twin, gpu=None):
    assert figures(graph) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}
    if gpu is not None:
        ours, theirs = (analyze_phase(g, load(gpu).gpu)[0].seconds for g in (graph, twin))
        assert (ours.bound, ours.estimate) == pytest.approx((theirs.bound, theirs.estimate), rel=0.01)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_rewrite_is_the_trace_of_the_twin(name):
    graph = graph_of(PRODUCTS[name])
    with tf32():
        twin = graph_of(PRODUCTS[name])
    (found,) = RULE.check(situation(graph))
    assert "vector" in found.evidence["runs_on"]
    assert "tensor tfloat32" in found.evidence["could_run_on"]
    assert not list(RULE.check(situation(twin)))
    agree(rewritten(graph, RULE), twin, "h100_sxm")


def test_a_model_in_float32():
    graphs = traced_decoder(causal, dtype=torch.float32)
    with tf32():
        twin = graphs_of(Decoder(causal, dtype=torch.float32))["prefill"]
    assert len(list(RULE.check(situation(graphs["prefill"])))) == 7  # three a layer and the head
    agree(rewritten(graphs["prefill"], RULE), twin, "h100_sxm")


def test_the_bound_is_that_of_the_matrix_units():
    graph = graph_of(PRODUCTS["matmul"])
    before, after = (analyze_phase(g, load("h100_sxm").gpu)[0].seconds.bound for g in (graph, rewritten(graph, RULE)))
    assert before / after == pytest.approx(494.7 / 66.9, rel=0.01)


@pytest.mark.parametrize("gpu", ["t4", "v100_sxm2_16gb"])
def test_bfloat16_where_only_float16_is_fast(gpu):
    graphs = traced_decoder(causal)
    twins = traced_decoder(causal, dtype=torch.float16)
    (found,) = RULE.check(situation(graphs["prefill"], gpu=gpu))
    assert found.op is None
    draft = Draft(graphs["prefill"])
    found.rewrite(draft)
    agree(draft.finish(), twins["prefill"], gpu)
    assert not list(RULE.check(situation(twins["prefill"], gpu=gpu)))


@pytest.mark.parametrize(
    ("multiply", "dtype", "gpu"),
    [
        (PRODUCTS["linear"], "bfloat16", "h100_sxm"),
        (PRODUCTS["linear"], "float64", "h100_sxm"),
        (PRODUCTS["linear"], "float32", "t4"),
        (PRODUCTS["linear"], "float32", "mi300x"),
        (lambda model, x: model.conv(x), "float32", "h100_sxm"),
        (lambda model, x: model.large(x[:, :1]), "float32", "h100_sxm"),
        (lambda model, x: nn.functional.scaled_dot_product_attention(x, x, x), "float32", "h100_sxm"),
        (lambda model, x: x * model.weight[0], "float32", "h100_sxm"),
    ],
    ids=["narrow", "float64 units", "no TF32", "float32 units", "convolution", "memory-bound", "attention", "vector"],
)
def test_it_is_silent(multiply, dtype, gpu):
    assert not list(RULE.check(situation(graph_of(multiply, dtype), gpu=gpu)))


def widened_scores(q, k, v):
    """GPT-J: the products of bfloat16 queries and keys in float32."""
    q, k, v = heads_first(q, k, v)
    scores = q.float() @ k.float().mT / HEAD_DIM**0.5
    return tokens_first(scores.softmax(-1).to(v.dtype) @ v)


def capped_scores(q, k, v):
    """No fused kernel caps scores."""
    q, k, v = heads_first(q, k, v)
    scores = 30 * torch.tanh(q.float() @ k.float().mT / 30)
    return tokens_first(scores.softmax(-1).to(v.dtype) @ v)


@pytest.mark.parametrize(("attend", "found"), [(widened_scores, 0), (capped_scores, 2)])
def test_attention_that_one_kernel_could_do_is_another_finding(attend, found):
    graph = traced_decoder(attend)["prefill"]
    fusable = situation(graph).once(materialized_attention_scores.found)
    assert len(fusable) == 2 - found
    assert len(list(RULE.check(situation(graph)))) == found


@pytest.mark.parametrize(("model", "found"), [("nanogpt", True), ("llama-3-8b", False), ("mymodel", False)])
def test_real_models(model, found):
    graph = traced(model).graphs["prefill"]
    assert bool(list(RULE.check(situation(graph)))) == found
