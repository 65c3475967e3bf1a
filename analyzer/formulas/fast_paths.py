"""Whole layers as one operator: what eager PyTorch calls in inference on the CPU, and a saved program may contain.

With B sequences of S queries and T keys, width E, H heads. Steps are those of torch 2.13,
`aten/src/ATen/native/transformers/cuda/attention.cu` and `transformer.cpp`. What passes from kernel to kernel goes
through memory; tensors of the op itself are read and written once.
"""

from dataclasses import replace

from ..cost import Call, Cost, formula, free
from ..graph import Tensor
from ..sdpa import Attention, choose_backend, contiguous_stride
from .arithmetic import item_bytes, multiply_adds, vector

# choosing a kernel runs none
free("aten._fused_sdp_choice")


@formula("aten._native_multi_head_attention")
def multi_head_attention(call: Call) -> Cost:
    """Projections in, attention, projection out.

    Attention is fused where the three inputs are one, there is no mask and no weights are asked for, and the GPU has
    a kernel for it; else scores go through memory: written, normalised in place, read.
    """
    layer = _layer(call, call.tensor("query"), call.tensor("key"), call.integer("embed_dim", 0), "num_head")
    same = call.arg("query") == call.arg("key") == call.arg("value")
    return _attention(call, layer, fusable=same and not call.flag("need_weights"))


@formula("aten._transformer_encoder_layer_fwd")
def encoder_layer(call: Call) -> Cost:
    """Attention, two layer norms, two sums and a feed-forward net, in either order of norms.

    Beside attention's own: rows of width E are read seven times and written five times between kernels, hidden rows
    once each.
    """
    source, hidden = call.tensor("src"), call.tensor("ffn_weight_1").shape[0]
    width = call.integer("embed_dim", 0)
    layer = _layer(call, source, source, width, "num_heads")
    cost = _attention(call, layer, fusable=True)
    rows = source.numel // max(width, 1)
    gelu = rows * hidden if call.flag("use_gelu") else 0
    norms = 2 * (8 * rows * width + 3 * rows)
    flops = norms + 3 * rows * width + rows * hidden * (2 if not gelu else 9)
    item = item_bytes(source)
    matmul = multiply_adds(source.dtype, 2 * rows * width * hidden)
    return replace(
        cost,
        matmul={dtype: count + matmul.get(dtype, 0) for dtype, count in cost.matmul.items()},
        vector={dtype: count + flops for dtype, count in cost.vector.items()},
        special=cost.special + gelu + 2 * rows,
        scratch_read=cost.scratch_read + rows * (7 * width + hidden) * item,
        scratch_written=cost.scratch_written + rows * (5 * width + hidden) * item,
    )


@formula("aten._transform_bias_rescale_qkv")
def transform_bias_rescale(call: Call) -> Cost:
    """A bias added to query, key and value, and the query scaled: 4 FLOPs for three results."""
    source = call.tensor("qkv")
    return call.cost(vector=vector(source.dtype, source.numel * 4 / 3))


@formula("aten.mkldnn_linear")
def cpu_linear(call: Call) -> Cost:
    """The product self @ weight.T, plus bias, of a model converted for the CPU."""
    source, out = call.tensor("self"), call.output
    bias = out.numel if call.optional("bias") else 0
    return call.cost(matmul=multiply_adds(source.dtype, out.numel * source.shape[-1]), vector=vector(out.dtype, bias))


def _layer(call: Call, query: Tensor, key: Tensor, width: int, heads: str) -> Attention:
    count = max(call.integer(heads, 1), 1)

    def split(tensor: Tensor) -> Tensor:
        batch, tokens, _ = tensor.shape
        shape = (batch, count, tokens, width // count)
        # a third of the packed projection
        stride = (tokens * 3 * width, width // count, 3 * width, 1)
        return replace(tensor, shape=shape, stride=stride, offset=0)

    mask = call.optional("mask")
    if mask is not None:
        mask = replace(mask, shape=(1, 1, *mask.shape[-2:]), stride=contiguous_stride((1, 1, *mask.shape[-2:])))
    return Attention(query=split(query), key=split(key), value=split(key), mask=mask)


def _attention(call: Call, layer: Attention, *, fusable: bool) -> Cost:
    """Cost of projections and attention, all traffic of the op included.

    Matmul FLOPs: 2 E² a row for each of the four projections and 4 B S T E. Vector: biases, the scale, and per pair
    and head maximum, subtraction, sum and division.
    """
    batch, heads, queries, head_dim = layer.query.shape
    keys, width = layer.key.shape[-2], heads * head_dim
    rows, pairs = batch * queries, batch * heads * queries * keys
    packed = (rows + 2 * batch * keys) * width
    backend = choose_backend(layer, call.gpu) if fusable and layer.mask is None and head_dim % 8 == 0 else None
    fused = backend is not None and backend.name != "math"
    work = packed * width + rows * width * width + 2 * pairs * head_dim
    # unfused, biases and the scale take a kernel of their own, and so does the softmax
    moved = packed + rows * width + (0 if fused else packed + 2 * pairs)
    item = item_bytes(layer.query)
    return call.cost(
        matmul=multiply_adds(layer.query.dtype, work),
        vector=vector(layer.query.dtype, packed + 2 * rows * width + 4 * pairs),
        special=pairs,
        scratch_read=moved * item,
        scratch_written=moved * item,
        backend=backend.name if fused and backend else "math",
        note="attention inside a layer that is one operator",
    )
