"""LCH002: values that the host waits for, and twins that keep them on the GPU; and how waiting is estimated."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.estimate import Launch, derating, queued
from fxroof.analyzer.finding import Confidence, registered
from fxroof.hardware.catalog import load
from fxroof.rules import host_sync  # noqa: F401  # registers it
from hypothesis import given
from hypothesis import strategies as st
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "LCH002")
WIDTH = 512
READ_BACK = derating(load("h100_sxm").gpu).read_back.value


class Block(nn.Module):
    def __init__(self, function, layers=4):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
        self.token = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(self.function(self, layer(x)))
        return x


def forward_of(function):
    return graphs_of(Block(function), inputs=(f"x=2x128x{WIDTH}",))["forward"]


def estimates(graph):
    return {e: situation(graph, execution=e).analysis.seconds.estimate for e in ("eager", "compiled")}


def read_a_scale(block, h):
    return h * h.abs().max().item()


def keep_a_scale(block, h):
    return h * h.abs().max()


def read_a_limit(block, h):
    return h.clamp(max=h.mean().item())


def keep_a_limit(block, h):
    return h.clamp(max=h.mean())


def read_a_count(block, h):
    return h / (h[..., 0] > 0).sum().item()


def keep_a_count(block, h):
    return h / (h[..., 0] > 0).sum()


def read_a_list(block, h):
    low, high = h.aminmax()
    low, high = torch.stack([low, high]).tolist()
    return h - low


def keep_a_list(block, h):
    low, high = h.aminmax()
    low, high = torch.stack([low, high]).unbind()
    return h - low


def assign_under_a_mask(block, h):
    h[h[..., 0] > 0] = block.token
    return h


def choose_under_a_mask(block, h):
    return torch.where((h[..., 0] > 0)[..., None], block.token, h)


def count(block, h):
    return h * torch.bincount((h[0, :, 0] > 0).long(), minlength=WIDTH)


def histogram(block, h):
    return h * torch.histc((h[0, :, 0] > 0).long(), bins=WIDTH, min=0, max=WIDTH - 1)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        (read_a_scale, keep_a_scale),
        (read_a_limit, keep_a_limit),
        (read_a_count, keep_a_count),
        (read_a_list, keep_a_list),
        (assign_under_a_mask, choose_under_a_mask),
        (count, histogram),
    ],
)
def test_the_rewrite_is_the_trace_of_the_twin(bad, good):
    graph, twin = forward_of(bad), forward_of(good)
    found = list(RULE.check(situation(graph)))
    assert len(found) == 4
    assert {m.confidence for m in found} == {Confidence.HIGH}
    assert not list(RULE.check(situation(twin)))
    ours = rewritten(graph, RULE)
    assert figures(ours) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}
    assert estimates(ours) == {k: pytest.approx(v, rel=0.01) for k, v in estimates(twin).items()}
    assert estimates(graph)["eager"] > 1.2 * estimates(ours)["eager"]


@pytest.mark.parametrize(("bad", "good"), [(read_a_scale, keep_a_scale), (assign_under_a_mask, choose_under_a_mask)])
def test_keeping_it_changes_no_number(bad, good):
    torch.manual_seed(0)
    one, other = Block(bad), Block(good)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 8, WIDTH)
    torch.testing.assert_close(one(x), other(x))


def computed_in_python(block, h):
    return h * (2 * h.max().item() + 1)


def test_a_number_that_python_computes_with_is_read_later():
    graph = forward_of(computed_in_python)
    found = list(RULE.check(situation(graph)))
    assert [m.confidence for m in found] == [Confidence.MEDIUM] * 4
    later = rewritten(graph, RULE)
    assert len(later.ops) == len(graph.ops)
    before, after = situation(graph).analysis, situation(later).analysis
    assert after.seconds.bound == before.seconds.bound
    assert after.seconds.estimate < before.seconds.estimate


def one_value_under_a_mask(block, h):
    h[h > 0] = 0
    return h


def at_indices(block, h):
    h[:, torch.arange(3)] = block.token
    return h


def on_device(block, h):
    return h * h.amax() + F.one_hot(h.argmax(-1), WIDTH)


@pytest.mark.parametrize("good", [one_value_under_a_mask, at_indices, on_device])
def test_it_is_silent(good):
    assert not list(RULE.check(situation(forward_of(good))))


def seen_as_another_tensor(block, h):
    rows = h[:, 0]
    h[h[..., 0] > 0] = block.token
    return h + rows[:, None]


def test_an_assignment_that_others_see_is_left_alone():
    assert not list(RULE.check(situation(forward_of(seen_as_another_tensor))))


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b"])
def test_real_models(model):
    for graph in traced(model).graphs.values():
        assert not list(RULE.check(situation(graph)))


seconds = st.integers(0, 50).map(float)


@given(st.lists(st.tuples(seconds, seconds, st.integers(1, 3), st.none() | seconds), max_size=20))
def test_the_host_waits_for_what_it_reads_back(steps):
    host = end = 0.0
    for busy, launch, repeat, read_back in steps:
        for _ in range(repeat):
            host += launch
            end = max(host, end) + busy
            if read_back is not None:
                host = end + read_back
    added = queued([Launch(b, h, r, w) for b, h, r, w in steps])
    assert sum(added) == pytest.approx(end)


def test_reads_end_what_is_compiled_as_one():
    def chained(block, h):
        scale = torch.sigmoid(h)
        return scale * h.sum().item() + scale

    graph = forward_of(chained)
    analysis = situation(graph, execution="compiled").analysis
    kernels = analysis.executions.compiled.kernels
    reads = [i for i, k in enumerate(kernels) if k.name == "item"]
    assert len(reads) == 4
    names = {op.name: index for index, op in enumerate(graph.ops)}
    for read in reads:
        cut = names[kernels[read].ops[0]]
        assert all(names[op] <= cut for k in kernels[:read] for op in k.ops)
        assert all(names[op] > cut for k in kernels[read + 1 :] for op in k.ops)
    launch = derating(load("h100_sxm").gpu).launch.value
    assert analysis.seconds.estimate > 4 * (launch + READ_BACK)
