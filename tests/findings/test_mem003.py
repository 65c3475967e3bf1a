"""MEM003: copies between host and device, and twins that make none; and what it costs to offload what does not fit."""

import dataclasses

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import Confidence, Severity, registered
from fxroof.analyzer.memory import CacheGrowth, CachePart, memory
from fxroof.analyzer.review import review
from fxroof.hardware.catalog import load
from fxroof.rules import host_offload  # noqa: F401  # registers it
from support import SHORT, traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "MEM003")
WIDTH = 512


def asked(name="llama-3-8b", *, missing=10**9, gpu="h100_sxm", phase="decode"):
    """A model on a part with so many bytes too few."""
    graphs = traced(name).graphs
    phases = {n: situation(g, gpu=gpu) for n, g in graphs.items()}
    growth = CacheGrowth(parts=(CachePart(count=1, fixed_bytes=0, bytes_per_token=2**20),))
    costs = {n: s.costs for n, s in phases.items()}
    part, parameters = load(gpu).gpu, traced(name).model.parameter_bytes
    known = memory(graphs, costs, part, SHORT, parameter_bytes=parameters, growth=growth)
    part = dataclasses.replace(part, memory_usable_bytes=known.total_bytes - missing)
    known = memory(graphs, costs, part, SHORT, parameter_bytes=parameters, growth=growth)
    others = {n: s.analysis for n, s in phases.items() if n != phase}
    return dataclasses.replace(phases[phase], gpu=part, memory=known, others=others, scenario=SHORT)


def test_it_is_arithmetic_on_what_is_missing():
    found = asked()
    (match,) = RULE.check(found)
    assert (RULE.severity, match.always, match.saving, match.rewrite) == (Severity.WARNING, True, None, None)
    read = found.analysis.floor.weight_bytes / found.memory.weights_bytes
    assert 0.6 < read <= 1.0  # all but most rows of the embedding
    crossing = match.evidence["bytes_over_the_link_a_step"]
    assert crossing == pytest.approx(1e9 * read)
    assert match.evidence["missing_bytes"] == 10**9
    assert match.evidence["seconds_over_the_link"] == pytest.approx(crossing / 64e9)
    assert match.evidence["seconds_from_device_memory"] == pytest.approx(crossing / found.gpu.memory_bandwidth)
    assert match.evidence["host_link"].startswith("64 GB/s one way")
    assert "a step of decode would wait at least" in match.message


def test_experts_that_no_token_meets_do_not_cross():
    dense, sparse = (next(iter(RULE.check(asked(name)))).evidence for name in ("llama-3-8b", "mixtral-8x7b"))
    assert sparse["bytes_over_the_link_a_step"] < 0.7 * dense["bytes_over_the_link_a_step"]


def test_it_is_said_once():
    assert not list(RULE.check(asked(phase="prefill")))
    assert list(RULE.check(asked(phase="decode")))
    alone = asked("vit", phase="forward")
    assert list(RULE.check(alone))


def test_never_more_than_the_weights():
    found = asked()
    lack = dataclasses.replace(found.memory, headroom_bytes=-100 * 10**9)
    (match,) = RULE.check(dataclasses.replace(found, memory=lack))
    assert match.evidence["bytes_over_the_link_a_step"] <= found.memory.weights_bytes


@pytest.mark.parametrize("gpu", ["m2_ultra", "dgx_spark_gb10"])
def test_it_is_silent_where_memory_is_the_host_s(gpu):
    assert load(gpu).gpu.host_bandwidth is None
    assert not list(RULE.check(asked(gpu=gpu)))


def test_it_is_silent_where_all_fits_or_nothing_is_known():
    found = asked()
    fits = dataclasses.replace(found.memory, fits=True, headroom_bytes=1)
    for known in (fits, dataclasses.replace(found.memory, fits=None, headroom_bytes=None), None):
        assert not list(RULE.check(dataclasses.replace(found, memory=known)))


# copies that a forward makes itself


class Block(nn.Module):
    """Layers with something between them."""

    def __init__(self, function, layers=3):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
        self.device = torch.device("cpu")  # as where a script asks torch.cuda.is_available() and there is none

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(self.function(self, layer, x))
        return x


def forward_of(function):
    return graphs_of(Block(function), inputs=(f"x=2x128x{WIDTH}",))["forward"]


def matches(graph, **more):
    return list(RULE.check(situation(graph, **more)))


def bring_a_layer(block, layer, x):
    layer.to("cuda")
    x = layer(x)
    layer.to("cpu")
    return x


def bring_a_layer_by_method(block, layer, x):
    x = layer.cuda()(x)
    layer.cpu()
    return x


def bring_a_layer_early(block, layer, x):
    x = layer.to(x.device, non_blocking=True)(x)
    layer.to(device=torch.device("cpu"), non_blocking=True)
    return x


def plain(block, layer, x):
    return layer(x)


def go_to_the_host(block, layer, x):
    return layer((x.cpu() * 2).cuda())


def stay(block, layer, x):
    return layer(x * 2)


def go_to_the_host_narrow(block, layer, x):
    return layer(x.to("cpu", torch.float16).to("cuda", torch.float32, non_blocking=True))


def stay_narrow(block, layer, x):
    return layer(x.to(torch.float16).to(torch.float32))


def mask_on_the_host(block, layer, x):
    t = x.shape[1]
    mask = torch.tril(torch.ones(t, t, device="cpu")).to(x.device)
    return mask @ layer(x)


def mask_by_default(block, layer, x):
    t = x.shape[1]
    return torch.ones(t, t).tril().cuda(non_blocking=True) @ layer(x)


def mask_of_its_type(block, layer, x):
    t = x.shape[1]
    return torch.ones(t, t).tril().type_as(x) @ layer(x)


def mask_for_the_run(block, layer, x):
    t = x.shape[1]
    return torch.ones(t, t).tril().to(block.device) @ layer(x)


def mask_on_the_device(block, layer, x):
    t = x.shape[1]
    return torch.ones(t, t, device=x.device).tril() @ layer(x)


def write_to_the_copy(block, layer, x):
    y = x.cpu()
    y.add_(1)
    return layer(y.to(x.device)) + x


def write_to_a_clone(block, layer, x):
    y = x.clone()
    y.add_(1)
    return layer(y) + x


def part_to_the_host(block, layer, x):
    return layer(torch.cat([x[..., :128].cpu().cuda(), x[..., 128:]], -1))


def part(block, layer, x):
    return layer(torch.cat([x[..., :128], x[..., 128:]], -1))


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        (bring_a_layer, plain),
        (bring_a_layer_by_method, plain),
        (bring_a_layer_early, plain),
        (go_to_the_host, stay),
        (go_to_the_host_narrow, stay_narrow),
        (mask_on_the_host, mask_on_the_device),
        (mask_by_default, mask_on_the_device),
        (mask_of_its_type, mask_on_the_device),
        (mask_for_the_run, mask_on_the_device),
        (write_to_the_copy, write_to_a_clone),
        (part_to_the_host, part),
    ],
)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good):
    graph, twin = forward_of(bad), forward_of(good)
    found = matches(graph)
    assert found
    assert {m.confidence for m in found} == {Confidence.HIGH}
    first = bad.__code__.co_firstlineno
    lines = {line for _, _, line in bad.__code__.co_lines() if line}
    assert all(first < graph.ops[m.op].anchor.line <= max(lines) for m in found)
    assert not matches(twin)
    assert figures(rewritten(graph, RULE)) == pytest.approx(figures(twin), rel=0.01)


def test_the_remedy_changes_no_result():
    block, x = Block(mask_on_the_host), torch.randn(2, 8, WIDTH)
    result = block(x)
    block.function = mask_on_the_device
    torch.testing.assert_close(block(x), result)


def results_on_the_host(block, layer, x):
    return layer(x) if layer is not block.layers[-1] else layer(x).cpu() * 2


def a_guard(block, layer, x):
    return F.linear(x.to(layer.weight.device), layer.weight.to(x.device), layer.bias.cuda())


def a_setting(block, layer, x):
    return layer.to(block.device)(x.to(block.device)) + torch.zeros(WIDTH, device=block.device)


def a_number(block, layer, x):
    return layer(x) * torch.tensor(0.5)


@pytest.mark.parametrize("good", [plain, results_on_the_host, a_guard, a_setting, a_number])
def test_it_is_silent_where_nothing_crosses_that_need_not(good):
    assert not matches(forward_of(good))


@pytest.mark.parametrize(("numbers", "found"), [(1, 0), (8191, 0), (8192, 3)])
def test_few_bytes_made_on_the_host_are_not_worth_their_line(numbers, found):
    def made(block, layer, x):
        return layer(x) + torch.arange(numbers).to(x.device).sum()

    assert len(matches(forward_of(made))) == found  # 8 bytes each


def test_few_bytes_that_go_and_return_are_found_all_the_same():
    def there_and_back(block, layer, x):
        return layer(x) + (x[0, 0, :1].cpu() * 2).cuda()

    assert {m.message for m in matches(forward_of(there_and_back))} == {"a tensor goes to the host and comes back"}


def test_copies_are_not_reported_where_the_rest_takes_much_longer():
    def larger(block, layer, x):
        return layer(x) + torch.arange(8192).to(x.device)[:WIDTH]

    graph = graphs_of(Block(larger), inputs=(f"x=64x8192x{WIDTH}",))["forward"]
    assert len(matches(graph)) == 3
    assert not review({"forward": situation(graph)}, [RULE]).findings


def test_values_out_of_the_program_may_have_to_cross():
    def listed(block, layer, x):
        return layer(x) + torch.tensor([1.0] * 2**14).cuda()[:WIDTH]

    found = matches(forward_of(listed))
    assert [m.confidence for m in found] == [Confidence.MEDIUM] * 3


def test_the_evidence_is_of_the_layer():
    found = matches(forward_of(bring_a_layer))
    assert sum(m.evidence["bytes_over_the_link_a_step"] for m in found) == 2 * 3 * (WIDTH + 1) * WIDTH * 4
    weight = found[0].evidence
    assert weight["device_memory_to_keep_it_bytes"] == WIDTH * WIDTH * 4
    assert weight["seconds_over_the_link"] == pytest.approx(WIDTH * WIDTH * 4 / 64e9)
    assert weight["seconds_from_device_memory"] == pytest.approx(WIDTH * WIDTH * 4 / 3.35e12, rel=0.01)
    assert (weight["copies_waited_for"], found[-1].evidence["copies_waited_for"]) == (1, 1)
    found = matches(forward_of(bring_a_layer_early))
    assert {m.evidence["copies_waited_for"] for m in found} == {0}


def test_where_weights_do_not_fit_the_remedy_is_another():
    model = asked()
    graph = forward_of(bring_a_layer)
    found = matches(graph, memory=model.memory)
    assert model.memory.fits is False
    assert {(m.op is None, m.confidence) for m in found} == {(False, Confidence.LOW)}  # what is seen is not guessed too
    assert {m.remedy.text[:11] for m in found} == {"Make it fit"}


def test_without_a_published_link_its_seconds_are_not_stated():
    (match, *_) = matches(forward_of(go_to_the_host), gpu="m2_ultra")
    assert match.evidence["host_link"] == "no published rate"
    assert "seconds_over_the_link" not in match.evidence


def test_the_few_frequencies_that_diffusion_transformers_make_on_the_host_are_none():
    graph = traced("dit").graphs["forward"]
    assert any(op.target.startswith("fxroof.to_device.") for op in graph.ops)
    assert not matches(graph)


class Kept(nn.Module):
    """Attention over a cache that lies where a function puts it."""

    def __init__(self, bring, send):
        super().__init__()
        self.embed = nn.Embedding(500, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bring, self.send = bring, send

    def forward(self, tokens, past_key_values=None):
        q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in self.qkv(self.embed(tokens)).chunk(3, -1))
        if past_key_values is not None:
            past_k, past_v = (self.bring(t) for t in past_key_values[0])
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past_key_values is None)
        return out.transpose(1, 2).flatten(-2), ((self.send(k), self.send(v)),)


def test_a_cache_on_the_host_crosses_both_ways():
    graphs = graphs_of(Kept(lambda t: t.cuda(), lambda t: t.cpu()))
    twins = graphs_of(Kept(lambda t: t, lambda t: t))
    assert [g.ops[m.op].target.split(".")[1] for g in graphs.values() for m in matches(g)] == [
        *["to_host"] * 2,  # a prefill makes it
        *["to_device"] * 2,  # a decode begins with it where the step before left it
        *["to_host"] * 2,
    ]
    for phase, graph in graphs.items():
        assert {m.message for m in matches(graph)} == {"the cache crosses the link to the host in every step"}
        assert figures(rewritten(graph, RULE)) == pytest.approx(figures(twins[phase]), rel=0.01)
