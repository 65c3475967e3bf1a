"""FUS001: chains of elementwise ops; what one kernel for them moves is what Inductor counted for its own."""

import json
import math

import pytest
import torch
from findings.situations import H100, graphs_of, rewritten, situation
from fusion.cases import program
from fusion.test_properties import programs, total
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.cost import bytes_by_role
from fxroof.analyzer.finding import registered
from fxroof.analyzer.fusion import compiled_kernels
from fxroof.analyzer.graph import Role
from fxroof.analyzer.kernels import eager_kernels
from fxroof.analyzer.pricing import price
from fxroof.analyzer.review import load_rules
from fxroof.analyzer.rewrite import Draft
from fxroof.analyzer.trace import from_exported
from fxroof.rules import unfused_elementwise_chain  # noqa: F401  # registers it
from hypothesis import given, settings
from support import traced
from survey.inductor_bytes import DATA
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "FUS001")
RECORDED = json.loads(DATA.read_text())["cases"]
WIDTH = 512


def moved(graph):
    costs = price(graph, H100)
    return sum(k.repeat * sum(map(sum, bytes_by_role(graph, k.cost).values())) for k in eager_kernels(graph, costs))


WHOLE = (
    "alibi", "bias_scale_chain", "broadcasting", "casts", "conv_bn_relu", "conv_bn_residual",
    "convnext_block", "embedding_position", "gather_rows", "geglu_packed", "in_place_chain", "lstm_cell",
    "many_consumers", "masked_fill", "max_pool", "mixture_gate", "norm_of_heads", "normalize", "pad_and_shift",
    "quantize_rows", "reads_add_up", "realised_for_two", "running_sum", "swiglu_mlp", "time_embedding", "token_shift",
    "transposes", "unet_block", "upsample", "var_mean",
)  # fmt: skip
"""Cases that are chains and kernels of their own, and nothing that another rule has."""


@pytest.mark.parametrize("name", WHOLE)
def test_the_rewritten_program_moves_what_inductor_counted(name):
    graph = from_exported(program(name))
    found = list(RULE.check(situation(graph)))
    assert found
    after = rewritten(graph, RULE)
    assert moved(after) == pytest.approx(RECORDED[name]["bytes"], rel=0.001)
    saved = sum(m.evidence["bytes"] - m.evidence["fused_bytes"] for m in found)
    assert saved == moved(graph) - moved(after)


@given(programs())
@settings(max_examples=60, deadline=None)
def test_any_program(graph):
    found = list(RULE.check(situation(graph)))
    after = rewritten(graph, RULE)
    assert moved(graph) - moved(after) == sum(m.evidence["bytes"] - m.evidence["fused_bytes"] for m in found)
    assert moved(after) >= results_and_weights(graph)
    assert not missing(after)


def results_and_weights(graph):
    """Bytes that no program can spare."""
    made = {graph.tensors[t].storage for op in graph.ops for t in op.outputs}
    kept = {graph.tensors[t].storage for t in graph.outputs} & made
    return sum(graph.storages[s].nbytes for s in kept)


def missing(graph):
    """Ops and results that take what is not made before them."""
    made = {graph.tensors[t].storage for t in graph.inputs}
    made |= {s for s, storage in enumerate(graph.storages) if storage.role is not Role.ACTIVATION}
    found = []
    for op in graph.ops:
        if not graph.is_view(op) and (op.outputs or op.mutates):
            found += [op.name for t in op.inputs if graph.tensors[t].storage not in made]
            made |= {graph.tensors[t].storage for t in op.outputs}
    return found + [t for t in graph.outputs if graph.tensors[t].storage not in made]


# spellings


class Block(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.between = between
        self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.down(self.between(self, x, self.up(x)))


def forward_of(between):
    return graphs_of(Block(between), inputs=("x=4x1024x512:bf16",))["forward"]


ROWS = 2 * 4 * 1024 * WIDTH
VECTOR = 2 * WIDTH


def swiglu(m, x, h):
    return F.silu(m.gate(x)) * h


def relu_squared(m, x, h):
    return F.relu(h).square()


def quick_gelu(m, x, h):
    return h * torch.sigmoid(1.702 * h)


def layer_scale(m, x, h):
    return x + m.scale * h


def soft_cap(m, x, h):
    return 30.0 * torch.tanh(h / 30.0)


def in_place(m, x, h):
    return h.mul_(0.5).add_(x).relu_()


def with_dropout(m, x, h):
    return x + F.dropout(F.gelu(h), 0.1, m.training)


def through_views(m, x, h):
    return (h.view(4, 1024, 8, 64) * 2).transpose(1, 2).exp().transpose(1, 2).flatten(2)


def clipped_cast(m, x, h):
    return h.float().clamp(-1, 1).add(0.5).to(h.dtype)


def modulated(m, x, h):
    return m.norm(h) * (1 + m.scale) + m.scale


CHAINS = [
    (swiglu, 3 * ROWS), (relu_squared, 2 * ROWS), (quick_gelu, 2 * ROWS), (layer_scale, 3 * ROWS + VECTOR),
    (soft_cap, 2 * ROWS), (in_place, 3 * ROWS), (with_dropout, 3 * ROWS), (through_views, 2 * ROWS),
    (clipped_cast, 2 * ROWS),
]  # fmt: skip


@pytest.mark.parametrize(("between", "nbytes"), CHAINS, ids=lambda f: getattr(f, "__name__", ""))
def test_a_chain_is_read_and_written_once(between, nbytes):
    graph = forward_of(between)
    (match,) = RULE.check(situation(graph))
    assert "test_fus001.py" in str(graph.ops[match.op].anchor)
    assert match.evidence["fused_bytes"] == nbytes
    after = rewritten(graph, RULE)
    assert [op.target for op in after.ops if not after.is_view(op)].count("fxroof.fused.default") == 1
    before, now = (analyze_phase(g, H100, "eager")[0] for g in (graph, after))
    assert now.flops == before.flops
    assert now.seconds.bound <= before.seconds.bound
    assert now.seconds.estimate < before.seconds.estimate
    assert not missing(after)


def test_a_norm_between_is_part_of_the_chain():
    (match,) = RULE.check(situation(forward_of(modulated)))
    assert match.evidence["fused_bytes"] == pytest.approx(2 * ROWS, rel=0.01)


def test_what_others_need_is_written_once():
    def kept(m, x, h):
        wide = torch.exp(h * 2)
        return m.down(wide) + torch.tanh(wide + x)

    graph = forward_of(kept)
    one, other = RULE.check(situation(graph))
    assert one.evidence["fused_bytes"] == 2 * ROWS  # h to wide
    assert other.evidence["fused_bytes"] == 4 * ROWS  # wide, x and the product to the sum
    assert not missing(rewritten(graph, RULE))


@pytest.mark.parametrize(
    ("model", "code"),
    [("llama-3-8b", "LlamaMLP.forward = torch.compile(LlamaMLP.forward)"), ("dit", "model = torch.compile(model)")],
)
def test_the_remedy_names_the_module_that_holds_the_chain(model, code):
    graph = next(iter(traced(model).graphs.values()))
    assert code in {m.remedy.code for m in RULE.check(situation(graph))}


def test_what_comes_between_two_products_is_not_joined_across_them():
    def two(m, x, h):
        return F.relu(m.gate(F.relu(h) * 2)) * 3

    found = list(RULE.check(situation(forward_of(two))))
    assert [m.evidence["fused_bytes"] for m in found] == [2 * ROWS, 2 * ROWS]


# silence


def one_op(m, x, h):
    return F.relu(h)


def library_norm(m, x, h):
    return m.norm(h)


def independent(m, x, h):
    return m.gate(F.relu(x)) + m.down(h)


def only_copies(m, x, h):
    return h.view(4, 1024, 8, 64).transpose(1, 2).contiguous().flatten(0, 1).clone().view(4, 1024, WIDTH)


def spelt_norm(m, x, h):  # FUS002
    h = h.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def spelt_gelu(m, x, h):  # FUS004
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


def spelt_attention(m, x, h):  # ATT001
    q, k, v = (t.view(4, 1024, 8, 64).transpose(1, 2) for t in (h, m.gate(x), m.down(x)))
    scores = (q @ k.transpose(-2, -1) / 8).softmax(-1)
    return (scores @ v).transpose(1, 2).reshape(4, 1024, WIDTH)


def complex_product(m, x, h):  # Inductor has no code for it
    pairs = torch.view_as_complex(h.float().view(4, 1024, -1, 2))
    return torch.view_as_real(pairs * pairs * pairs).flatten(2).to(x.dtype)


def norm_of_a_computed_weight(m, x, h):  # FUS002
    h = h.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + m.scale.float() * 2)).to(x.dtype)


def bias_of(x):
    """(S, S): what a causal mask adds."""
    places = torch.arange(x.shape[1])
    return (places[None] > places[:, None]).to(x.dtype) * torch.finfo(x.dtype).min


def attend(m, x, h, bias):
    q, k, v = (t.view(4, 1024, 8, 64).transpose(1, 2) for t in (h, m.gate(x), m.down(x)))
    return ((q @ k.transpose(-2, -1) / 8 + bias).softmax(-1) @ v).transpose(1, 2).reshape(4, 1024, WIDTH)


def masked_attention(m, x, h):  # ATT001 drops the mask
    return attend(m, x, h, bias_of(x))


def mask_used_again(m, x, h):
    bias = bias_of(x)
    return attend(m, x, h, bias) + m.gate(bias[:, :WIDTH])


def mask_that_stays(m, x, h):
    places = torch.arange(x.shape[1])
    return attend(m, x, h, (places[None] - places[:, None]).to(x.dtype) * 0.5)


def needless_copy(m, x, h):  # FUS005
    scaled = (h * 0.125).view(4, 1024, 8, 64).transpose(1, 2).contiguous()
    return F.scaled_dot_product_attention(scaled, scaled, scaled).transpose(1, 2).reshape(4, 1024, WIDTH)


def computed_again(m, x, h):  # FUS007 has the second
    return m.gate(F.relu(h) * 2 + x) + m.down(F.relu(h) * 2 + x)


def test_what_is_made_of_a_mask_for_others_is_a_chain():
    """Near misses: a mask that another op takes too, and one that the fused kernel takes."""
    for between in (mask_used_again, mask_that_stays):
        graph = forward_of(between)
        made = [m.evidence["ops"] for m in RULE.check(situation(graph)) if graph.ops[m.op].target == "aten.mul.Tensor"]
        assert made == [4]


def test_what_is_computed_again_is_one_chain():
    (match,) = RULE.check(situation(forward_of(computed_again)))
    assert match.evidence["fused_bytes"] == 3 * ROWS


def test_it_shows_the_last_arithmetic():
    def cast_at_the_end(m, x, h):
        y = h.float() * 2
        y = y.square()
        return y.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)

    graph = forward_of(cast_at_the_end)
    (match,) = RULE.check(situation(graph))
    assert graph.ops[match.op].target == "aten.square.default"


SILENT = [
    one_op, library_norm, independent, only_copies, spelt_norm, spelt_gelu, spelt_attention, complex_product,
    norm_of_a_computed_weight, masked_attention, needless_copy,
]  # fmt: skip


@pytest.mark.parametrize("between", SILENT, ids=lambda f: f.__name__)
def test_it_is_silent(between):
    assert not list(RULE.check(situation(forward_of(between))))


@pytest.mark.parametrize("between", [swiglu, in_place], ids=lambda f: f.__name__)
def test_a_compiled_phase_has_none(between):
    assert not list(RULE.check(situation(forward_of(between), execution="compiled")))


# real models


@pytest.mark.parametrize(
    ("model", "phase", "found"),
    [
        ("llama-3-8b", "decode", 5),  # silu * up of four layers, and the rotary tables
        ("gptfast", "decode", 4),
        ("nanogpt", "decode", 2),  # embeddings; the last residual, norm and row
        ("resnet18", "forward", 17),
    ],
)
def test_real_models(model, phase, found):
    graph = traced(model).graphs[phase]
    assert len(list(RULE.check(situation(graph)))) == found
    assert not missing(rewritten(graph, RULE))


@pytest.mark.parametrize("model", ["llama-3-8b", "gptfast", "mymodel", "moe", "mamba_minimal", "dit"])
def test_it_goes_together_with_all_other_remedies(model):
    """No op is taken twice, everything is made before it is used, and both orders come to the same traffic."""
    rules, _ = load_rules()
    for graph in traced(model).graphs.values():
        seen = situation(graph)
        matches = [m for r in rules if r.code[:3] in ("FUS", "ATT", "KVC") for m in r.check(seen)]
        totals = []
        for order in (matches, matches[::-1]):
            draft = Draft(graph)
            for match in order:
                if match.rewrite is not None:
                    match.rewrite(draft)
            after = draft.finish()
            assert set(missing(after)) <= set(missing(graph))
            totals.append(moved(after))
        assert totals[0] == pytest.approx(totals[1], rel=0.05)
        assert totals[0] < moved(graph)


@pytest.mark.parametrize("model", ["resnet18", "dit", "moe"])
def test_all_chains_together_come_close_to_the_compiled_program(model):
    for graph in traced(model).graphs.values():
        compiled = total(graph, compiled_kernels(graph, price(graph, H100)))
        others = {"FUS002", "FUS003", "FUS004", "ATT001", "ATT003", "FUS001"}
        draft = Draft(graph)
        for other in (r for r in load_rules()[0] if r.code in others):
            for match in other.check(situation(graph)):
                match.rewrite(draft)
        assert moved(draft.finish()) == pytest.approx(compiled, rel=0.05)
