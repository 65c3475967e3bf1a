"""Cost x Gpu -> Placement: which lane of the GPU limits a kernel, and how fast it can be at best.

Lanes run in parallel, so the time is that of the slowest lane, not their sum (Williams, Waterman and Patterson,
"Roofline", CACM 52(4), 2009).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..hardware.gpu import Gpu
from .collectives import least_seconds
from .cost import Cost


class Bound(StrEnum):
    """What limits a kernel."""

    MEMORY = "memory"
    COMPUTE = "compute"
    SPECIAL = "special"
    LINK = "link"
    LATENCY = "latency"
    FREE = "free"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Seconds that each unit of the GPU is busy with a kernel at the vendor's peak.

    `l2` is 0 where the part publishes no bandwidth for its L2, `link` where a kernel tells other GPUs nothing.
    """

    tensor: float = 0.0
    vector: float = 0.0
    special: float = 0.0
    memory: float = 0.0
    l2: float = 0.0
    link: float = 0.0

    @property
    def slowest(self) -> tuple[float, Bound]:
        """Seconds of the lane that a kernel ends with, and its class; L2 counts as memory."""
        return max(
            (self.memory, Bound.MEMORY),
            (self.l2, Bound.MEMORY),
            (self.tensor, Bound.COMPUTE),
            (self.vector, Bound.COMPUTE),
            (self.special, Bound.SPECIAL),
            (self.link, Bound.LINK),
            key=lambda lane: lane[0],
        )

    def times(self, repeat: int) -> "Lanes":
        """Seconds of that many kernels."""
        if repeat == 1:
            return self
        return Lanes(
            tensor=repeat * self.tensor,
            vector=repeat * self.vector,
            special=repeat * self.special,
            memory=repeat * self.memory,
            l2=repeat * self.l2,
            link=repeat * self.link,
        )

    def __add__(self, other: "Lanes") -> "Lanes":
        return Lanes(
            tensor=self.tensor + other.tensor,
            vector=self.vector + other.vector,
            special=self.special + other.special,
            memory=self.memory + other.memory,
            l2=self.l2 + other.l2,
            link=self.link + other.link,
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


def place(cost: Cost, moved: int, from_memory: float, gpu: Gpu) -> Placement:
    """Place a cost on a GPU.

    Args:
        cost: the work.
        moved: bytes that it reads and writes.
        from_memory: those of them that cross the memory bus; the others are found in a cache.
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
    lanes = Lanes(
        tensor=tensor,
        vector=vector,
        special=cost.special / special_rate(gpu) if gpu.special_per_second else 0.0,
        memory=from_memory / gpu.memory_bandwidth,
        l2=moved / gpu.l2_bandwidth if gpu.l2_bandwidth else 0.0,
        link=(least_seconds(cost.exchange, gpu) or 0.0) if cost.exchange else 0.0,
    )
    seconds, bound = lanes.slowest
    flops = cost.executed_matmul_flops + cost.vector_flops
    return Placement(
        lanes=lanes,
        seconds=seconds,
        bound=bound if seconds else Bound.FREE,
        intensity=flops / moved if moved else 0.0,
        ridge=_ridge(cost, gpu),
        unrated=tuple(dict.fromkeys(unrated)),
        widened=widened,
    )


_EMULATION_FLOPS = 12
"""Vector FLOP slots of an exponential computed as a polynomial: range reduction and a cubic in 6 instructions."""


def special_rate(gpu: Gpu) -> float:
    """Exponentials a second, at most."""
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
