"""FUS007: work that nobody needs, and twins without it."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import dead_or_redundant_compute  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "FUS007")
WIDTH, HEADS, LENGTH = 512, 8, 1024
HEAD_DIM = WIDTH // HEADS


def rotary_of(x):
    position = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    rates = 1.0 / 10000 ** (torch.arange(0, HEAD_DIM, 2, device=x.device).float() / HEAD_DIM)
    angles = torch.outer(position, rates)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def mask_of(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def rotated(t, cos, sin):
    one, other = t.chunk(2, dim=-1)
    return t * cos + torch.cat([-other, one], dim=-1) * sin


class Layer(nn.Module):
    """`besides` is what the layer does besides; tables are passed on or made here."""

    def __init__(self, p=0.0, attention_p=0.0, besides=None):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.p, self.attention_p, self.besides = p, attention_p, besides

    def forward(self, x, tables=None):
        cos, sin, mask = (*rotary_of(x), mask_of(x)) if tables is None else tables
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attention_p)
        h = self.out(out.transpose(1, 2).flatten(2))
        if self.p:
            h = F.dropout(h, self.p)
        if self.besides is not None:
            self.besides(h, x)
        return x + h


class Stack(nn.Module):
    def __init__(self, shared, layers=3, **kwargs):
        super().__init__()
        self.shared = shared
        self.layers = nn.ModuleList([Layer(**kwargs) for _ in range(layers)])
        self.to(torch.bfloat16)

    def forward(self, x):
        tables = (*rotary_of(x), mask_of(x)) if self.shared else None
        for layer in self.layers:
            x = layer(x, tables)
        return x


def forward_of(module):
    return graphs_of(module, inputs=(f"x=2x{LENGTH}x{WIDTH}:bf16",))["forward"]


@pytest.fixture(scope="module")
def good():
    return forward_of(Stack(True))


def is_the_twin(graph, twin):
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


def test_tables_and_masks_of_every_layer_are_made_once(good):
    graph = forward_of(Stack(False))
    found = list(RULE.check(situation(graph)))
    # of each layer but the first, the table and the mask: the rates of cos and sin are one piece
    assert len(found) == 4
    assert {graph.ops[m.op].target for m in found} == {"aten.to.dtype", "aten.tril.default"}
    assert {m.message for m in found} == {"the same is computed again from the same arguments"}
    is_the_twin(graph, good)


def test_it_is_silent_where_tables_are_shared(good):
    assert not list(RULE.check(situation(good)))


def test_results_that_nobody_reads_go_with_what_only_they_need(good):
    def unread(h, x):
        (h.float() - x.float()).abs().mean(dim=0)

    graph = forward_of(Stack(True, besides=unread))
    found = list(RULE.check(situation(graph)))
    assert len(found) == 3
    assert all(graph.ops[m.op].target == "aten.mean.dim" and m.evidence["ops"] == 5 for m in found)
    is_the_twin(graph, good)


def test_what_is_only_written_to_and_never_read(good):
    def written(h, x):
        total = torch.zeros_like(h)
        total += h
        total.mul_(2)

    graph = forward_of(Stack(True, besides=written))
    assert [m.evidence["ops"] for m in RULE.check(situation(graph))] == [3, 3, 3]
    is_the_twin(graph, good)


@pytest.mark.parametrize("kwargs", [{"p": 0.1}, {"attention_p": 0.1}], ids=str)
def test_dropout_at_inference(good, kwargs):
    graph = forward_of(Stack(True, **kwargs))
    found = list(RULE.check(situation(graph)))
    assert len(found) == 3
    assert all("inference" in m.message for m in found)
    is_the_twin(graph, good)


def test_other_rules_do_not_get_the_credit_for_what_is_idle(good):
    from fxroof.analyzer.rewrite import Draft

    def unread(h, x):
        h.float().softmax(-1)

    graph = forward_of(Stack(True, besides=unread))
    assert len(Draft(graph).finish().ops) == len(graph.ops)


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.function(self.up, x)


def found_in(function):
    return list(RULE.check(situation(forward_of(Plain(function)))))


def dropout_in_place(up, x):
    return F.dropout(up(x), 0.1, inplace=True)


def dropout_of_channels(up, x):
    return F.dropout2d(up(x)[:, None], 0.1)


def linear_twice(up, x):
    return up(x).relu() * up(x)


def cast_twice(up, x):
    h = up(x)
    return h.half().sum(-1), h.half().amax(-1)


@pytest.mark.parametrize("bad", [dropout_in_place, dropout_of_channels, linear_twice, cast_twice])
def test_spellings(bad):
    assert len(found_in(bad)) == 1


def random_twice(up, x):
    return up(x) + torch.rand_like(x) + torch.rand_like(x)


def changed_in_between(up, x):
    h = up(x)
    before = h.float().sum(-1)
    h.mul_(2)
    return before, h.float().sum(-1)


def changed_through_a_view(up, x):
    h = up(x)
    before = h.exp()
    h[:, 0] = 1
    return before + h.exp()


def written_to_apart(up, x):
    one, other = torch.zeros_like(x), torch.zeros_like(x)
    one[:, 0] = up(x)[:, 0]
    return one + other + other.exp()


def returned_twice(up, x):
    h = up(x)
    return h.exp(), h.exp()


def another_number(up, x):
    h = up(x)
    return h.pow(2).sum(-1), h.pow(2.5).sum(-1), h.softmax(-1), h.softmax(1)


def filled_again(up, x):
    return up(x) + torch.ones_like(x) + x * torch.zeros(LENGTH, 1).to(x.dtype), x * torch.zeros(LENGTH, 1)


def views_again(up, x):
    h = up(x)
    return h.transpose(1, 2) @ h, h.transpose(1, 2).exp()


def dropout_off(up, x):
    return F.dropout(up(x), 0.1, training=False) + F.dropout(x, 0.0)


def read_by_the_host(up, x):
    h = up(x)
    return h * h.abs().max().item()


@pytest.mark.parametrize(
    "good",
    [
        random_twice, changed_in_between, changed_through_a_view, written_to_apart, returned_twice, another_number,
        filled_again, views_again, dropout_off, read_by_the_host,
    ],
)  # fmt: skip
def test_it_is_silent(good):
    assert not found_in(good)


def test_making_tables_once_changes_no_number():
    torch.manual_seed(0)
    bad, good = Stack(False).float(), Stack(True).float()
    good.load_state_dict(bad.state_dict())
    x = torch.randn(1, 16, WIDTH)
    assert torch.equal(bad(x), good(x))


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [("llama-3-8b", "decode", 0), ("gpt2", "prefill", 0), ("nanogpt", "prefill", 0), ("vit", "forward", 0)],
)
def test_real_models(model, phase, count):
    assert len(list(RULE.check(situation(traced(model).graphs[phase])))) == count
