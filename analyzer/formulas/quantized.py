"""Products with packed operands, and quantisation itself.

Packed weights are read at their packed width, with scales and zero points; the product is filed under the
dtype that the matrix units multiply in: the activations' for weight-only schemes, the packed one for fp8, fp4
and int8.
"""

from ..cost import Call, Cost, formula
from .arithmetic import multiply_adds, vector


@formula("aten._int_mm")
def int_mm(call: Call) -> Cost:
    """Products of int8 by int8 into int32."""
    left = call.tensor("self")
    return call.cost(matmul=multiply_adds(left.dtype, call.output.numel * left.shape[-1]))


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
    )


@formula("aten._weight_int4pack_mm", "aten._weight_int4pack_mm_with_scales_and_zeros")
def weight_int4(call: Call) -> Cost:
    """Two weights a byte, scaled and shifted group by group before they are multiplied: 2 FLOPs a weight."""
    left, out = call.tensor("self"), call.output
    inner = left.shape[-1]
    return call.cost(
        matmul=multiply_adds(left.dtype, out.numel * inner),
        vector=vector(out.dtype, 2 * out.shape[-1] * inner),
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
