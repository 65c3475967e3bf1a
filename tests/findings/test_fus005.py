"""FUS005: copies into layouts that nobody needs, and twins without them."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import layout_copy  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "FUS005")
WIDTH, HEADS, LENGTH, BATCH = 512, 8, 256, 4
HEAD_DIM = WIDTH // HEADS


class Block(nn.Module):
    """`copied` is what is done where a copy is made, or left out."""

    def __init__(self, function, copied):
        super().__init__()
        self.function, self.copied = function, copied
        self.up, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tokens = nn.Linear(LENGTH, LENGTH)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.function(self, x, self.copied)


def heads(h):
    return h.view(BATCH, LENGTH, HEADS, HEAD_DIM).transpose(1, 2)


def before_attention(block, x, copied):
    q, k, v = (copied(heads(block.up(x))) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v)
    return block.out(out.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))


def keys_before_attention(block, x, copied):
    q, k, v = heads(block.up(x)), copied(heads(block.out(x))), heads(x)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def before_a_product_of_batches(block, x, copied):
    return torch.bmm(block.up(x), copied(x.transpose(1, 2)))


def before_pointwise_ops(block, x, copied):
    h = copied(block.up(x).transpose(1, 2))
    return torch.bmm(F.gelu(h * 0.5).sigmoid(), x)


def before_a_cat(block, x, copied):
    h = copied(block.up(x).transpose(1, 2))
    return torch.cat([h, x.transpose(1, 2)], dim=1)


def before_a_sum(block, x, copied):
    return copied(block.up(x).permute(2, 0, 1)).float().mean(dim=0)


def before_a_copy_into_a_buffer(block, x, copied):
    buffer = torch.zeros(BATCH, WIDTH, 2 * LENGTH, dtype=x.dtype)
    buffer[:, :, :LENGTH] = copied(block.up(x).transpose(1, 2))
    return buffer


def of_what_is_only_read(block, x, copied):
    h = block.up(x)
    kept = copied(h)
    return block.out(F.gelu(h)) + kept


def contiguous(t):
    return t.contiguous()


def cloned(t):
    return t.clone()


def cloned_anew(t):
    return t.clone(memory_format=torch.contiguous_format)


def as_is(t):
    return t


def forward_of(function, copied):
    return graphs_of(Block(function, copied), inputs=(f"x={BATCH}x{LENGTH}x{WIDTH}:bf16",))["forward"]


AVOIDABLE = [
    (before_attention, contiguous, 3),
    (before_attention, cloned_anew, 3),
    (keys_before_attention, contiguous, 1),
    (before_a_product_of_batches, contiguous, 1),
    (before_pointwise_ops, contiguous, 1),
    (before_a_cat, contiguous, 1),
    (before_a_sum, contiguous, 1),
    (before_a_copy_into_a_buffer, contiguous, 1),
    (of_what_is_only_read, cloned, 1),
]


@pytest.mark.parametrize(("function", "copied", "count"), AVOIDABLE)
def test_the_rewrite_is_the_trace_of_the_twin(function, copied, count):
    graph, twin = forward_of(function, copied), forward_of(function, as_is)
    assert len(list(RULE.check(situation(graph)))) == count
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


@pytest.mark.parametrize(("function", "copied", "count"), AVOIDABLE)
def test_leaving_it_out_changes_no_number(function, copied, count):
    torch.manual_seed(0)
    bad, good = Block(function, copied).float(), Block(function, as_is).float()
    good.load_state_dict(bad.state_dict())
    x = torch.randn(BATCH, LENGTH, WIDTH)
    torch.testing.assert_close(bad(x), good(x))


def before_a_view(block, x, copied):
    return copied(block.up(x).transpose(1, 2)).view(BATCH, -1)


def after_attention_that_writes_heads_first(block, x, copied):
    q = block.up(x).view(BATCH, HEADS, LENGTH, HEAD_DIM)
    return copied(F.scaled_dot_product_attention(q, q, q).transpose(1, 2)).view(BATCH, LENGTH, WIDTH)


def before_a_pointwise_op_of_two_layouts(block, x, copied):
    return copied(block.up(x).transpose(1, 2)) + F.gelu(x).view(BATCH, WIDTH, LENGTH)


def returned(block, x, copied):
    return copied(block.up(x).transpose(1, 2))


def written_to(block, x, copied):
    h = copied(block.up(x))
    h[:, 0] = 0
    return block.out(h)


def written_to_where_it_came_from(block, x, copied):
    h = block.up(x)
    kept = copied(h)
    h.mul_(2)
    return h + kept


def of_what_is_shared(block, x, copied):
    h = block.up(x)[:, :1].expand(-1, LENGTH, -1)
    return copied(h).exp()


def a_mask_for_attention(block, x, copied):
    q = heads(x)
    mask = copied(torch.rand(LENGTH, LENGTH, HEADS).permute(2, 0, 1)).to(x.dtype)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


def before_a_norm(block, x, copied):
    return F.layer_norm(copied(block.up(x).transpose(1, 2)), (LENGTH,))


@pytest.mark.parametrize(
    ("function", "copied"),
    [
        (before_a_view, contiguous),
        (after_attention_that_writes_heads_first, contiguous),
        (before_a_pointwise_op_of_two_layouts, contiguous),
        (returned, contiguous),
        (returned, cloned),
        (written_to, cloned),
        (written_to_where_it_came_from, cloned),
        (of_what_is_shared, contiguous),
        (a_mask_for_attention, contiguous),
        (before_a_norm, contiguous),
    ],
)
def test_it_is_silent_where_the_copy_is_needed(function, copied):
    assert not list(RULE.check(situation(forward_of(function, copied))))


def test_a_product_that_copies_its_operand_anyway_saves_nothing():
    def before_a_linear(block, x, copied):
        return block.tokens(copied(block.up(x).transpose(1, 2)))

    graph, twin = forward_of(before_a_linear, contiguous), forward_of(before_a_linear, as_is)
    ours, theirs = figures(rewritten(graph, RULE)), figures(twin)
    assert ours == {k: pytest.approx(v, rel=0.01) for k, v in theirs.items()}
    assert figures(graph)["eager bound"] == pytest.approx(theirs["eager bound"], rel=0.01)


@pytest.mark.parametrize(
    ("model", "phase", "count"),
    [
        ("whisper-large-v3", "encoder", 12),
        ("whisper-large-v3", "prefill", 8),
        ("mymodel", "prefill", 0),
        ("vit_mha", "forward", 0),
        ("gemma-2-9b", "prefill", 0),
    ],
)
def test_real_models(model, phase, count):
    assert len(list(RULE.check(situation(traced(model).graphs[phase])))) == count
