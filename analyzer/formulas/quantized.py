"""Products with packed operands, and quantisation itself.

Packed weights are read at their packed width, with scales and zero points; the product is filed under the
dtype that the matrix units multiply in: the activations' for weight-only schemes, the packed one for fp8, fp4
and int8. The ops of `fxroof` are those that quantised transformers models are traced to (see `packed`).
"""

from ..cost import Call, Cost, Gemm, formula
from ..graph import Tensor
from .arithmetic import item_bytes, multiply_adds, products, vector
from .moe import experts_met, experts_read, own_bytes, own_rows


@formula("aten._int_mm")
def int_mm(call: Call) -> Cost:
    """Products of int8 by int8 into int32."""
    left = call.tensor("self")
    return call.cost(
        matmul=multiply_adds(left.dtype, call.output.numel * left.shape[-1]), gemms=_product(left, call.output)
    )


@formula("aten._weight_int8pack_mm", "aten._mixed_dtypes_linear")
def weight_int8(call: Call) -> Cost:
    """Weights widened on the way to the matrix units; one scale per output channel, applied to the result."""
    left = call.optional("self") or call.tensor("input")
    out = call.output
    bias = out.numel if call.optional("bias") else 0
    activation = out.numel if call.arg("activation") in ("relu", "silu") else 0
    silu = activation if call.arg("activation") == "silu" else 0
    return call.cost(
        matmul=multiply_adds(left.dtype, out.numel * left.shape[-1]),
        vector=vector(out.dtype, out.numel + bias + activation + 2 * silu),
        special=silu,
        gemms=_product(left, out),
    )


@formula("aten._weight_int4pack_mm", "aten._weight_int4pack_mm_with_scales_and_zeros")
def weight_int4(call: Call) -> Cost:
    """Two weights a byte, scaled and shifted group by group before they are multiplied: 2 FLOPs a weight."""
    left, out = call.tensor("self"), call.output
    inner = left.shape[-1]
    return call.cost(
        matmul=multiply_adds(left.dtype, out.numel * inner),
        vector=vector(out.dtype, 2 * out.shape[-1] * inner),
        gemms=_product(left, out),
    )


@formula("aten._scaled_mm", "aten._scaled_mm_v2")
def scaled_mm(call: Call) -> Cost:
    """Scaled fp8 or fp4 operands (an fp4 element of the shape holds two values); 1 FLOP a result to scale."""
    left, out = call.tensor("self"), call.output
    packed = 2 if left.dtype == "float4_e2m1fn_x2" else 1
    bias = out.numel if call.optional("bias") else 0
    return call.cost(
        matmul=multiply_adds(left.dtype, out.numel * left.shape[-1] * packed),
        vector=vector(out.dtype, out.numel + bias),
        gemms=_product(left, out, packed),
    )


@formula(
    "aten.quantize_per_tensor",
    "aten.quantize_per_channel",
    "quantized_decomposed.quantize_per_tensor",
    "quantized_decomposed.quantize_per_channel",
    "quantized_decomposed.quantize_per_token",
    "quantized_decomposed.quantize_per_channel_group",
)
def quantize(call: Call) -> Cost:
    """Scale, add the zero point, round, clamp at both ends: 5 FLOPs an element."""
    source = call.inputs[0]
    return call.cost(vector=vector(source.dtype, 5 * call.output.numel))


@formula(
    "aten.dequantize",
    "quantized_decomposed.dequantize_per_tensor",
    "quantized_decomposed.dequantize_per_channel",
    "quantized_decomposed.dequantize_per_token",
    "quantized_decomposed.dequantize_per_channel_group",
)
def dequantize(call: Call) -> Cost:
    """Subtract the zero point, scale: 2 FLOPs an element."""
    return call.cost(vector=vector(call.output.dtype, 2 * call.output.numel))


@formula(
    "aten.fake_quantize_per_tensor_affine",
    "aten.fake_quantize_per_channel_affine",
    "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten.fake_quantize_per_channel_affine_cachemask",
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)
def fake_quantize(call: Call) -> Cost:
    """Quantise and dequantise in place of the value: 7 FLOPs an element."""
    return call.cost(vector=vector(call.output.dtype, 7 * call.output.numel))


@formula("quantized_decomposed.choose_qparams", "quantized_decomposed.choose_qparams_per_token")
def choose_parameters(call: Call) -> Cost:
    """Least and greatest of all input elements: 2 comparisons each."""
    source = call.inputs[0]
    return call.cost(vector=vector(source.dtype, 2 * source.numel))


@formula("fxroof.quantize_activations")
def quantize_activations(call: Call) -> Cost:
    """Greatest magnitude of each group, scale, clamp: 2 comparisons and 2 FLOPs an element.

    Where the kernel of the product quantises as it loads, this op is that loading: the input is read, nothing written.
    """
    source = call.tensor("x")
    work = vector(source.dtype, 4 * source.numel)
    if _quantises_as_it_loads(call):
        return call.cost(vector=work, writes=0, note="activations are quantised by the kernel that multiplies them")
    return call.cost(vector=work, quantises=True)


@formula("fxroof.linear_scaled")
def linear_scaled(call: Call) -> Cost:
    """Products of 8-bit operands; each group of the inner dimension is scaled on its own: 2 FLOPs a group and result.

    bitsandbytes leaves int32 results in memory, and scales them with a kernel of its own.
    """
    left, out = call.tensor("x"), call.output
    inner = left.shape[-1]
    rows = left.numel // inner if inner else 0
    groups = max(1, call.tensor("x_scale").numel // rows) if rows else 1
    bias = out.numel if call.optional("bias") else 0
    between = 4 * out.numel if call.arg("kernel") == "bitsandbytes" else 0
    return call.cost(
        matmul=multiply_adds(left.dtype, out.numel * inner),
        vector=vector(out.dtype, 2 * groups * out.numel + bias),
        reads={"x": 0, "x_scale": 0} if _quantises_as_it_loads(call) else None,
        gemms=_product(left, out),
        scratch_read=between,
        scratch_written=between,
    )


@formula("fxroof.linear_packed")
def linear_packed(call: Call) -> Cost:
    """Weights widened to the activations' type in registers: 2 FLOPs a weight in that type, then one product.

    A column order (GPTQ's desc_act) costs a copy of the activations.
    """
    left, out = call.tensor("x"), call.output
    inner = left.shape[-1]
    bias = out.numel if call.optional("bias") else 0
    reordered = left.touched_bytes if call.optional("order") else 0
    return call.cost(
        matmul=multiply_adds(left.dtype, out.numel * inner),
        vector=_work({left.dtype: 2 * out.shape[-1] * inner}, vector(out.dtype, bias)),
        scratch_read=reordered,
        scratch_written=reordered,
        gemms=_product(left, out),
    )


@formula("fxroof.dequantize_weight")
def dequantize_weight(call: Call) -> Cost:
    """A whole matrix widened in memory: a table look-up and 1 FLOP an element."""
    return call.cost(vector=vector(call.output.dtype, call.output.numel))


@formula("fxroof.grouped_linear")
def grouped_linear(call: Call) -> Cost:
    """Rows sorted by expert times packed matrices: fp8 by fp8, quantising as it loads, or widened in registers."""
    left, weight, out = call.tensor("x"), call.tensor("weight"), call.output
    rows, inner = left.shape[0], left.shape[-1]
    own = own_rows(call, rows)
    results = own * out.shape[-1]
    if weight.dtype.startswith("float8"):
        scales = call.tensor("scales")
        multiplied, groups = weight.dtype, scales.shape[-1]
        work = vector(left.dtype, 4 * own * inner + 2 * groups * results)
    else:
        experts = weight.shape[0]
        used = experts_read(call, weight, rows)[0] * experts // max(weight.touched_bytes, 1)
        multiplied, work = left.dtype, {left.dtype: 2.0 * used * inner * out.shape[-1]}
    reads, expected = _read_of_experts(call, ("weight", "scales", "zeros"), rows)
    return call.cost(
        matmul=multiply_adds(multiplied, results * inner),
        vector=work,
        reads=reads | {"x": own_bytes(call, left)},
        writes=own_bytes(call, out),
        expected_reads=expected,
        gemms=products(own, out.shape[-1], inner, groups=experts_met(call, weight, rows)),
    )


@formula("fxroof.route")
def route(call: Call) -> Cost:
    """The greatest logits of each row and their softmax: a comparison a logit, an exponential a choice."""
    logits, scores = call.tensor("logits"), call.output
    return call.cost(vector=vector(logits.dtype, logits.numel + 3 * scores.numel), special=scores.numel)


@formula("fxroof.experts_gate_up_mxfp4")
def experts_gate_up_mxfp4(call: Call) -> Cost:
    """Rows gathered, multiplied, biased and gated in one kernel: of each pair of results SwiGLU makes one.

    Clamped SwiGLU is 9 FLOPs and an exponential; a weight is widened with 1 FLOP.
    """
    out = call.output
    made = own_rows(call, out.shape[0]) * out.shape[-1]
    both = 2 * made
    return _mxfp4(
        call, rows=out.shape[0], results=both, extra=both + 9 * made, special=made, writes=own_bytes(call, out)
    )


@formula("fxroof.experts_down_mxfp4")
def experts_down_mxfp4(call: Call) -> Cost:
    """Results are biased and weighted, written an expert each, then read back and summed by row."""
    left, out, experts = call.tensor("x"), call.output, call.tensor("experts")
    rows = left.shape[0]
    results = own_rows(call, rows) * out.shape[-1]
    between = results * item_bytes(out) if experts.shape[-1] > 1 else 0
    return _mxfp4(call, rows=rows, results=results, extra=3 * results, between=between)


def _mxfp4(
    call: Call,
    *,
    rows: int,
    results: int,
    extra: int,
    special: int = 0,
    between: int = 0,
    writes: int | None = None,
) -> Cost:
    left = call.tensor("x")
    reads, expected = _read_of_experts(call, ("weight", "scales", "bias"), rows)
    if left.shape[0] == rows:
        reads["x"] = own_bytes(call, left)
    return call.cost(
        matmul=multiply_adds(left.dtype, results * left.shape[-1]),
        vector=_work({left.dtype: 2.0 * reads["weight"]}, vector(left.dtype, extra)),
        special=special,
        reads=reads,
        writes=writes,
        expected_reads=expected,
        scratch_read=between,
        scratch_written=between,
        note=f"mxfp4 weights are widened to {left.dtype}",
        gemms=products(
            own_rows(call, rows),
            results // max(own_rows(call, rows), 1),
            left.shape[-1],
            groups=experts_met(call, call.tensor("weight"), rows),
        ),
    )


def _product(left: Tensor, out: Tensor, packed: int = 1) -> tuple[Gemm, ...]:
    columns = out.shape[-1] if out.shape else 1
    return products(out.numel // max(columns, 1), columns, left.shape[-1] * packed)


def _read_of_experts(call: Call, names: tuple[str, ...], rows: int) -> tuple[dict[str, int], dict[str, int]]:
    stacks: dict[str, Tensor] = {name: tensor for name in names if (tensor := call.optional(name)) is not None}
    both = {name: experts_read(call, tensor, rows) for name, tensor in stacks.items()}
    return {name: least for name, (least, _) in both.items()}, {name: average for name, (_, average) in both.items()}


def _quantises_as_it_loads(call: Call) -> bool:
    # transformers' fp8_linear: DeepGEMM takes operands quantised before, and runs on compute capability 9 and, with
    # e8m0 scales, 10; its Triton kernel quantises on the way in
    major = call.gpu.compute_capability[0] if call.gpu.compute_capability else 0
    kernel = call.arg("kernel")
    if kernel == "deepgemm":
        return major != 9
    if kernel == "deepgemm_ue8m0":
        return major not in (9, 10)
    return kernel == "triton"


def _work(*parts: dict[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for dtype, flops in part.items():
            total[dtype] = total.get(dtype, 0.0) + flops
    return total
