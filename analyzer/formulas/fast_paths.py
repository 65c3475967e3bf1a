"""Whole layers as one operator: what eager PyTorch calls in inference on the CPU, and a saved program may contain.

With B sequences of S queries and T keys, width E, H heads. Steps are those of torch 2.13,
`aten/src/ATen/native/transformers/cuda/attention.cu` and `transformer.cpp`. What passes from kernel to kernel goes
through memory; tensors of the op itself are read and written once.
"""

from dataclasses import replace

from ..cost import Call, Cost, Gemm, formula, free
from ..graph import Tensor
from ..sdpa import Attention, choose_backend, contiguous_stride
from .arithmetic import item_bytes, multiply_adds, products, vector
from .parts import Buffer, Kernels

# choosing a kernel runs none
free("aten._fused_sdp_choice")


@formula("aten._native_multi_head_attention")
def multi_head_attention(call: Call) -> Cost:
    """Projections in, attention, projection out, a kernel each; the mean of the scores over heads where asked for.

    Attention is fused where the three inputs are one, there is no mask and no weights are asked for, and the GPU has
    a kernel for it; else biases and the scale take a kernel of their own, and scores go through memory: written,
    normalised in place, read.
    """
    query, key = call.tensor("query"), call.tensor("key")
    layer = _layer(call, query, key, call.integer("embed_dim", 0), "num_head")
    run = Kernels(call, query.dtype)
    given = call.arg("query"), call.arg("key"), call.arg("value")
    sources = [run.argument(name) for name in ("query", "key", "value")]
    same = given[0] == given[1] == given[2]
    projected = sources[:1] if same else sources[:2] if given[1] == given[2] else sources
    weights = call.flag("need_weights")
    backend = None if weights or not same else _fused(call, layer)
    _attend(run, layer, projected, run.result(), backend, averaged=weights and len(call.op.outputs) > 1)
    return _named(run.cost(note=_NOTE), backend)


@formula("aten._transformer_encoder_layer_fwd")
def encoder_layer(call: Call) -> Cost:
    """Attention, two layer norms, two sums and a feed-forward net, in either order of norms.

    Beside attention's own: rows of width E are read seven times, `src` again among them, and written five times between
    kernels, hidden rows once each. The activation is computed in the product before it.
    """
    source, hidden = call.tensor("src"), call.tensor("ffn_weight_1").shape[0]
    width = call.integer("embed_dim", 0)
    layer = _layer(call, source, source, width, "num_heads")
    backend, first = _fused(call, layer), call.flag("norm_first")
    run, rows = Kernels(call, source.dtype), source.numel // max(width, 1)
    wide, item = rows * width * item_bytes(source), item_bytes(source)

    def norm(number: int, of: Buffer, into: Buffer | int) -> Buffer:
        reads = (of, *run.given(f"norm_weight_{number}", f"norm_bias_{number}"))
        return run.kernel("layer_norm", reads, into, flops=8 * rows * width + 3 * rows, special=rows)

    def add(left: Buffer, right: Buffer, into: Buffer | int) -> Buffer:
        return run.kernel("add", (left, right), into, flops=rows * width)

    src = run.argument("src")
    mixed = _attend(run, layer, [norm(1, src, wide) if first else src], wide, backend)
    summed = add(mixed, src, wide)
    middle = norm(2 if first else 1, summed, wide)
    gelu = call.flag("use_gelu")
    expanded = run.kernel(
        "_addmm_activation",
        (middle, *run.given("ffn_weight_1", "ffn_bias_1")),
        rows * hidden * item,
        flops=rows * hidden * (9 if gelu else 2),
        special=rows * hidden if gelu else 0,
        product=Gemm(batch=1, m=rows, n=hidden, k=width),
    )
    made = run.kernel(
        "addmm",
        (expanded, *run.given("ffn_weight_2", "ffn_bias_2")),
        wide,
        flops=rows * width,
        product=Gemm(batch=1, m=rows, n=width, k=hidden),
    )
    if first:
        add(made, summed, run.result())
    else:
        norm(2, add(made, middle, wide), run.result())
    return _named(run.cost(note=_NOTE), backend)


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
    inner, columns = source.shape[-1], out.shape[-1]
    return call.cost(
        matmul=multiply_adds(source.dtype, out.numel * inner),
        vector=vector(out.dtype, bias),
        gemms=products(out.numel // max(columns, 1), columns, inner),
    )


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


_NOTE = "attention inside a layer that is one operator"


def _named(cost: Cost, backend: str | None) -> Cost:
    return replace(cost, backend=backend or "math")


def _fused(call: Call, layer: Attention) -> str | None:
    """The fused kernel that the GPU would pick; None where scores go through memory."""
    if layer.mask is not None or layer.query.shape[-1] % _ALIGNMENT:
        return None
    name = choose_backend(layer, call.gpu).name
    return None if name == "math" else name


_ALIGNMENT = 8


def _attend(
    run: Kernels,
    layer: Attention,
    sources: list[Buffer],
    target: Buffer | int,
    fused: str | None,
    *,
    averaged: bool = False,
) -> Buffer:
    """Add the kernels of projections and attention; returns what the last writes.

    Matmul FLOPs: 2 E² a row for each of the four projections and 4 B S T E. Vector: biases, the scale, and per pair
    and head maximum, subtraction, sum and division.

    Args:
        run: the kernels so far.
        layer: query (B, H, S, D), key and value (B, H, T, D).
        sources: what is projected: to query, key and value; to query, then key and value; or to each.
        target: what the last projection writes.
        fused: the kernel that keeps scores on chip, or None.
        averaged: true where the mean of the scores over heads is the second result.
    """
    batch, heads, queries, head_dim = layer.query.shape
    keys, width, item = layer.key.shape[-2], heads * head_dim, item_bytes(layer.query)
    rows, pairs = batch * queries, batch * heads * queries * keys
    shapes = {1: [(rows, 3)], 2: [(rows, 1), (batch * keys, 2)], 3: [(rows, 1), *[(batch * keys, 1)] * 2]}[len(sources)]
    weight, bias = run.argument("qkv_weight"), run.given("qkv_bias")
    packed = (rows + 2 * batch * keys) * width
    projected: list[Buffer] = []
    for source, (count, parts) in zip(sources, shapes, strict=True):
        share = Buffer(weight.nbytes * parts // 3, weight.tensor)
        made = count * parts * width
        projected.append(
            run.kernel(
                "addmm" if fused else "mm",
                (source, share, *(bias if fused else ())),
                made * item,
                flops=made if fused else 0,
                product=Gemm(batch=1, m=count, n=parts * width, k=width),
            )
        )
    if fused:
        both = Gemm(batch=batch * heads, m=queries, n=keys, k=2 * head_dim)
        work = 4 * pairs + rows * width
        context = run.kernel(
            "scaled_dot_product_attention", projected, rows * width * item, flops=work, special=pairs, product=both
        )
    else:
        ready = run.kernel(
            "_transform_bias_rescale_qkv", (*projected, *bias), packed * item, flops=packed + rows * width
        )
        values = batch * keys * width * item
        scores = run.kernel(
            "bmm",
            (Buffer(ready.nbytes - values),),
            pairs * item,
            product=Gemm(batch=batch * heads, m=queries, n=keys, k=head_dim),
        )
        run.kernel("_softmax", (scores, *run.given("mask")), scores, flops=4 * pairs, special=pairs)
        context = run.kernel(
            "bmm",
            (scores, Buffer(values)),
            rows * width * item,
            product=Gemm(batch=batch * heads, m=queries, n=head_dim, k=keys),
        )
        if averaged:
            means = run.kernel("sum", (scores,), run.result(order=1), flops=pairs)
            run.kernel("div_", (means,), means, flops=pairs // heads)
    return run.kernel(
        "addmm",
        (context, *run.given("proj_weight", "proj_bias")),
        target,
        flops=rows * width,
        product=Gemm(batch=1, m=rows, n=width, k=width),
    )
