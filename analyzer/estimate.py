"""How long kernels take on silicon, as opposed to the least they can take: `roofline`.

Few parameters, each a figure with a meaning and a source (`Derating`): the share of each peak that is reached, the
latency of a kernel however small, and the time that the host needs to launch one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import ceil

from ..hardware.gpu import FITTED, Figure, Gpu
from .collectives import expected
from .cost import Attended, Cost, Gemm
from .graph import ITEM_BITS
from .roofline import Lanes, special_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Derated:
    """A figure used in estimates and its source; a share of a peak has no unit, and that of products a dtype.

    One that was fitted on measured kernels names the part in whose file it stands.
    """

    name: str
    value: float
    source: str
    unit: str = ""
    dtype: str = ""
    fitted_on: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfProducts:
    """What tiled matrix products reach.

    Attributes:
        memory: share of the memory bandwidth.
        l2: byte/s of operands that tiles load through L2; None where nothing is known of the part.
        latency: seconds of one, however small.
        narrow_latency: the same in 8 and 4 bits.
        split: seconds more where the inner dimension is split.
        grouped: share of the share of the matmul peak that is left for products of groups.
        grouped_latency: seconds of one of those, however small.
    """

    memory: Derated
    l2: Derated | None
    latency: Derated
    narrow_latency: Derated
    split: Derated
    grouped: Derated
    grouped_latency: Derated


@dataclass(frozen=True, slots=True, kw_only=True)
class OfAttention:
    """What a fused kernel reaches that attends: over prompts, or with a few queries over a cache.

    Attributes:
        small: share of the share of the matmul peak that is left for heads up to 64.
        narrow: the same for products of 8 bits, over prompts.
        prompt_memory: share of the memory bandwidth, over prompts.
        prompt: seconds of one over prompts, however small.
        prompt_wave: seconds more for each wave of its blocks.
        cache_memory: share of the memory bandwidth, over a cache.
        cache: seconds of one over a cache, however small.
        cache_split: seconds more where keys are split over blocks.
        cache_wave: seconds that a wave of its blocks takes.
    """

    small: Derated
    narrow: Derated
    prompt_memory: Derated
    prompt: Derated
    prompt_wave: Derated
    cache_memory: Derated
    cache: Derated
    cache_split: Derated
    cache_wave: Derated


@dataclass(frozen=True, slots=True, kw_only=True)
class Derating:
    """What a part reaches.

    Attributes:
        reading: share of the memory bandwidth, for kernels that mostly read.
        copying: the same, for those that write as well.
        matmul: share of the matmul peak for large square products; by dtype where measured.
        misaligned: share of that which is left where rows do not begin at multiples of 16 bytes; None where nothing is
            published.
        products: matrix products, beside that.
        attention: share of the matmul peak in fused attention, by dtype.
        attending: fused attention, beside that; None where no such kernels were measured.
        quantising: share of what others reach of the memory and of L2, in kernels that quantise.
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
    products: OfProducts
    attention: Derated
    attending: OfAttention | None
    quantising: Derated
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
        found = (
            self.reading,
            self.copying,
            *self.matmul.values(),
            self.misaligned,
            *_figures(self.products),
            self.attention,
            *(_figures(self.attending) if self.attending else ()),
            self.quantising,
            self.vector,
            self.special,
            self.l2_bandwidth,
            self.l2_bytes,
            self.latency,
            self.memory_latency,
            self.launch,
            self.launch_again,
            self.read_back,
        )
        return tuple(figure for figure in found if figure is not None)


def _figures(group: OfProducts | OfAttention) -> tuple[Derated | None, ...]:
    return tuple(getattr(group, field.name) for field in fields(group))


def derating(gpu: Gpu) -> Derating:
    """The figures for a part: its own where published, else those of parts like it."""
    reading, copying = _memory_shares(gpu)
    halved = _has_two_partitions(gpu)
    l2 = _l2_bandwidth(gpu)
    latency, memory_latency = _latencies(gpu)
    return Derating(
        reading=reading,
        copying=copying,
        matmul={dtype: _matmul_share(gpu, dtype) for dtype in gpu.tensor},
        misaligned=_misaligned_share(gpu),
        products=_of_products(gpu, reading, l2, latency, waits=memory_latency.value > 0),
        attention=_attention_share(gpu),
        attending=_of_attention(gpu, reading),
        quantising=_quantising_share(gpu),
        vector=_share("vector units", 0.8, "assumed"),
        special=_special(gpu),
        l2_bandwidth=l2,
        l2_bytes=Derated(
            name="cache",
            unit="B",
            value=(gpu.cache_bytes or 0) * (0.5 if halved else 1.0),
            source="half: each partition keeps its own copy" if halved else "all of it",
        ),
        latency=latency,
        memory_latency=memory_latency,
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
    """Seconds that a kernel occupies the GPU.

    Attributes:
        lanes: by unit.
        working: with its lanes side by side, as far as they get in each other's way.
        seconds: as a whole, with its latency.
    """

    lanes: Lanes
    working: float
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
    work = _Work(cost, read, written, moved, gpu, reached)
    if cost.exchange:  # what is expected of it has the latency of its steps in it
        return work.plain(link=expected(cost.exchange, gpu).seconds, waiting=0.0)
    if cost.gemms and gpu.sm_count and work.peaks:
        return work.products(gpu.sm_count)
    if cost.attended and gpu.sm_count and work.peaks and reached.attending:
        attend = work.over_cache if cost.attended.queries <= _FEW else work.over_prompts
        return attend(cost.attended, reached.attending, gpu.sm_count)
    return work.plain(waiting=reached.latency.value + work.wait)


_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (32, 128), (16, 128))
"""Rows and columns of the result that a thread block computes, as in CUTLASS and cuBLAS."""
_NARROW_TILES = ((64, ((64, 64),)), (128, ((128, 64),)))
"""Tiles of products of 8 and 4 bits with so many rows at most, as in the kernels that vLLM and SGLang ship."""
_LEAST_SLICE = 256
"""Inner size below which the split of a product over more blocks does not pay."""
_QUERIES = 64
"""Queries of a block of fused attention."""
_FEW = 32
"""Queries of a sequence up to which those of heads that share keys are packed in one block."""
_KEYS = 128
"""Keys that it takes at a time."""
_SMALL_HEAD = 64
_OVERLAP, _OVERLAP_OF_WAITS = 3.3, 2.0
"""Exponents by which lanes add up, and a lane with what blocks wait for: 1 is in turn, infinity is side by side.

Fitted beside the figures in the files of the A100 and the H100 (docs/method.md); of no part, so they stand here.
"""


class _Work:
    """One kernel about to be timed.

    Attributes:
        peaks: FLOP/s reached in products of each dtype that tensor units multiply.
        vector: seconds of vector units.
        wait: seconds until a kernel that lives on device memory gets going.
    """

    def __init__(self, cost: Cost, read: float, written: float, moved: float, gpu: Gpu, reached: Derating) -> None:
        self.cost, self.moved, self.reached = cost, moved, reached
        self.memory = (read + written) / gpu.memory_bandwidth
        self.wait = reached.memory_latency.value if 2 * (read + written) > moved else 0.0
        self.share = reached.copying.value if 4 * written > read else reached.reading.value
        self.l2 = moved / reached.l2_bandwidth.value if reached.l2_bandwidth else 0.0
        self.special = _special_seconds(cost, gpu, reached)
        self.peaks: dict[str, float] = {}
        self.vector = 0.0
        for dtype, flops in cost.matmul.items():
            rate = gpu.matmul_rate(dtype, tf32=cost.tf32)
            if rate is not None and rate.unit == "tensor":
                self.peaks[dtype] = rate.flops_per_second * reached.matmul[rate.dtype].value
            elif rate is not None:
                self.vector += flops / (rate.flops_per_second * reached.vector.value)
        for dtype, flops in cost.vector.items():
            rate = gpu.vector_rate(dtype)
            self.vector += flops / (rate.flops_per_second * reached.vector.value) if rate else 0.0

    def plain(self, *, waiting: float, link: float = 0.0) -> Busy:
        """The slowest lane counts."""
        share = self.reached.attention.value if self.cost.backend and not self.cost.gemms else 1.0
        tensor = sum(self.cost.matmul[dtype] / (peak * share) for dtype, peak in self.peaks.items())
        moving = self.reached.quantising.value if self.cost.quantises else 1.0
        lanes = self._lanes(tensor, self.memory / (self.share * moving), self.l2 / moving, link)
        return Busy(lanes, lanes.slowest[0], lanes.slowest[0] + waiting)

    def products(self, sms: int) -> Busy:
        """Products cut into tiles, one after the other; each takes its part of what crosses the memory bus."""
        cost, of = self.cost, self.reached.products
        memory = self.memory / of.memory.value
        ideal = [2.0 * g.batch * g.m * g.n * g.k for g in cost.gemms]
        operands = [g.batch * (g.m * g.k + max(g.groups, 1) * g.n * g.k + g.m * g.n) for g in cost.gemms]
        tensor = tiles = working = latency = 0.0
        for dtype, peak in self.peaks.items():
            item = ITEM_BITS[dtype] / 8
            item *= min(1.0, self.moved / (item * sum(operands)))  # packed weights pass L2 as they are stored
            narrow = _is_narrow(dtype)
            for gemm, own in zip(cost.gemms, operands, strict=True):
                small = of.grouped_latency if gemm.groups else of.narrow_latency if narrow else of.latency
                latency = max(latency, small.value)
                left = 1.0 if gemm.aligned or self.reached.misaligned is None else self.reached.misaligned.value
                left *= of.grouped.value if gemm.groups else 1.0
                tiled = _tiled(
                    gemm,
                    left * peak * sum(ideal) / cost.matmul[dtype],
                    sms,
                    item,
                    memory * own / sum(operands) / len(self.peaks),
                    of,
                    narrow=narrow,
                )
                tensor, tiles, working = (a + b for a, b in zip((tensor, tiles, working), tiled, strict=True))
        lanes = self._lanes(tensor, memory, max(self.l2, tiles))
        working = max(working, lanes.slowest[0])
        return Busy(lanes, working, working + latency + self.wait)

    def over_prompts(self, shape: Attended, of: OfAttention, sms: int) -> Busy:
        """Blocks of some queries of a head, each over whole tiles of the keys that any of them sees."""
        blocks = shape.heads * shape.group * ceil(shape.queries / _QUERIES)
        most = _KEYS * ceil(shape.keys / _KEYS)
        mean = shape.pairs / shape.queries + shape.edges * _QUERIES / 2
        mean = min(most, _KEYS * ceil(mean / _KEYS))
        in_turn = max(ceil(blocks / sms) * mean, most)
        done = in_turn * sms * _QUERIES / (shape.pairs * shape.heads * shape.group)  # what runs, of what counts
        share = self.reached.attention.value * (of.small.value if shape.size <= _SMALL_HEAD else 1.0)
        tensor = sum(
            self.cost.matmul[dtype] * max(1.0, done) / (peak * share * (of.narrow.value if _is_narrow(dtype) else 1.0))
            for dtype, peak in self.peaks.items()
        )
        lanes = self._lanes(tensor, self.memory / of.prompt_memory.value, self.l2)
        working = max(_together(_OVERLAP, lanes.tensor, lanes.memory), lanes.slowest[0])
        waves = ceil(blocks / sms)
        return Busy(lanes, working, working + of.prompt.value + waves * of.prompt_wave.value)

    def over_cache(self, shape: Attended, of: OfAttention, sms: int) -> Busy:
        """Blocks of all queries that share keys; the keys are split over blocks, as far as there are too few."""
        share = self.reached.attention.value
        tensor = sum(self.cost.matmul[dtype] / (peak * share) for dtype, peak in self.peaks.items())
        lanes = self._lanes(tensor, self.memory / of.cache_memory.value, self.l2)
        blocks = shape.heads * ceil(shape.queries * shape.group / _QUERIES)
        waves = ceil(blocks / sms)
        working = max(_together(_OVERLAP_OF_WAITS, lanes.memory, waves * of.cache_wave.value), lanes.slowest[0])
        split = of.cache_split.value if shape.keys >= _KEYS else 0.0
        return Busy(lanes, working, working + of.cache.value + split)

    def _lanes(self, tensor: float, memory: float, l2: float, link: float = 0.0) -> Lanes:
        return Lanes(tensor=tensor, vector=self.vector, special=self.special, memory=memory, l2=l2, link=link)


_WIDE_BITS = 16


def _is_narrow(dtype: str) -> bool:
    return ITEM_BITS[dtype] < _WIDE_BITS


def _special_seconds(cost: Cost, gpu: Gpu, reached: Derating) -> float:
    if not gpu.special_per_second:
        return 0.0
    return cost.special / (reached.special.value if reached.special else special_rate(gpu) * reached.vector.value)


def _together(exponent: float, *lanes: float) -> float:
    """Seconds of lanes that run side by side and get in each other's way: between the slowest and the sum."""
    slowest = max(lanes)
    return slowest * sum((lane / slowest) ** exponent for lane in lanes) ** (1 / exponent) if slowest else 0.0


def _tiled(
    gemm: Gemm, peak: float, sms: int, item_bytes: float, memory: float, of: OfProducts, *, narrow: bool
) -> tuple[float, float, float]:
    """Seconds of the tensor units, of L2, and of all lanes together, by the fastest tile and split.

    Blocks run in waves of one a multiprocessor, and the last wave takes as long as a full one. Each block loads its
    rows and columns of the operands through L2. A product with few tiles splits its inner dimension: partial sums in
    float32 are written and read once more. Products of 8 and 4 bits are not split, and have fewer tiles.
    """
    l2_rate = of.l2.value if of.l2 else 0.0
    best = (0.0, 0.0, float("inf"))
    overlap = _OVERLAP_OF_WAITS if gemm.groups else _OVERLAP
    whole = narrow or gemm.groups > 0
    for rows, columns in _narrow_tiles(gemm.m) if narrow and not gemm.groups else _TILES:
        tiles = ceil(gemm.batch * _row_tiles(gemm, rows)) * ceil(gemm.n / columns)
        split = 1
        while True:
            blocks = tiles * split
            inner = ceil(gemm.k / split)
            running = ceil(blocks / sms) * sms
            needed = running * 2.0 * rows * columns * inner / peak
            partial = 8.0 * split * gemm.batch * gemm.m * gemm.n if split > 1 else 0.0
            loaded = (running * (rows + columns) * inner * item_bytes + partial) / l2_rate if l2_rate else 0.0
            more = of.split.value if split > 1 else 0.0
            if max(needed, loaded, memory) + more < best[2]:  # else there is no need to know by how much it is slower
                together = _together(overlap, needed, loaded, memory) + more
                best = (needed, loaded, together) if together < best[2] else best
            if blocks >= sms or inner < 2 * _LEAST_SLICE or whole:
                break
            split *= 2
    return best


def _row_tiles(gemm: Gemm, rows: int) -> float:
    """Tiles of so many rows; none has rows of two groups, and half a tile of each group is empty on average."""
    return max(gemm.groups, gemm.m / rows + gemm.groups / 2) if gemm.groups else ceil(gemm.m / rows)


def _narrow_tiles(rows: int) -> tuple[tuple[int, int], ...]:
    return next((tiles for most, tiles in _NARROW_TILES if rows <= most), _TILES[:3])


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


def _latencies(gpu: Gpu) -> tuple[Derated, Derated]:
    """Of a kernel however small, and what one more that lives on device memory waits for it."""
    name, unit = "kernel latency", "s"
    source = "GH200's; others 1.0 to 2.0 µs (gpu-benches, small kernels in a graph)"
    own = gpu.kernel_latency or 1.3e-6
    found = Derated(name=name, unit=unit, value=own, source=_OWN if gpu.kernel_latency else source)
    known = _fitted(gpu)
    if known is None or "memory_latency" in gpu.overheads:
        usual = "aiconfigurator, NVIDIA parts"
        return found, _overhead(gpu, "memory_latency", "memory latency", 3e-6, usual)
    cycles = known.seconds(name, "kernel_cycles")
    within = Derated(name="memory latency", unit=unit, value=0.0, source="within that of kernels")
    return (cycles if cycles.value > own else found), within


def _of_products(gpu: Gpu, reading: Derated, l2: Derated | None, latency: Derated, *, waits: bool) -> OfProducts:
    known = _fitted(gpu)
    memory, through, split = "memory in products", "L2 in products", "split of a product"
    small, narrow = "product latency", "product latency in 8 and 4 bits"
    grouped, grouped_small = "products of groups beside others", "latency of products of groups"
    if known is None:
        return OfProducts(
            memory=replace(reading, name=memory),
            l2=l2 and replace(l2, name=through),
            latency=replace(latency, name=small),
            narrow_latency=replace(latency, name=narrow),
            split=Derated(name=split, unit="s", value=0.0, source="not known"),
            grouped=_share(grouped, 1.0, "not known"),
            grouped_latency=replace(latency, name=grouped_small),
        )

    def at_least(name: str, key: str) -> Derated:
        own = known.seconds(name, key)
        return replace(latency, name=name) if waits or latency.value > own.value else own

    return OfProducts(
        memory=known.times(reading, memory, "product_memory_fraction"),
        l2=l2 and known.times(l2, through, "product_l2_reuse_factor"),
        latency=at_least(small, "product_cycles"),
        narrow_latency=at_least(narrow, "narrow_product_cycles"),
        split=known.seconds(split, "product_split_cycles"),
        grouped=known.share(grouped, "grouped_product_fraction"),
        grouped_latency=at_least(grouped_small, "grouped_product_cycles"),
    )


def _attention_share(gpu: Gpu) -> Derated:
    name, known = "attention beside products", _fitted(gpu)
    return known.share(name, "prompt_attention_fraction") if known else _share(name, 0.81, "an H100's")


def _quantising_share(gpu: Gpu) -> Derated:
    name, known = "kernels that quantise beside others", _fitted(gpu)
    return known.share(name, "quantising_fraction") if known else _share(name, 1.0, "not known")


def _of_attention(gpu: Gpu, reading: Derated) -> OfAttention | None:
    known = _fitted(gpu)
    if known is None:
        return None
    return OfAttention(
        small=known.share("heads up to 64 beside that", "prompt_attention_head64_fraction"),
        narrow=known.share("8 bits beside that", "prompt_attention_narrow_fraction"),
        prompt_memory=known.times(reading, "memory in prompt attention", "prompt_attention_memory_fraction"),
        prompt=known.seconds("prompt attention latency", "prompt_attention_cycles"),
        prompt_wave=known.seconds("each wave of its blocks", "prompt_attention_wave_cycles"),
        cache_memory=known.times(reading, "memory in decode attention", "decode_attention_memory_fraction"),
        cache=known.seconds("decode attention latency", "decode_attention_cycles"),
        cache_split=known.seconds("split of its keys", "decode_attention_split_cycles"),
        cache_wave=known.seconds("a wave of its blocks", "decode_attention_wave_cycles"),
    )


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What was fitted on measured kernels of a part or of one like it, by the names of `FITTED`."""

    gpu: Gpu
    figures: Mapping[str, Figure]
    clock_hz: float

    def share(self, name: str, key: str) -> Derated:
        return self._derated(name, key, self.gpu.fitted[key])

    def times(self, other: Derated, name: str, key: str) -> Derated:
        return self._derated(name, key, other.value * self.gpu.fitted[key], unit=other.unit)

    def seconds(self, name: str, key: str) -> Derated:
        count = self.gpu.fitted[key]
        return self._derated(name, key, count / self.clock_hz, unit="s", said=f"{count:g} cycles, ")

    def _derated(self, name: str, key: str, value: float, *, unit: str = "", said: str = "") -> Derated:
        figure = self.figures[key]
        source, part = f"{said}{figure.source_title}", figure.taken_from or self.gpu.key
        return Derated(name=name, value=value, source=source, unit=unit, fitted_on=part)


def _fitted(gpu: Gpu) -> _Fitted | None:
    if not gpu.fitted or not gpu.clock_hz or not gpu.sm_count:
        return None
    return _Fitted(gpu, {figure.key: figure for figure in gpu.figures if figure.key in FITTED}, gpu.clock_hz)


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
