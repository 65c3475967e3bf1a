"""Resampling of images: each result element is a weighted sum of a few input elements.

A weighted sum of t taps along one dimension is t multiplications and t - 1 additions, dimension by dimension.
"""

from math import ceil

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import reach, vector


@formula(
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    "aten._upsample_nearest_exact1d",
    "aten._upsample_nearest_exact2d",
    "aten._upsample_nearest_exact3d",
)
def nearest(call: Call) -> Cost:
    """A copy of chosen elements."""
    return _resampled(call, 0)


@formula("aten.upsample_linear1d")
def linear(call: Call) -> Cost:
    """2 taps: 3 FLOPs a result."""
    return _resampled(call, _separable(2, 1))


@formula("aten.upsample_bilinear2d")
def bilinear(call: Call) -> Cost:
    """2 x 2 taps: 9 FLOPs a result."""
    return _resampled(call, _separable(2, 2))


@formula("aten.upsample_trilinear3d")
def trilinear(call: Call) -> Cost:
    """2 x 2 x 2 taps: 21 FLOPs a result."""
    return _resampled(call, _separable(2, 3))


@formula("aten.upsample_bicubic2d")
def bicubic(call: Call) -> Cost:
    """4 x 4 taps: 35 FLOPs a result."""
    return _resampled(call, _separable(4, 2))


@formula("aten._upsample_bilinear2d_aa")
def bilinear_antialiased(call: Call) -> Cost:
    """A triangle filter as wide as the reduction: 2 FLOPs a tap, 2 x the scale taps along each side."""
    return _resampled(call, _antialiased(call, 1))


@formula("aten._upsample_bicubic2d_aa")
def bicubic_antialiased(call: Call) -> Cost:
    """A cubic filter as wide as the reduction: 2 FLOPs a tap, 4 x the scale taps along each side."""
    return _resampled(call, _antialiased(call, 2))


@formula("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler")
def grid_sampler(call: Call) -> Cost:
    """Interpolation at given points: 2 FLOPs a tap and result (nearest: none), 4 a coordinate."""
    source, grid = call.optional("input") or call.tensor("self"), call.tensor("grid")
    ndim, out = grid.shape[-1], call.output
    taps = {0: 2**ndim, 1: 0, 2: 4**ndim}.get(call.integer("interpolation_mode", 0), 2**ndim)
    name = "input" if call.optional("input") else "self"
    return call.cost(
        vector=vector(out.dtype, 2 * taps * out.numel + 4 * grid.numel),
        reads={name: reach(call, source, max(taps, 1) * out.numel)},
    )


@formula("aten.affine_grid_generator")
def affine_grid(call: Call) -> Cost:
    """An affine map of each grid point: 2 FLOPs a matrix column and coordinate."""
    columns = call.tensor("theta").shape[-1]
    return call.cost(vector=vector(call.output.dtype, 2 * columns * call.output.numel))


def _resampled(call: Call, flops: float) -> Cost:
    name = "input" if call.optional("input") else "self"
    source, out = call.tensor(name), call.output
    reads = {name: reach(call, source, out.numel)} if not flops else None
    return call.cost(vector=vector(out.dtype, flops * out.numel), reads=reads)


def _separable(taps: int, ndim: int) -> int:
    """The last dimension first: taps ** (ndim - 1) sums, then one dimension fewer."""
    return sum((2 * taps - 1) * taps**d for d in range(ndim))


def _antialiased(call: Call, support: int) -> int:
    source: Tensor = call.optional("input") or call.tensor("self")
    pairs = zip(source.shape[-2:], call.output.shape[-2:], strict=True)
    high, wide = (ceil(2 * support * max(1.0, n / m)) for n, m in pairs)
    return 2 * high * wide
