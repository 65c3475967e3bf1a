"""WGT006: linear layers that read one tensor, and twins that have one weight."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.analyzer.rewrite import Draft
from fxroof.rules import separate_projections  # noqa: F401  # registers it and WGT001
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "WGT006")
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
WIDTH, HIDDEN = HEADS * HEAD_DIM, 1408
SIZES = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]


def rotate(x):
    table = torch.ones(x.shape[-2], HEAD_DIM, dtype=x.dtype)
    half = HEAD_DIM // 2
    return x * table + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * table


class Block(nn.Module):
    def __init__(self, joined, bias, rotary):
        super().__init__()
        self.joined, self.rotary = joined, rotary
        self.norm = nn.LayerNorm(WIDTH)
        if joined:
            self.qkv, self.gate_up = nn.Linear(WIDTH, sum(SIZES), bias=bias), nn.Linear(WIDTH, 2 * HIDDEN, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=bias) for size in SIZES)
            self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.out, self.down = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x, past):
        h = self.norm(x)
        batch, length, _ = x.shape
        q, k, v = self.qkv(h).split(SIZES, dim=-1) if self.joined else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.view(batch, length, -1, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=True)
        x = x + self.out(out.transpose(1, 2).reshape(batch, length, -1))
        h = self.norm(x)
        gate, up = self.gate_up(h).chunk(2, dim=-1) if self.joined else (self.gate(h), self.up(h))
        return x + self.down(F.silu(gate) * up), (k, v)


class Model(nn.Module):
    def __init__(self, *, joined=False, bias=False, rotary=False, dtype=torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(500, WIDTH)
        self.blocks = nn.ModuleList([Block(joined, bias, rotary) for _ in range(2)])
        self.to(dtype)

    def forward(self, tokens, cache=None):
        x, kept = self.embed(tokens), []
        for i, block in enumerate(self.blocks):
            x, new = block(x, None if cache is None else cache[i])
            kept.append(new)
        return x[:, -1:], kept


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "biased"])
def test_the_rewrite_is_the_trace_of_the_twin(bias, rotary):
    twins = graphs_of(Model(joined=True, bias=bias, rotary=rotary))
    for phase, graph in graphs_of(Model(bias=bias, rotary=rotary)).items():
        found = list(RULE.check(situation(graph)))
        assert [m.evidence["products"] for m in found] == [3, 2, 3, 2]
        ours, theirs = figures(rewritten(graph, RULE)), figures(twins[phase])
        assert ours == {k: pytest.approx(v, rel=0.01) for k, v in theirs.items()}
        assert not list(RULE.check(situation(twins[phase])))


def test_a_decode_step_launches_fewer_kernels():
    graph = graphs_of(Model())["decode"]
    after = situation(rewritten(graph, RULE)).analysis
    assert after.seconds.estimate < 0.95 * situation(graph).analysis.seconds.estimate


def test_the_remedy_changes_no_number():
    torch.manual_seed(0)
    one, many, tokens = Model(joined=True, dtype=torch.float32), Model(dtype=torch.float32), torch.arange(6)[None]
    weights = many.state_dict()
    for name in one.state_dict():
        parts = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(name.split(".")[-2])
        if parts:
            *outer, _, kind = name.split(".")
            weights[name] = torch.cat([weights[".".join([*outer, part, kind])] for part in parts])
    one.load_state_dict({name: weights[name] for name in one.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(one(tokens)[0], many(tokens)[0])


class Two(nn.Module):
    """Calls `between(model, x)`, which uses the layers `one` and `other`."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.one, self.other = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.odd, self.biased = nn.Linear(WIDTH, 60, bias=False), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.to(torch.bfloat16)
        self.wide = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.between(self, x)


def in_turn(model, x):
    return model.other(model.one(x))


def on_others(model, x):
    return model.one(x) + model.other(x * 2)


def written_between(model, x):
    y = model.one(x)
    x.mul_(2)
    return y + model.other(x)


def other_types(model, x):
    return model.one(x) + model.wide(x.float())


def unaligned(model, x):
    return model.one(x).sum() + model.odd(x).sum()


def one_bias(model, x):
    return model.one(x) + model.biased(x)


def bias_first(model, x):
    return model.biased(x) + model.one(x) + model.other(x)


class OneForAll(nn.Module):
    """The twin of layers of which some have a bias."""

    def __init__(self, products):
        super().__init__()
        self.products = products
        self.joined = nn.Linear(WIDTH, products * WIDTH, dtype=torch.bfloat16)

    def forward(self, x):
        first, *others = self.joined(x).chunk(self.products, dim=-1)
        for other in others:
            first = first + other
        return first


@pytest.mark.parametrize(("between", "products"), [(one_bias, 2), (bias_first, 3)])
def test_zeros_stand_for_a_bias_that_is_missing(between, products):
    graph, twin = (graphs_of(m, inputs=("x=4x8x512:bf16",))["forward"] for m in (Two(between), OneForAll(products)))
    (match,) = RULE.check(situation(graph))
    assert match.evidence["products"] == products
    ours, theirs = figures(rewritten(graph, RULE)), figures(twin)
    assert ours == {k: pytest.approx(v, rel=0.01) for k, v in theirs.items()}


class Reads(nn.Module):
    """A layer of a decoder that reads what an encoder returned; `parallel` has its MLP read it too."""

    def __init__(self, parallel):
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("k", "v")})
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)})
        self.parallel = parallel

    def forward(self, x, kept):
        x = x * self.attention["k"](kept) + self.attention["v"](kept)
        return x + self.mlp["up"](kept) if self.parallel else x


class Layers(nn.Module):
    def __init__(self, parallel, layers=2):
        super().__init__()
        self.layers = nn.ModuleList([Reads(parallel) for _ in range(layers)])
        self.to(torch.bfloat16)

    def forward(self, x):
        kept = x
        for layer in self.layers:
            x = layer(x, kept)
        return x


@pytest.mark.parametrize(("parallel", "products"), [(False, [2, 2]), (True, [3, 3])], ids=["whisper", "cohere"])
def test_layers_that_share_an_input_keep_weights_of_their_own(parallel, products):
    graph = graphs_of(Layers(parallel), inputs=("x=4x8x512:bf16",))["forward"]
    found = list(RULE.check(situation(graph)))
    assert [m.evidence["products"] for m in found] == products
    assert all("layers.0." in graph.ops[m.op].module for m in found[:1])


def tied(model, x):
    return model.one(x) + F.linear(x, model.table.weight) + model.table(torch.zeros(4, 8, dtype=torch.int64))


def part_of_a_weight(model, x):
    return F.linear(x, model.one.weight[:256]) + F.linear(x, model.one.weight[256:])


def many(model, x):
    return sum(layer(x) for layer in [model.one, model.other] * 4)


@pytest.mark.parametrize(
    "between",
    [in_turn, on_others, written_between, other_types, unaligned, tied, part_of_a_weight, many],
    ids=lambda f: f.__name__,
)
def test_near_misses(between):
    graph = graphs_of(Two(between), inputs=("x=4x8x512:bf16",))["forward"]
    assert not list(RULE.check(situation(graph)))


@pytest.mark.parametrize(
    ("model", "products"),
    [("mymodel", 4 * [3, 2]), ("llama-3-8b", 4 * [3, 2]), ("nanogpt", []), ("phi-3-mini", []), ("gpt2", []),
     ("bert-base", 4 * [3]), ("moe", 4 * [3]), ("resnet18", [])],
)  # fmt: skip
def test_real_models(model, products):
    *_, graph = traced(model).graphs.values()
    assert [m.evidence["products"] for m in RULE.check(situation(graph))] == products


def test_it_goes_together_with_narrower_weights_in_either_order():
    graph = traced("mymodel").graphs["decode"]
    place = situation(graph)
    narrow = next(r for r in registered() if r.code == "WGT001")
    changes = [[m.rewrite for m in rule.check(place)] for rule in (RULE, narrow)]
    found = []
    for order in (changes, changes[::-1]):
        draft = Draft(graph)
        for rewrite in (r for group in order for r in group):
            rewrite(draft)
        found.append(draft.finish())
    one, other = map(figures, found)
    assert one == {name: pytest.approx(value) for name, value in other.items()}
    products = [sum(op.target == "fxroof.linear_packed.default" for op in g.ops) for g in found]
    assert products == [4 * 4 + 1] * 2  # attention in, attention out, gate and up, down; the head
    assert not any(op.target == "aten.linear.default" for g in found for op in g.ops)
