"""Cost x Gpu -> Placement: which lane of the GPU limits a kernel, and how fast it can be at best.

Lanes run in parallel, so the time is that of the slowest lane, not their sum (Williams, Waterman and Patterson,
"Roofline", CACM 52(4), 2009).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..hardware.gpu import Gpu
from .cost import Cost


class Bound(StrEnum):
    """What limits a kernel."""

    MEMORY = "memory"
    COMPUTE = "compute"
    SPECIAL = "special"
    LATENCY = "latency"
    FREE = "free"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Seconds that each unit of the GPU is busy with a kernel at the vendor's peak."""

    tensor: float = 0.0
    vector: float = 0.0
    special: float = 0.0
    memory: float = 0.0

    def times(self, repeat: int) -> "Lanes":
        """Seconds of that many kernels."""
        if repeat == 1:
            return self
        return Lanes(
            tensor=repeat * self.tensor,
            vector=repeat * self.vector,
            special=repeat * self.special,
            memory=repeat * self.memory,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A kernel on a GPU's roofline.

    Attributes:
        lanes: seconds by unit.
        seconds: the bound: no run of this kernel on this part is faster.
        bound: the lane that sets it.
        intensity: executed FLOPs per byte of device memory traffic; 0 where nothing moves.
        ridge: intensity at which memory and arithmetic take equally long for the dtype used; None when the part
            publishes no rate for it.
        unrated: dtypes whose work the part publishes no rate for, left out of the bound.
        widened: dtypes computed on a wider path, as {asked: used}.
    """

    lanes: Lanes
    seconds: float
    bound: Bound
    intensity: float
    ridge: float | None
    unrated: tuple[str, ...] = ()
    widened: Mapping[str, str] = field(default_factory=dict)


def place(cost: Cost, bytes_read: int, bytes_written: int, gpu: Gpu) -> Placement:
    """Place a cost on a GPU.

    Args:
        cost: the work.
        bytes_read: bytes from device memory.
        bytes_written: bytes to device memory.
        gpu: the part.
    """
    tensor = vector = 0.0
    unrated: list[str] = []
    widened: dict[str, str] = {}
    for dtype, flops in cost.matmul.items():
        rate = gpu.matmul_rate(dtype, tf32=cost.tf32)
        if rate is None:
            unrated.append(dtype)
            continue
        if rate.widened_from:
            widened[dtype] = rate.dtype
        if rate.unit == "tensor":
            tensor += flops / rate.flops_per_second
        else:
            vector += flops / rate.flops_per_second
    for dtype, flops in cost.vector.items():
        rate = gpu.vector_rate(dtype)
        if rate is None:
            unrated.append(dtype)
        else:
            vector += flops / rate.flops_per_second
    total_bytes = bytes_read + bytes_written
    lanes = Lanes(
        tensor=tensor,
        vector=vector,
        special=cost.special / _special_rate(gpu) if gpu.special_per_second else 0.0,
        memory=total_bytes / gpu.memory_bandwidth,
    )
    seconds, bound = max(
        (lanes.memory, Bound.MEMORY),
        (lanes.tensor, Bound.COMPUTE),
        (lanes.vector, Bound.COMPUTE),
        (lanes.special, Bound.SPECIAL),
        key=lambda lane: lane[0],
    )
    flops = cost.executed_matmul_flops + cost.vector_flops
    return Placement(
        lanes=lanes,
        seconds=seconds,
        bound=bound if seconds else Bound.FREE,
        intensity=flops / total_bytes if total_bytes else 0.0,
        ridge=_ridge(cost, gpu),
        unrated=tuple(dict.fromkeys(unrated)),
        widened=widened,
    )


_EMULATION_FLOPS = 12
"""Vector FLOP slots of an exponential computed as a polynomial: range reduction and a cubic in 6 instructions."""


def _special_rate(gpu: Gpu) -> float:
    # kernels on Blackwell compute part of their exponentials on the FMA units beside the special-function units
    # (FlashAttention-4), so the bound allows both everywhere
    vector = gpu.vector_rate("float32")
    return (gpu.special_per_second or 0.0) + (vector.flops_per_second / _EMULATION_FLOPS if vector else 0.0)


def _ridge(cost: Cost, gpu: Gpu) -> float | None:
    work = cost.matmul or cost.vector
    if not work:
        return None
    dtype = max(work, key=lambda name: work[name])
    rate = gpu.matmul_rate(dtype, tf32=cost.tf32) if cost.matmul else gpu.vector_rate(dtype)
    return rate.flops_per_second / gpu.memory_bandwidth if rate else None
