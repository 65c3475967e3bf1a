"""Layers that are one operator: FLOPs of the same layer taken apart, as PyTorch's counter sees it."""

import torch
from formulas.one_op import add_up, cost_of, graph_of
from fxroof.analyzer.cost import Cost, Status
from fxroof.analyzer.pricing import price
from fxroof.hardware.catalog import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
H100 = load("h100").gpu


def flops_taken_apart(layer: nn.Module, *args: torch.Tensor, **kwargs: bool) -> int:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer.eval()(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops()


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 7),
    heads=st.integers(1, 3),
    dim=st.sampled_from((4, 8, 16)),
    weights=st.booleans(),
)
def test_attention_layer(batch: int, tokens: int, heads: int, dim: int, weights: bool) -> None:
    layer = nn.MultiheadAttention(heads * dim, heads, batch_first=True)
    x = torch.randn(batch, tokens, heads * dim)
    tensors = (layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)
    cost = cost_of(
        aten._native_multi_head_attention.default,
        x, x, x, heads * dim, heads, *(t.detach() for t in tensors), need_weights=weights, gpu=H100,
    )  # fmt: skip
    assert cost.matmul_flops == flops_taken_apart(layer, x, x, x, need_weights=weights)
    assert cost.special == batch * heads * tokens * tokens


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 7),
    heads=st.integers(1, 3),
    hidden=st.integers(1, 40),
    norm_first=st.booleans(),
    gelu=st.booleans(),
)
def test_encoder_layer(batch: int, tokens: int, heads: int, hidden: int, norm_first: bool, gelu: bool) -> None:
    width = heads * 8
    layer = nn.TransformerEncoderLayer(
        width, heads, hidden, batch_first=True, norm_first=norm_first, activation="gelu" if gelu else "relu"
    )
    x = torch.randn(batch, tokens, width)
    attention = layer.self_attn
    tensors = (
        attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
    )  # fmt: skip
    rest = (
        layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
        layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
    )  # fmt: skip
    graph = graph_of(
        aten._transformer_encoder_layer_fwd.default,
        x, width, heads, *(t.detach() for t in tensors), gelu, norm_first, 1e-5, *(t.detach() for t in rest),
    )  # fmt: skip
    (cost,) = price(graph, H100)
    add_up(graph, cost)
    assert len(cost.parts) == 3 + 2 + 2 + 2
    assert cost.matmul_flops == flops_taken_apart(layer, x)
    rows = batch * tokens
    assert cost.special == batch * heads * tokens * tokens + 2 * rows + gelu * rows * hidden


def test_an_attention_layer_moves_what_its_kernels_pass_on() -> None:
    x = torch.randn(2, 16, 64)
    tensors = (torch.randn(192, 64), torch.randn(192), torch.randn(64, 64), torch.randn(64))
    args = (x, x, x, 64, 4, *tensors)
    once = sum(4 * t.numel() for t in (x, *tensors, x))
    rows, scores = 2 * 16, 2 * 4 * 16 * 16
    fused = cost_of(aten._native_multi_head_attention.default, *args, need_weights=False, gpu=H100)
    packed, context = 4 * rows * 3 * 64, 4 * rows * 64
    assert fused.scratch_read == fused.scratch_written == packed + context
    assert sum(a.read + a.written for a in fused.traffic) == once
    apart = cost_of(aten._native_multi_head_attention.default, *args, need_weights=True, gpu=H100)
    between, mean = 2 * packed + context + 2 * 4 * scores, scores
    assert apart.scratch_written == between
    assert apart.scratch_read == between + 4 * scores + mean
    assert [p.name.split(" ")[0] for p in fused.parts] == ["addmm", "scaled_dot_product_attention", "addmm"]
    assert [p.name.split(" ")[0] for p in apart.parts] == [
        "mm", "_transform_bias_rescale_qkv", "bmm", "_softmax", "bmm", "sum", "div_", "addmm",
    ]  # fmt: skip


def test_recurrent_layer_of_the_cpu_is_the_layer_of_the_gpu() -> None:
    x, state = torch.randn(16, 2, 24), torch.randn(1, 2, 32)
    weights = [torch.randn(shape) for shape in ((128, 24), (128, 32), (128,), (128,))]
    cost = cost_of(
        aten.mkldnn_rnn_layer.default,
        x, *weights, state[0], state[0], False, [], 2, 32, 1, True, False, False, False,
    )  # fmt: skip
    whole = cost_of(aten.lstm.input, x, [state, state], weights, True, 1, 0.0, False, False, False)
    assert (cost.matmul, cost.vector, cost.special) == (whole.matmul, whole.vector, whole.special)
    assert cost.matmul_flops == 2 * 32 * 128 * (24 + 32)


def test_choosing_a_kernel_costs_nothing() -> None:
    x = torch.randn(1, 2, 8, 16)
    assert cost_of(aten._fused_sdp_choice.default, x, x, x) == Cost(status=Status.FREE)
