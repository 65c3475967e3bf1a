"""How long kernels take on silicon, as opposed to the least they can take: `roofline`.

Few parameters, each a figure with a meaning and a source (`Derating`): the share of each peak that is reached, the
latency of a kernel however small, and the time that the host needs to launch one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from ..hardware.gpu import Gpu
from .collectives import expected
from .cost import Cost, Gemm
from .graph import ITEM_BITS
from .roofline import Lanes, special_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Derated:
    """A figure used in estimates and its source; a share of a peak has no unit, and that of products a dtype."""

    name: str
    value: float
    source: str
    unit: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Derating:
    """What a part reaches.

    Attributes:
        reading: share of the memory bandwidth, for kernels that mostly read.
        copying: the same, for those that write as well.
        matmul: share of the matmul peak for large square products; by dtype where measured.
        misaligned: share of that which is left where rows do not begin at multiples of 16 bytes; None where nothing is
            published.
        attention: share of the matmul peak in fused attention.
        vector: share of the peak of vector and special-function units.
        special: exponentials and the like a second; None where they were not measured.
        l2_bandwidth: byte/s; None where nothing is known of the part.
        l2_bytes: bytes of cache that every multiprocessor can count on.
        latency: seconds of a kernel that does nothing.
        memory_latency: seconds that a kernel which lives on device memory takes to get it going and to drain.
        launch: seconds of the host for an op that launches a kernel, in eager mode.
        launch_again: seconds of the host for each further kernel of the op.
        read_back: seconds from when the GPU is done until the host has the value it waits for.
    """

    reading: Derated
    copying: Derated
    matmul: dict[str, Derated]
    misaligned: Derated | None
    attention: Derated
    vector: Derated
    special: Derated | None
    l2_bandwidth: Derated | None
    l2_bytes: Derated
    latency: Derated
    memory_latency: Derated
    launch: Derated
    launch_again: Derated
    read_back: Derated

    @property
    def figures(self) -> tuple[Derated, ...]:
        """All of them."""
        return (
            self.reading,
            self.copying,
            *self.matmul.values(),
            *((self.misaligned,) if self.misaligned else ()),
            self.attention,
            self.vector,
            *((self.special,) if self.special else ()),
            *((self.l2_bandwidth,) if self.l2_bandwidth else ()),
            self.l2_bytes,
            self.latency,
            self.memory_latency,
            self.launch,
            self.launch_again,
            self.read_back,
        )


def derating(gpu: Gpu) -> Derating:
    """The figures for a part: its own where published, else those of parts like it."""
    reading, copying = _memory_shares(gpu)
    halved = _has_two_partitions(gpu)
    return Derating(
        reading=reading,
        copying=copying,
        matmul={dtype: _matmul_share(gpu, dtype) for dtype in gpu.tensor},
        misaligned=_misaligned_share(gpu),
        attention=_share("fused attention", 0.71, "FlashAttention-4 on B200: 1605 of 2250 TFLOP/s"),
        vector=_share("vector units", 0.8, "assumed"),
        special=_special(gpu),
        l2_bandwidth=_l2_bandwidth(gpu),
        l2_bytes=Derated(
            name="cache",
            unit="B",
            value=(gpu.cache_bytes or 0) * (0.5 if halved else 1.0),
            source="half: each partition keeps its own copy" if halved else "all of it",
        ),
        latency=_latency(gpu),
        memory_latency=_overhead(
            gpu,
            "memory_latency",
            "memory latency",
            3e-6,
            "aiconfigurator, all NVIDIA parts; gpt-fast's decode fits it",
        ),
        launch=_overhead(
            gpu, "launch", "launch of an op", 8e-6, "eager PyTorch, 5 to 10 µs: pytorch#41383, FlagGems#4812"
        ),
        launch_again=_overhead(
            gpu,
            "launch_again",
            "launch of its further kernels",
            5e-6,
            "eager PyTorch without Python: pytorch#41383",
        ),
        read_back=_overhead(
            gpu,
            "read_back",
            "reading a value back",
            10e-6,
            "assumed: a copy into pageable memory, and the host waking up",
        ),
    )


@dataclass(frozen=True, slots=True)
class Busy:
    """Seconds that a kernel occupies the GPU: by lane, and as a whole with its latency."""

    lanes: Lanes
    seconds: float


def busy(cost: Cost, read: float, written: float, moved: float, gpu: Gpu, reached: Derating) -> Busy:
    """The time of one kernel on the GPU, without its launch.

    Args:
        cost: the work.
        read: bytes read from device memory.
        written: bytes written to device memory.
        moved: bytes read and written, those that a cache serves included.
        gpu: the part.
        reached: what it reaches.
    """
    share = reached.copying if 4 * written > read else reached.reading
    l2_rate = reached.l2_bandwidth.value if reached.l2_bandwidth else 0.0
    tensor, vector, tiles = _matmul_seconds(cost, moved, gpu, reached, l2_rate)
    for dtype, flops in cost.vector.items():
        rate = gpu.vector_rate(dtype)
        vector += flops / (rate.flops_per_second * reached.vector.value) if rate else 0.0
    lanes = Lanes(
        tensor=tensor,
        vector=vector,
        special=_special_seconds(cost, gpu, reached),
        memory=(read + written) / (gpu.memory_bandwidth * share.value),
        l2=max(moved / l2_rate, tiles) if l2_rate else 0.0,
        link=expected(cost.exchange, gpu).seconds if cost.exchange else 0.0,
    )
    waiting = reached.latency.value + (reached.memory_latency.value if 2 * (read + written) > moved else 0.0)
    # what is expected of an exchange has the latency of its steps in it
    return Busy(lanes, lanes.slowest[0] + (0.0 if cost.exchange else waiting))


def _special_seconds(cost: Cost, gpu: Gpu, reached: Derating) -> float:
    if not gpu.special_per_second:
        return 0.0
    return cost.special / (reached.special.value if reached.special else special_rate(gpu) * reached.vector.value)


def _matmul_seconds(
    cost: Cost, moved: float, gpu: Gpu, reached: Derating, l2_rate: float
) -> tuple[float, float, float]:
    """Seconds of tensor units, of vector units where those multiply, and of L2 for the operands of tiles."""
    tensor = vector = tiles = 0.0
    for dtype, flops in cost.matmul.items():
        rate = gpu.matmul_rate(dtype, tf32=cost.tf32)
        if rate is None:
            continue
        if rate.unit != "tensor":
            vector += flops / (rate.flops_per_second * reached.vector.value)
            continue
        share = reached.attention if cost.backend and not cost.gemms else reached.matmul[rate.dtype]
        peak = rate.flops_per_second * share.value
        if not cost.gemms or not gpu.sm_count:
            tensor += flops / peak
            continue
        ideal = sum(2.0 * g.batch * g.m * g.n * g.k for g in cost.gemms)
        item = ITEM_BITS[dtype] / 8
        operands = item * sum(g.batch * (g.m * g.k + g.n * g.k + g.m * g.n) for g in cost.gemms)
        item *= min(1.0, moved / operands)  # packed weights pass L2 as they are stored
        for gemm in cost.gemms:
            left = 1.0 if gemm.aligned or reached.misaligned is None else reached.misaligned.value
            needed, loaded = _tiled(gemm, left * peak * ideal / flops, gpu.sm_count, item, l2_rate)
            tensor += needed
            tiles += loaded
    return tensor, vector, tiles


_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (32, 128), (16, 128))
"""Rows and columns of the result that a thread block computes, as in CUTLASS and cuBLAS."""
_LEAST_SLICE = 256
"""Inner size below which the split of a product over more blocks does not pay."""


def _tiled(gemm: Gemm, peak: float, sms: int, item_bytes: float, l2_rate: float) -> tuple[float, float]:
    """Seconds of the tensor units and of L2 for a product cut into tiles, by the fastest tile and split.

    Blocks run in waves of one a multiprocessor, and the last wave takes as long as a full one. Each block loads its
    rows and columns of the operands through L2. A product with few tiles splits its inner dimension: partial sums in
    float32 are written and read once more.
    """
    best = (0.0, 0.0, float("inf"))
    for rows, columns in _TILES:
        tiles = gemm.batch * ceil(gemm.m / rows) * ceil(gemm.n / columns)
        split = 1
        while True:
            blocks = tiles * split
            inner = ceil(gemm.k / split)
            needed = ceil(blocks / sms) * 2.0 * rows * columns * inner * sms / peak
            partial = 8.0 * split * gemm.batch * gemm.m * gemm.n if split > 1 else 0.0
            loaded = (blocks * (rows + columns) * inner * item_bytes + partial) / l2_rate if l2_rate else 0.0
            if max(needed, loaded) < best[2]:
                best = (needed, loaded, max(needed, loaded))
            if blocks >= sms or inner < 2 * _LEAST_SLICE:
                break
            split *= 2
    return best[0], best[1]


def _share(of: str, value: float, source: str, dtype: str = "") -> Derated:
    return Derated(name=of, value=value, source=source, dtype=dtype)


def _overhead(gpu: Gpu, key: str, name: str, usual: float, source: str) -> Derated:
    own = gpu.overheads.get(key)
    return Derated(name=name, unit="s", value=own or usual, source=_OWN if own else source)


_OWN = "measured, see the part's file"


def _special(gpu: Gpu) -> Derated | None:
    rate = gpu.special_measured
    return Derated(name="special functions", unit="1/s", value=rate, source=_OWN) if rate else None


def _memory_shares(gpu: Gpu) -> tuple[Derated, Derated]:
    read, triad = gpu.achieved.get("memory_read"), gpu.achieved.get("memory_triad")
    usual, source = _usual_memory_share(gpu)
    if read or triad:
        source = _OWN
    return (
        _share("memory when reading", read or triad or usual, source),
        _share("memory when writing too", triad or read or usual, source),
    )


def _usual_memory_share(gpu: Gpu) -> tuple[float, str]:
    if gpu.memory_type.startswith("GDDR"):
        return 0.95, "A40 and L40 (gpu-benches stream)"
    if gpu.memory_type.startswith("LPDDR") or "unified" in gpu.memory_type:
        return 0.85, "Strix Halo (gpu-benches stream)"
    if gpu.vendor == "amd":
        return 0.78, "MI210 and MI300X (gpu-benches stream)"
    return 0.9, "V100, A100 and H100 PCIe (gpu-benches stream)"


def _matmul_share(gpu: Gpu, dtype: str) -> Derated:
    of = f"{dtype} products"
    own = gpu.achieved.get(f"tensor_{dtype}")
    if own:
        return _share(of, own, _OWN, dtype)
    others = [value for name, value in gpu.achieved.items() if name.startswith("tensor_")]
    if others:
        return _share(of, others[0], "another dtype's, measured on this part", dtype)
    if gpu.vendor == "amd":
        return _share(of, 0.55, "MI300X, MI325X and MI355X (stas00/ml-engineering)", dtype)
    return _share(of, 0.78, "A100, H100 and B200 (stas00/ml-engineering)", dtype)


def _misaligned_share(gpu: Gpu) -> Derated | None:
    """Hopper's own instructions load through a unit that wants 16 bytes; what remains are those of Ampere."""
    if gpu.vendor != "nvidia" or gpu.compute_capability != (9, 0):
        return None
    source = "mma.sync on Hopper (arXiv 2501.12084); wgmma wants 16 bytes (cuBLASDx documentation)"
    return _share("that for products off 16 bytes", 0.63, source)


def _l2_bandwidth(gpu: Gpu) -> Derated | None:
    name, unit = "L2", "B/s"
    if gpu.l2_bandwidth_measured:
        return Derated(name=name, unit=unit, value=float(gpu.l2_bandwidth_measured), source=_OWN)
    if gpu.l2_bandwidth:
        return Derated(
            name=name, unit=unit, value=0.75 * gpu.l2_bandwidth, source="0.75 of the peak, as an A100 (gpu-benches)"
        )
    if not gpu.sm_count or not gpu.clock_hz or gpu.vendor not in _L2_BYTES_PER_CLOCK:
        return None
    large = _has_two_partitions(gpu) or gpu.vendor == "amd"
    per_clock = _L2_BYTES_PER_CLOCK[gpu.vendor] if large else _L2_BYTES_PER_CLOCK["small"]
    return Derated(
        name=name,
        unit=unit,
        value=per_clock * gpu.sm_count * gpu.clock_hz,
        source=f"{per_clock:g} B per clock and SM, as parts like it (gpu-benches)",
    )


def _latency(gpu: Gpu) -> Derated:
    name, unit = "kernel latency", "s"
    if gpu.kernel_latency:
        return Derated(name=name, unit=unit, value=gpu.kernel_latency, source=_OWN)
    source = "GH200's; others 1.0 to 2.0 µs (gpu-benches, small kernels in a graph)"
    return Derated(name=name, unit=unit, value=1.3e-6, source=source)


_L2_BYTES_PER_CLOCK = {"nvidia": 36.0, "small": 15.0, "amd": 28.0}
"""gpu-benches: A100 35.7, H100 PCIe 35.0, GH200 37.5; L40 14.7; MI210 28."""


def _has_two_partitions(gpu: Gpu) -> bool:
    # each half of the L2 of these parts keeps a copy of what its multiprocessors read
    return gpu.vendor == "nvidia" and gpu.compute_capability in {(8, 0), (9, 0), (10, 0), (10, 3)}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it is queued.

    Attributes:
        busy: seconds on the GPU.
        host: seconds that the host needs before the GPU can start it.
        repeat: times in a row.
        read_back: seconds from its end until the host goes on; None where the host does not wait for it.
    """

    busy: float
    host: float
    repeat: int = 1
    read_back: float | None = None


def queued(launches: Iterable[Launch]) -> list[float]:
    """Seconds that each launch adds to a step: the GPU waits for the host, the host for what it reads back.

    Both start idle, as after a token that was handed to the user.
    """
    host = end = 0.0
    added: list[float] = []
    for launch in launches:
        before = end
        first = host + launch.host
        if launch.read_back is None:
            host += launch.repeat * launch.host
            end = max(max(first, end) + launch.repeat * launch.busy, host + launch.busy)
        else:  # one turn after the other, with nothing queued in between
            again = launch.read_back + launch.host + launch.busy
            end = max(first, end) + launch.busy + (launch.repeat - 1) * again
            host = end + launch.read_back
        added.append(end - before)
    return added
