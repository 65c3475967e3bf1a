"""Normalisations and softmax.

Counted per element of the input, in float32 for half types: a mean is 1 FLOP, a variance 3 (subtract, square,
add), normalising 2 (subtract, multiply), a root mean square 2 (square, add) and 1 to apply it, an affine
weight 1 and an affine bias 1; each normalised group takes one rsqrt. The input is read once: PyTorch's
kernels keep a group on chip or read it twice through the cache.
"""

from math import prod

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import broadcast, vector


@formula("aten.layer_norm", "aten.native_layer_norm")
def layer_norm(call: Call) -> Cost:
    """6 FLOPs an element and 1 each for weight and bias; per row two divisions, an addition and an rsqrt."""
    source = call.tensor("input")
    return _standardised(call, source, source.numel // max(prod(call.integers("normalized_shape")), 1))


@formula("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call) -> Cost:
    """Statistics over each group of channels of each example, then a scale and a shift per channel applied."""
    source = call.tensor("input")
    groups = source.shape[0] * call.integer("num_groups", call.integer("group", 1))
    channels = prod(source.shape[:2])
    flops = 6 * source.numel + (1 + _affine(call)) * channels + 3 * groups
    return call.cost(vector=vector(source.dtype, flops), special=groups)


@formula("aten.instance_norm")
def instance_norm(call: Call) -> Cost:
    """A layer norm over each channel of each example, or a batch norm when running statistics are used."""
    source = call.tensor("input")
    if not call.flag("use_input_stats"):
        return _by_channel(call, source)
    return _standardised(call, source, prod(source.shape[:2]))


@formula(
    "aten.batch_norm",
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten._batch_norm_impl_index",
    "aten._batch_norm_no_update",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
)
def batch_norm(call: Call) -> Cost:
    """In inference a multiplication and an addition an element; in training a layer norm over channels."""
    source = call.tensor("input")
    if call.flag("training"):
        return _standardised(call, source, _channels(source))
    return _by_channel(call, source)


@formula("aten.rms_norm", "aten._fused_rms_norm")
def rms_norm(call: Call) -> Cost:
    """3 FLOPs an element and 1 for the weight; per row a division, an addition and an rsqrt.

    Priced as PyTorch's fused kernel. Where input and weight differ in dtype, eager PyTorch runs several
    kernels.
    """
    source = call.tensor("input")
    rows = source.numel // max(prod(call.integers("normalized_shape")), 1)
    flops = source.numel * (3 + (call.optional("weight") is not None)) + 2 * rows
    return call.cost(vector=vector(source.dtype, flops), special=rows)


@formula(
    "aten.softmax",
    "aten._softmax",
    "aten._safe_softmax",
    "aten._masked_softmax",
    "aten.special_softmax",
)
def softmax(call: Call) -> Cost:
    """Maximum, subtract, exp, sum, divide: 4 FLOPs and one transcendental an element.

    `softmax(half, dtype=float32)` is one CUDA kernel that reads half and writes float32.
    """
    source = call.tensor("self")
    masked = source.numel if call.optional("mask") else 0
    return call.cost(vector=vector(source.dtype, 4 * source.numel + masked), special=source.numel)


@formula("aten.log_softmax", "aten._log_softmax", "aten.special_log_softmax")
def log_softmax(call: Call) -> Cost:
    """Maximum, subtract, exp, sum, subtract the log: 4 FLOPs and an exp an element, a log per row."""
    source = call.tensor("self")
    return call.cost(vector=vector(source.dtype, 4 * source.numel), special=source.numel + _rows(call, source))


@formula("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(call: Call) -> Cost:
    """Rows of v scaled to length g: 2 FLOPs an element for the norm, 1 for the scaling; a root a row."""
    direction, rows = call.tensor("v"), call.tensor("g").numel
    return call.cost(vector=vector(direction.dtype, 3 * direction.numel + rows), special=rows)


@formula("aten.cosine_similarity")
def cosine_similarity(call: Call) -> Cost:
    """Three dot products of the broadcast operands; per result 2 roots, a maximum, a product, a division."""
    out = call.output
    flops = 6 * prod(broadcast(call.inputs)) + 3 * out.numel
    return call.cost(vector=vector(out.dtype, flops), special=2 * out.numel)


@formula("aten.renorm")
def renorm(call: Call) -> Cost:
    """Slices scaled down to a norm: 2 FLOPs an element for the norm, 1 for the scaling, a root per slice."""
    source = call.tensor("self")
    slices = source.shape[call.integer("dim", 0)]
    return call.cost(vector=vector(source.dtype, 3 * source.numel + 2 * slices), special=slices)


def _rows(call: Call, source: Tensor) -> int:
    width = source.shape[call.integer("dim", -1)] if source.shape else 1
    return source.numel // max(width, 1)


def _channels(source: Tensor) -> int:
    return source.shape[1] if len(source.shape) > 1 else source.numel


def _affine(call: Call) -> int:
    return sum(call.optional(name) is not None for name in ("weight", "bias"))


def _standardised(call: Call, source: Tensor, groups: int) -> Cost:
    flops = source.numel * (6 + _affine(call)) + 3 * groups
    return call.cost(vector=vector(source.dtype, flops), special=groups)


def _by_channel(call: Call, source: Tensor) -> Cost:
    # x * scale + shift, where scale = weight * rsqrt(var + eps) and shift = bias - mean * scale
    channels = _channels(source)
    flops = 2 * source.numel + channels * (2 + _affine(call))
    return call.cost(vector=vector(source.dtype, flops), special=channels)
