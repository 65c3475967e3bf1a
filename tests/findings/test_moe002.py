"""MOE002: mixtures that compute every expert for every token, and twins that route."""

import functools

import pytest
import torch
from findings.situations import SCENARIO, figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import Confidence, registered
from fxroof.rules import dense_moe  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "MOE002")
WIDTH, INNER, EXPERTS, CHOSEN = 512, 1024, 8, 2


class Expert(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=bias)
        self.w2 = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, expert=Expert):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList([expert() for _ in range(EXPERTS)])

    def route(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x).float(), dim=-1), CHOSEN, dim=-1)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), chosen


class Masks(Mixture):
    def forward(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (chosen == i)).sum(dim=-1, keepdim=True)
            out = out + share * expert(x)
        return out


class MasksInPlace(Mixture):
    def forward(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out += expert(x) * torch.where(chosen == i, weights, 0).sum(-1)[..., None]
        return out


class Scattered(Mixture):
    """Gates of all experts, zero but for the chosen, over flattened tokens."""

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.route(flat)
        gates = torch.zeros(flat.shape[0], EXPERTS, dtype=x.dtype, device=x.device).scatter(1, chosen, weights)
        out = sum(gates[:, i : i + 1] * expert(flat) for i, expert in enumerate(self.experts))
        return out.view_as(x)


class OneHot(Mixture):
    def forward(self, x):
        weights, chosen = self.route(x)
        mask = F.one_hot(chosen, EXPERTS).to(x.dtype)
        gates = (mask * weights[..., None]).sum(-2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i, None] * expert(x)
        return out


class Hidden(Mixture):
    """Softmax over scores that are minus infinity but for the chosen."""

    def forward(self, x):
        scores = self.gate(x)
        best, chosen = scores.topk(CHOSEN, dim=-1)
        gates = torch.full_like(scores, float("-inf")).scatter(-1, chosen, best).softmax(dim=-1)
        return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Batched(nn.Module):
    """Weights of all experts in one tensor, tokens copied for each."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, 2 * INNER))
        self.down = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))

    route = Mixture.route


class BatchedAfter(Batched):
    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.route(flat)
        gates = torch.zeros(flat.shape[0], EXPERTS, dtype=x.dtype, device=x.device).scatter_(1, chosen, weights)
        gate, up = torch.bmm(flat.unsqueeze(0).expand(EXPERTS, -1, -1), self.up).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down)
        return (out * gates.t()[..., None]).sum(0).view_as(x)


class BatchedBefore(Batched):
    """What an expert is given is scaled: one that was not chosen computes on zeros."""

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.route(flat)
        gates = torch.zeros(flat.shape[0], EXPERTS, dtype=x.dtype, device=x.device).scatter_(1, chosen, weights)
        rows = flat.repeat(EXPERTS, 1) * gates.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(EXPERTS, -1, WIDTH), self.up).chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), self.down)
        return out.reshape(EXPERTS, -1, WIDTH).sum(dim=0).view_as(x)


def routed(mixture, x, weights, chosen, experts, *, before=False):
    """What transformers does: `experts` are applied to rows sorted by expert, given where each expert's end."""
    flat = x.reshape(-1, WIDTH)
    weights, chosen = weights.reshape(-1), chosen.reshape(-1)
    ids, order = torch.sort(chosen)
    rows, scale = flat[order // CHOSEN], weights[order]
    whole = ids.float() if ids.is_cpu else ids.int()  # the CPU counts no integers
    ends = torch.cumsum(torch.histc(whole, bins=EXPERTS, min=0, max=EXPERTS - 1), dim=0, dtype=torch.int32)
    if before:
        rows = rows * scale[:, None]
    out = experts(rows, ends, ids)
    if not before:
        out = out * scale[:, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return out[inverse].view(-1, CHOSEN, WIDTH).sum(dim=1).to(x.dtype).view_as(x)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w1, self.w3 = (nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH)) for _ in range(2))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, WIDTH, INNER))

    route = Mixture.route

    def forward(self, x):
        def experts(rows, ends, ids):
            one, other = (torch._grouped_mm(rows, w.transpose(-2, -1), offs=ends) for w in (self.w1, self.w3))
            return torch._grouped_mm(F.silu(one) * other, self.w2.transpose(-2, -1), offs=ends)

        return routed(self, x, *self.route(x), experts)


class RoutedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = (nn.Parameter(torch.empty(EXPERTS, *shape)) for shape in ((INNER, WIDTH), (WIDTH, INNER)))
        self.up_bias, self.down_bias = (nn.Parameter(torch.empty(EXPERTS, size)) for size in (INNER, WIDTH))

    route = Mixture.route

    def forward(self, x):
        def experts(rows, ends, ids):
            h = torch._grouped_mm(rows, self.up.transpose(-2, -1), offs=ends) + self.up_bias[ids]
            return torch._grouped_mm(F.gelu(h), self.down.transpose(-2, -1), offs=ends) + self.down_bias[ids]

        return routed(self, x, *self.route(x), experts)


class RoutedBatched(Batched):
    before = False

    def forward(self, x):
        def experts(rows, ends, ids):
            one, other = torch._grouped_mm(rows, self.up, offs=ends).chunk(2, dim=-1)
            return torch._grouped_mm(F.silu(one) * other, self.down, offs=ends)

        return routed(self, x, *self.route(x), experts, before=self.before)


class RoutedBatchedBefore(RoutedBatched):
    before = True


class Decoder(nn.Module):
    def __init__(self, mixture, layers):
        super().__init__()
        self.embed = nn.Embedding(500, WIDTH)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH) for _ in range(layers)])
        self.layers = nn.ModuleList([mixture() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, 500, bias=False)
        self.to(torch.bfloat16)

    def forward(self, tokens, cache=None):
        x = self.embed(tokens)
        kept = x[:, -1:] if cache is None else cache + x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x), kept


@functools.cache
def traced_decoder(mixture, layers=1):
    with torch.device("meta"):
        module = Decoder(mixture, layers)
    return graphs_of(module)


PAIRS = [
    (Masks, Routed, 2),
    (MasksInPlace, Routed, 1),
    (Scattered, Routed, 1),
    (OneHot, Routed, 1),
    (lambda: Masks(Mlp), RoutedMlp, 1),
    (BatchedAfter, RoutedBatched, 1),
    (BatchedBefore, RoutedBatchedBefore, 1),
]


@pytest.mark.parametrize(("bad", "good", "layers"), PAIRS)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good, layers):
    graphs, twins = traced_decoder(bad, layers), traced_decoder(good, layers)
    assert set(graphs) == {"prefill", "decode"}
    for phase, graph in graphs.items():
        found = list(RULE.check(situation(graph)))
        assert len(found) == layers
        assert all(m.confidence is Confidence.HIGH for m in found)
        assert not list(RULE.check(situation(twins[phase])))
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {k: pytest.approx(v, rel=0.01) for k, v in theirs.items()}


def stacked(experts, name):
    return torch.stack([getattr(expert, name).weight for expert in experts])


@pytest.mark.parametrize("bad", [Masks, MasksInPlace, Scattered, OneHot])
def test_routing_changes_no_number(bad):
    torch.manual_seed(0)
    dense = bad()
    x = torch.randn(2, 5, WIDTH)

    def experts(rows, ends, ids):
        w1, w2, w3 = (stacked(dense.experts, name)[ids] for name in ("w1", "w2", "w3"))
        h = F.silu(torch.einsum("rc,rfc->rf", rows, w1)) * torch.einsum("rc,rfc->rf", rows, w3)
        return torch.einsum("rf,rcf->rc", h, w2)

    torch.testing.assert_close(dense(x), routed(dense, x, *dense.route(x), experts), rtol=1e-4, atol=1e-5)


def test_softmax_over_the_chosen_alone_is_found_too():
    for graph in traced_decoder(Hidden).values():
        assert len(list(RULE.check(situation(graph)))) == 1
        assert figures(rewritten(graph, RULE))["FLOPs"] < figures(graph)["FLOPs"]


@pytest.mark.parametrize(("bad", "before"), [(BatchedAfter, False), (BatchedBefore, True)])
def test_routing_batches_changes_no_number(bad, before):
    torch.manual_seed(0)
    dense = bad()
    nn.init.normal_(dense.up, std=0.02)
    nn.init.normal_(dense.down, std=0.02)
    x = torch.randn(2, 5, WIDTH)

    def experts(rows, ends, ids):
        one, other = torch.einsum("rc,rcf->rf", rows, dense.up[ids]).chunk(2, dim=-1)
        return torch.einsum("rf,rfc->rc", F.silu(one) * other, dense.down[ids])

    right = routed(dense, x, *dense.route(x), experts, before=before)
    torch.testing.assert_close(dense(x), right, rtol=1e-4, atol=1e-5)


class Soft(Mixture):
    """Every expert counts: nothing is chosen."""

    def forward(self, x):
        gates = F.softmax(self.gate(x), dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i, None] * expert(x)
        return out


class AllChosen(Mixture):
    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), EXPERTS, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + (weights * (chosen == i)).sum(-1, keepdim=True) * expert(x)
        return out


class NotBound(Mixture):
    """A choice is made and its experts are computed, but the sum does not follow it."""

    def forward(self, x):
        weights, _ = self.route(x)
        gates = F.softmax(self.gate(x), dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i, None] * expert(x)
        return out * weights.sum(-1, keepdim=True)


class NotZero(Mixture):
    """The softmax of zeros and what was chosen: every expert counts."""

    def forward(self, x):
        weights, chosen = self.route(x)
        gates = torch.zeros(*x.shape[:-1], EXPERTS, dtype=x.dtype, device=x.device).scatter(-1, chosen, weights)
        gates = F.softmax(gates, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i, None] * expert(x)
        return out


class SameForAll(Mixture):
    def forward(self, x):
        weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for expert in self.experts:
            out = out + weights.sum(-1, keepdim=True) * expert(x)
        return out


class ResultsUsedElsewhere(Mixture):
    def forward(self, x):
        weights, chosen = self.route(x)
        out, seen = torch.zeros_like(x), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (chosen == i)).sum(dim=-1, keepdim=True)
            result = expert(x)
            seen = seen + result
            out = out + share * result
        return out + seen


class OneExpertShared(Mixture):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([self.experts[0]] * EXPERTS)

    forward = Masks.forward


class ScaledBeforeWithGelu(BatchedBefore):
    """A bias makes an expert that is given zeros return something."""

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.route(flat)
        gates = torch.zeros(flat.shape[0], EXPERTS, dtype=x.dtype, device=x.device).scatter_(1, chosen, weights)
        rows = flat.repeat(EXPERTS, 1) * gates.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(EXPERTS, -1, WIDTH), self.up).chunk(2, dim=-1)
        out = torch.bmm(up * torch.sigmoid(gate) + 1.0, self.down)
        return out.reshape(EXPERTS, -1, WIDTH).sum(dim=0).view_as(x)


@pytest.mark.parametrize(
    "mixture",
    [Soft, AllChosen, NotBound, NotZero, SameForAll, ResultsUsedElsewhere, OneExpertShared, ScaledBeforeWithGelu],
)
def test_it_is_silent(mixture):
    for graph in traced_decoder(mixture).values():
        assert not list(RULE.check(situation(graph)))


@pytest.mark.parametrize(
    ("model", "mixtures"), [("moe", 4), ("llama-4-scout", 4), ("mixtral-8x7b", 0), ("qwen3-30b-a3b", 0)]
)
def test_real_models(model, mixtures):
    graphs = traced(model).graphs
    for phase in ("prefill", "decode"):
        assert len(list(RULE.check(situation(graphs[phase])))) == mixtures


def test_a_prompt_costs_a_share_of_the_experts():
    assert SCENARIO.batch_size * SCENARIO.input_len > EXPERTS
    graph = traced_decoder(Masks)["prefill"]
    head = 2 * SCENARIO.batch_size * SCENARIO.input_len * WIDTH * (500 + EXPERTS)
    dense, sparse = (figures(g)["FLOPs"] - head for g in (graph, rewritten(graph, RULE)))
    assert dense / sparse == pytest.approx(EXPERTS / CHOSEN, rel=0.01)
