"""The widths that weights can be narrowed to, and what is stored of a matrix in each."""

from collections.abc import Callable
from dataclasses import dataclass

from ..hardware.gpu import Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """What is stored of a matrix (outputs x inner) at a width.

    Attributes:
        name: for people.
        dtype: of what is stored.
        per_byte: elements in one of its items.
        scale: dtype of the scales.
        group: elements of the inner dimension that share one, given how many there are.
    """

    name: str
    dtype: str
    per_byte: int
    scale: str
    group: Callable[[int], int]


_INT8 = Width(name="int8 weights", dtype="int8", per_byte=1, scale="float32", group=lambda inner: inner)
_FP8 = Width(name="fp8 weights", dtype="float8_e4m3fn", per_byte=1, scale="float32", group=lambda inner: inner)
_INT4 = Width(name="int4 weights", dtype="uint8", per_byte=2, scale="bfloat16", group=lambda inner: min(128, inner))
_NVFP4 = Width(
    name="nvfp4 weights", dtype="uint8", per_byte=2, scale="float8_e4m3fn", group=lambda inner: min(16, inner)
)


def widths(gpu: Gpu) -> tuple[Width, ...]:
    """What the part multiplies fast, 8 bits first; widening needs no tensor path of that width, but kernels do."""
    eight = (_FP8, _INT8) if "float8" in gpu.tensor else (_INT8,)
    return (*eight, _INT4, *((_NVFP4,) if "float4" in gpu.tensor else ()))
