"""Normalisations and softmax.

Counted per element of the input, in float32 for half types: a mean is 1 FLOP, a variance 3 (subtract, square,
add), normalising 2 (subtract, multiply), a root mean square 2 (square, add) and 1 to apply it, an affine
weight 1 and an affine bias 1; each normalised group takes one rsqrt. The input is read once where a kernel keeps
a group on chip or reads it twice through the cache; `group_norm` and composite ops read it in several kernels.
"""

from dataclasses import replace
from math import prod

from ..cost import Call, Cost, formula, operator_name
from ..graph import ITEM_BITS, Tensor
from .arithmetic import broadcast, item_bytes, opmath, promoted, vector
from .parts import Buffer, Kernels, is_contiguous

_FLOAT_BYTES = 4


@formula("aten.layer_norm", "aten.native_layer_norm")
def layer_norm(call: Call) -> Cost:
    """6 FLOPs an element and 1 each for weight and bias; per row two divisions, an addition and an rsqrt."""
    source = call.tensor("input")
    return _standardised(call, source, source.numel // max(prod(call.integers("normalized_shape")), 1))


@formula("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call) -> Cost:
    """Statistics over each group of channels of each example, then a scale and a shift per channel applied.

    Three kernels, the last of which reads the input again (cuda/group_norm_kernel.cu): two without weight and bias, or
    for channels of one element. An input that is not contiguous, channels last for instance, is copied first.
    """
    source = call.tensor("input")
    groups = source.shape[0] * call.integer("num_groups", call.integer("group", 1))
    channels = prod(source.shape[:2])
    if call.gpu.vendor == "apple" or not source.numel:
        flops = 6 * source.numel + (1 + _affine(call)) * channels + 3 * groups
        return call.cost(vector=vector(source.dtype, flops), special=groups)
    run = Kernels(call, source.dtype)
    x = run.argument("input")
    if not is_contiguous(source):
        x = run.kernel("copy input", (x,), source.nbytes)
    if len(call.op.outputs) > 1:
        mean, spread = run.result(order=1), run.result(order=2)
    else:
        statistic = groups * item_bytes(call.optional("weight") or source)
        mean, spread = Buffer(statistic), Buffer(statistic)
    run.kernel("moments", (x,), mean, flops=4 * source.numel + 3 * groups, special=groups, also=(spread,))
    factors: tuple[Buffer, ...] = (mean, spread, *run.given("weight", "bias"))
    if _affine(call) and source.numel > channels:
        scale = 2 * channels * max(item_bytes(source), _FLOAT_BYTES)
        factors = (run.kernel("scale and shift of channels", factors, scale, flops=(1 + _affine(call)) * channels),)
    run.kernel("scale and shift", (x, *factors), run.result(), flops=2 * source.numel)
    return run.cost()


@formula("aten.instance_norm")
def instance_norm(call: Call) -> Cost:
    """A layer norm over each channel of each example, or a batch norm when running statistics are used.

    Taken as one batch norm over all channels of all examples, for which weight, bias and statistics are repeated for
    each example (Normalization.cpp).
    """
    source = call.tensor("input")
    fresh = call.flag("use_input_stats")
    whole = _standardised(call, source, prod(source.shape[:2])) if fresh else _by_channel(call, source)
    if fresh and call.optional("running_mean"):
        return whole
    run = Kernels(call, source.dtype)
    copies = [
        run.kernel(f"copy_ {name}", run.given(name), prod(source.shape[:2]) * item_bytes(call.tensor(name)))
        for name in ("weight", "bias", "running_mean", "running_var")
        if call.optional(name)
    ]
    reads = (run.argument("input"), *copies)
    run.kernel("native_batch_norm", reads, run.result(), flops=whole.vector_flops, special=whole.special)
    return run.cost()


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

    One fused kernel, but where input and weight differ in dtype a kernel for every step, in float32 for half types
    (layer_norm.cpp).
    """
    source, weight = call.tensor("input"), call.optional("weight")
    rows = source.numel // max(prod(call.integers("normalized_shape")), 1)
    if weight is None or weight.dtype == source.dtype or "_fused" in call.op.target:
        flops = source.numel * (3 + (weight is not None)) + 2 * rows
        return call.cost(vector=vector(source.dtype, flops), special=rows)
    run, count, wide = Kernels(call, source.dtype), source.numel, opmath(source.dtype)
    item = ITEM_BITS[wide] // 8
    x = run.argument("input")
    if wide != source.dtype:
        x = run.kernel("_to_copy", (x,), count * item)
    squares = run.kernel("pow", (x,), count * item, flops=count)
    mean = run.kernel("mean", (squares,), rows * item, flops=count + rows)
    run.kernel("add_", (mean,), mean, flops=rows)
    scale = run.kernel("rsqrt", (mean,), rows * item, special=rows)
    normalised = run.kernel("mul", (x, scale), count * item, flops=count)
    result = promoted([weight, replace(source, dtype=wide)])
    last = result == call.output.dtype
    whole = count * ITEM_BITS[result] // 8
    weighted = run.kernel("mul", (normalised, *run.given("weight")), run.result() if last else whole, flops=count)
    if not last:
        run.kernel("_to_copy", (weighted,), run.result())
    return run.cost()


@formula(
    "aten.softmax",
    "aten._softmax",
    "aten._safe_softmax",
    "aten._masked_softmax",
    "aten.special_softmax",
)
def softmax(call: Call) -> Cost:
    """Maximum, subtract, exp, sum, divide: 4 FLOPs and one transcendental an element.

    `softmax(half, dtype=float32)` is one CUDA kernel that reads float16 and writes float32; any other input that
    changes its dtype is copied first (SoftMax.cpp). `_safe_softmax` zeroes rows that are hidden whole, in four more.
    """
    source = call.tensor("self")
    masked = source.numel if call.optional("mask") else 0
    work, name = 4 * source.numel + masked, operator_name(call.op.target).removeprefix("aten.")
    if name == "_safe_softmax" and source.numel:
        return _safe_softmax(call, source)
    if not _copied_first(call, source):
        return call.cost(vector=vector(source.dtype, work), special=source.numel)
    return _converted(call, source, "_softmax", work, source.numel)


@formula("aten.log_softmax", "aten._log_softmax", "aten.special_log_softmax")
def log_softmax(call: Call) -> Cost:
    """Maximum, subtract, exp, sum, subtract the log: 4 FLOPs and an exp an element, a log per row."""
    source = call.tensor("self")
    special = source.numel + _rows(call, source)
    if not _copied_first(call, source):
        return call.cost(vector=vector(source.dtype, 4 * source.numel), special=special)
    return _converted(call, source, "_log_softmax", 4 * source.numel, special)


@formula("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(call: Call) -> Cost:
    """Rows of v scaled to length g: 2 FLOPs an element for the norm, 1 for the scaling; a root a row."""
    direction, rows = call.tensor("v"), call.tensor("g").numel
    return call.cost(vector=vector(direction.dtype, 3 * direction.numel + rows), special=rows)


@formula("aten.cosine_similarity")
def cosine_similarity(call: Call) -> Cost:
    """Both operands divided by their norms, at least eps, multiplied and summed: a kernel each (Distance.cpp)."""
    run, out = Kernels(call), call.output
    item, count = item_bytes(out), prod(broadcast(call.inputs))
    dim = call.integer("dim", 1)
    unit: list[Buffer] = []
    norms: list[Buffer] = []
    for name in ("x1", "x2"):
        source = call.tensor(name)
        rows = source.numel // max(source.shape[dim], 1)
        norm = run.kernel("linalg_vector_norm", run.given(name), rows * item, flops=2 * source.numel, special=rows)
        norms.append(run.kernel("clone", (norm,), norm.nbytes))
    least = run.kernel("fill_", (), _FLOAT_BYTES)
    for norm in norms:
        run.kernel("clamp_min_", (norm, least), norm, flops=norm.nbytes // item)
    for name, norm in zip(("x1", "x2"), norms, strict=True):
        source = call.tensor(name)
        unit.append(run.kernel("div", (*run.given(name), norm), source.numel * item, flops=source.numel))
    product = run.kernel("mul", unit, count * item, flops=count)
    run.kernel("sum", (product,), run.result(), flops=count)
    return run.cost()


@formula("aten.renorm")
def renorm(call: Call) -> Cost:
    """Slices scaled down to a norm: 2 FLOPs an element for the norm, 1 for the scaling, a root per slice."""
    source = call.tensor("self")
    slices = source.shape[call.integer("dim", 0)]
    return call.cost(vector=vector(source.dtype, 3 * source.numel + 2 * slices), special=slices)


def _copied_first(call: Call, source: Tensor) -> bool:
    in_one = source.dtype == "float16" and call.output.dtype == "float32" and call.gpu.vendor != "apple"
    return call.arg("dtype") is not None and call.output.dtype != source.dtype and not in_one


def _converted(call: Call, source: Tensor, name: str, flops: float, special: float) -> Cost:
    run = Kernels(call)
    wide = run.kernel("_to_copy", run.given("self"), call.output.nbytes)
    run.kernel(name, (wide,), run.result(), flops=flops, special=special, dtype=source.dtype)
    return run.cost()


def _safe_softmax(call: Call, source: Tensor) -> Cost:
    run, count, rows = Kernels(call), source.numel, _rows(call, source)
    x = run.argument("self")
    if call.output.dtype != source.dtype:
        x = run.kernel("_to_copy", (x,), call.output.nbytes)
    shares = run.kernel("_softmax", (x,), call.output.nbytes, flops=4 * count, special=count)
    hidden = run.kernel("isneginf", (x,), count, flops=count)
    empty = run.kernel("all", (hidden,), rows, flops=count)
    zero = run.kernel("fill_", (), item_bytes(call.output))
    run.kernel("where", (empty, zero, shares), run.result(), flops=count)
    return run.cost()


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
