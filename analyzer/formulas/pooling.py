"""Pooling: windows of the input reduced to one element each."""

from math import prod

from ..cost import Call, Cost, formula
from .arithmetic import vector

_INDEX_BYTES = 8


@formula("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
def average(call: Call) -> Cost:
    """An addition per window element and a division per result."""
    out = call.output
    return call.cost(vector=vector(out.dtype, out.numel * (_window(call) + 1)))


@formula(
    "aten.max_pool1d",
    "aten.max_pool2d",
    "aten.max_pool3d",
    "aten.max_pool1d_with_indices",
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
)
def maximum(call: Call) -> Cost:
    """A comparison per window element. CUDA kernels write int64 positions even when nobody asked for them."""
    out = call.output
    unasked = out.numel * _INDEX_BYTES if len(call.outputs) == 1 else 0
    return call.cost(vector=vector(out.dtype, out.numel * _window(call)), scratch_written=unasked)


@formula(
    "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d",
    "aten.adaptive_avg_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
)
def adaptive_average(call: Call) -> Cost:
    """An addition per window element and a division per result."""
    return call.cost(vector=vector(call.output.dtype, _adaptive(call) + call.output.numel))


@formula("aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d")
def adaptive_maximum(call: Call) -> Cost:
    """A comparison per window element."""
    return call.cost(vector=vector(call.output.dtype, _adaptive(call)))


def _window(call: Call) -> int:
    kernel = call.integers("kernel_size")
    ndim = int(call.op.target.split("pool")[1][0])
    return prod(kernel) if len(kernel) == ndim else kernel[0] ** ndim


def _adaptive(call: Call) -> int:
    """Elements of all windows: along a dimension, result i takes input floor(i n/m) to ceil((i + 1) n/m)."""
    source, out = call.tensor("self"), call.output
    ndim = int(call.op.target.split("pool")[1][0])
    spans = [
        sum(-(-(i + 1) * n // m) - i * n // m for i in range(m))
        for n, m in zip(source.shape[-ndim:], out.shape[-ndim:], strict=True)
    ]
    return prod(out.shape[:-ndim]) * prod(spans)
