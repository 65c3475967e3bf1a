"""What a machine can do, found by running PyTorch's own operators on it, as a TOML of the catalogue's kind.

Peaks are the best that was seen: a bound from them says that nothing measured here was faster. The shares and times of
estimates are medians. A GPU is timed by its events, a CPU by the host's clock.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from .clock import free_bytes, machine_of
from .clocked import Machine, MeasureError

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """How much is tried.

    Attributes:
        seconds: that one figure may take.
        largest: bytes of the largest working set.
        step: factor from one working set to the next.
        sides: of the square products; on a GPU four times as large.
    """

    seconds: float
    largest: int
    step: float
    sides: tuple[int, ...]


FULL = Depth(seconds=0.2, largest=1 << 28, step=math.sqrt(2), sides=(512, 1024, 2048))
QUICK = Depth(seconds=0.08, largest=1 << 28, step=2.0, sides=(512, 1024))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Bytes a second by working set: of reading, of copying, ...

    Attributes:
        kind: `read`, `write`, `update` or `copy`.
        best: by bytes of the working set, the fastest.
        usual: the median.
    """

    kind: str
    best: dict[int, float]
    usual: dict[int, float]

    def without(self, gap: float, size: int) -> float:
        """The usual rate of a working set if each turn were so many seconds shorter, but not above the best of all."""
        moved = _KINDS[self.kind] * size
        return moved / max(moved / self.usual[size] - gap, moved / max(self.best.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured. Rates are per second and of base units.

    Attributes:
        machine: where and when.
        vendor: nvidia, amd or cpu.
        compute_capability: CUDA's; empty without.
        clock: the highest of a GPU, in Hz, as the driver says it; None on a CPU, or where it does not.
        units: multiprocessors of a GPU; None on a CPU, whose products are not cut into waves.
        memory_bytes: of the device.
        curves: bandwidths.
        cache_bytes: largest working set that is served faster than memory serves; None where none was.
        cache_stated: True where the driver says it.
        matmul: FLOP/s of products by type, the best and what is usual for large ones.
        special: exponentials and the like a second, the best and the median over functions; None on a GPU, where all
            kernels of PyTorch that compute them wait for memory.
        launch: seconds of the host for an op of a module.
        launch_again: the same of a bare call.
        latency: seconds of a kernel that does nothing: on a CPU all of an op's overhead.
        memory_latency: seconds by which a small kernel is late because its data are in memory; None if unknown.
        read_back: seconds until the host has a value.
        seconds: that all of it took.
    """

    machine: Machine
    vendor: str
    compute_capability: str
    units: int | None
    clock: float | None
    memory_bytes: int
    curves: tuple[Curve, ...]
    cache_bytes: int | None
    cache_stated: bool
    matmul: Mapping[str, tuple[float, float]] = field(hash=False)
    special: tuple[float, float] | None
    launch: float
    launch_again: float
    latency: float
    memory_latency: float | None
    read_back: float
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Byte/s of memory: the best that was seen of working sets that no cache holds."""
        return max(rate for curve in self.curves for size, rate in curve.best.items() if self._is_memory(size, curve))

    def usual_bandwidth(self, kind: str) -> float:
        """Byte/s of memory in the middle, for one kind of use."""
        curve = next(curve for curve in self.curves if curve.kind == kind)
        return median(rate for size, rate in curve.usual.items() if self._is_memory(size, curve))

    @property
    def cache_bandwidth(self) -> tuple[float, float] | None:
        """Byte/s of what is served without memory: the best of all, and the middle around half of the cache."""
        if self.cache_bytes is None:
            return None
        # kernels of a GPU follow each other with a gap, which estimates count beside this
        gap = 0.0 if self.vendor == "cpu" else self.latency
        inside = [
            curve.without(gap, size)
            for curve in self.curves
            for size in curve.usual
            if self.cache_bytes / 8 <= size <= self.cache_bytes / 2
        ]
        if not inside:
            return None
        return max(rate for curve in self.curves for rate in curve.best.values()), median(inside)

    def _is_memory(self, size: int, curve: Curve) -> bool:
        return size >= min(4 * (self.cache_bytes or 0), max(curve.best))


def calibrate(device: torch.device, depth: Depth = FULL, say: Say = lambda _: None) -> Calibration:
    """Measure a device.

    Args:
        device: `cuda` or `cpu`.
        depth: how much is tried.
        say: told what is being done.

    Raises:
        MeasureError: it has too little free memory for that.
    """
    free = free_bytes(device)
    bench = _Bench(device, depth)
    needed = max(1 << 28, 16 * (bench.stated_cache or 0))  # a quarter is moved, which no cache may hold a quarter of
    if free is not None and free < needed:
        raise MeasureError(
            f"{device} has {free / 1e6:.0f} MB of free memory; calibrating needs some {needed / 1e6:.0f} MB.",
            "Free some first.",
        )
    try:
        # events, streams and graphs are those of the current device
        with torch.cuda.device(device) if bench.on_gpu else contextlib.nullcontext():
            return _found(bench, free, say)
    except torch.OutOfMemoryError as error:
        raise MeasureError(f"{device} ran out of memory: somebody else takes it.", "Free some first.") from error


def _found(bench: "_Bench", free: int | None, say: Say) -> Calibration:
    device = bench.device
    began = time.perf_counter()
    with torch.inference_mode():
        say("launches")
        latency, launch, launch_again, read_back = bench.overheads()
        say("bandwidths")
        curves = tuple(bench.curves(free))
        stated = bench.stated_cache
        cache = stated or _cache_of(curves)
        say("products")
        matmul = dict(bench.products())
        say("special functions")
        special = bench.special()
        slow = bench.memory_latency()
    on_gpu = device.type == "cuda"
    properties: Any = torch.cuda.get_device_properties(device) if on_gpu else None
    capability = f"{properties.major}.{properties.minor}" if on_gpu and torch.version.hip is None else ""
    return Calibration(
        machine=machine_of(device),
        vendor=("amd" if torch.version.hip else "nvidia") if on_gpu else "cpu",
        compute_capability=capability,
        units=int(properties.multi_processor_count) if on_gpu else None,
        clock=1e3 * getattr(properties, "clock_rate", 0) or None,  # kHz, and the highest; not in every torch
        memory_bytes=int(properties.total_memory) if on_gpu else _host_memory(free),
        curves=curves,
        cache_bytes=cache,
        cache_stated=stated is not None,
        matmul=matmul,
        special=special,
        launch=launch,
        launch_again=launch_again,
        latency=latency,
        memory_latency=slow,
        read_back=read_back,
        seconds=time.perf_counter() - began,
    )


def to_toml(found: Calibration) -> str:
    """The file that `--gpu ./mygpu.toml` takes: every figure with where it comes from."""
    figures = dict(_figures(found))
    where = f"{found.machine.name} ({found.machine.device})"
    how = f"fxroof calibrate on {where} on {found.machine.date} with torch {found.machine.torch_version}"
    threads = (
        f", {found.machine.threads} thread{'s' if found.machine.threads > 1 else ''}" if found.machine.threads else ""
    )
    driver = f", driver {found.machine.driver}" if found.machine.driver else ""
    asked = ("memory_usable_bytes", "compute_capability", "sm_count", "max_sm_clock_mhz")
    stated = [key for key in (*asked, *(["l2_cache_mb"] if found.cache_stated else [])) if key in figures]
    published = [key for key in figures if key == _SFU]
    measured = [key for key in figures if key not in (*stated, *published)]
    lines = [
        "# What this machine was found to do. Peaks are the best that was seen, shares and times are medians.",
        "# Measure again after a change of torch, driver, clocks or threads, and while nothing else runs.",
        "",
        f"name = {_text(where)}",
        f"vendor = {_text(found.vendor)}",
        f"collected = {_text(found.machine.date)}",
        'confidence = "medium"',
        "",
        *(f"{key} = {_text(value) if isinstance(value, str) else _number(value)}" for key, value in figures.items()),
        "",
        "notes = [",
        f"  {_text(f'{how}{threads}{driver}, in {found.seconds:.0f} s')},",
        f"  {_text(_curve_note(found))},",
        "]",
        "",
        "[sources.calibrated]",
        'kind = "measured"',
        f"title = {_text(f'measured by {how}{threads}{driver}')}",
        f"keys = [{', '.join(map(_text, measured))}]",
    ]
    if stated:
        lines += [
            "",
            "[sources.device]",
            'kind = "measured"',
            f"title = {_text(f'asked of the device: {where}{driver}')}",
            f"keys = [{', '.join(map(_text, stated))}]",
        ]
    if published:
        lines += [
            "",
            "[sources.cuda_pg]",
            'kind = "vendor"',
            'title = "CUDA C++ Programming Guide: 16 special-function units in each multiprocessor"',
            f"keys = [{', '.join(map(_text, published))}]",
        ]
    return "\n".join(lines) + "\n"


_SHORT = {
    "float64": "fp64",
    "float32": "fp32",
    "tfloat32": "tf32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8": "fp8",
    "int8": "int8",
}
_MEGA, _GIGA, _TERA, _MICRO = 1e6, 1e9, 1e12, 1e-6
_SFU = "sfu_exp_per_clk_per_sm"
_WITH_16_SFUS = ("7.", "8.", "9.", "10.0")
"""Beginnings of the compute capabilities of which CUDA's guide says that."""


def _figures(found: Calibration) -> Iterator[tuple[str, float | int | str]]:
    bandwidth = found.bandwidth
    if found.compute_capability:
        yield "compute_capability", found.compute_capability
    if found.units:
        yield "sm_count", found.units
    if found.clock:
        yield "max_sm_clock_mhz", found.clock / _MEGA
    if found.clock and found.units and found.compute_capability.startswith(_WITH_16_SFUS):
        yield _SFU, 16
    yield "memory_usable_bytes", found.memory_bytes
    yield "memory_bandwidth_gb_per_s", bandwidth / _GIGA
    yield "achieved_memory_read_fraction", min(1.0, found.usual_bandwidth("read") / bandwidth)
    yield "achieved_memory_triad_fraction", min(1.0, found.usual_bandwidth("copy") / bandwidth)
    if found.cache_bytes is not None:
        yield "l2_cache_mb", found.cache_bytes / 2**20
    if found.cache_bandwidth is not None:
        peak, usual = found.cache_bandwidth
        if found.vendor == "cpu":  # its kernels run in the caches above the last one, which GPUs have no figure for
            yield "l2_bandwidth_gb_per_s_peak", peak / _GIGA
        yield "l2_bandwidth_gb_per_s_measured", usual / _GIGA
    for dtype, (best, usual) in found.matmul.items():
        unit = "tops" if dtype == "int8" else "tflops"
        yield f"tensor_{_SHORT[dtype]}_{unit}", best / _TERA
        yield f"achieved_tensor_{_SHORT[dtype]}_fraction", min(1.0, usual / best)
    for dtype in ("float32", "float64"):
        if dtype in found.matmul:  # the units that multiply matrices of these types are the vector units
            yield f"vector_{_SHORT[dtype]}_tflops", found.matmul[dtype][0] / _TERA
    if found.special is not None:
        yield "peak_special_gop_per_s", found.special[0] / _GIGA
        yield "achieved_special_gop_per_s", found.special[1] / _GIGA
    yield "kernel_in_graph_us", found.latency / _MICRO
    if found.memory_latency is not None:
        yield "memory_latency_us", found.memory_latency / _MICRO
    yield "launch_op_us", found.launch / _MICRO
    yield "launch_kernel_us", found.launch_again / _MICRO
    yield "read_back_us", found.read_back / _MICRO


def _curve_note(found: Calibration) -> str:
    def shown(curve: Curve) -> str:
        points = list(curve.best.items())
        return ", ".join(
            f"{size / 2**20:.3g} MiB {rate / _GIGA:.3g}" for size, rate in points[:: max(1, len(points) // 8)]
        )

    return "GB/s by working set: " + "; ".join(f"{curve.kind} {shown(curve)}" for curve in found.curves)


def _text(value: str) -> str:
    plain = "".join(c if c.isprintable() else " " for c in value)
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}" if 1e-4 < value < 1e15 else f"{value:.5e}"


def _cache_of(curves: Iterable[Curve]) -> int | None:
    """The working set at which the rate has fallen to that of memory, which none of the smaller ones has.

    Any larger cache would have served it: bounds, which take caches at their best, need the upper end.
    """
    ends = []
    for curve in curves:
        sizes = sorted(curve.best)
        memory = median(curve.best[size] for size in sizes[-3:])
        served = [index for index, size in enumerate(sizes[:-3]) if curve.best[size] > _SERVED * memory]
        if served:
            ends.append(sizes[served[-1] + 1])
    return max(ends, default=None)


_SERVED = 1.5
"""Times the rate of memory from which on something else is taken to serve."""


class _Bench:
    """Runs small programs on a device."""

    def __init__(self, device: torch.device, depth: Depth) -> None:
        self.device = device
        self.depth = depth
        self.on_gpu = device.type == "cuda"

    @property
    def stated_cache(self) -> int | None:
        """The cache that the driver names."""
        if not self.on_gpu:
            return None
        size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
        return int(size) or None

    def seconds(self, run: Callable[[], Any], *, most: float | None = None) -> list[float]:
        """Seconds of one call, several times, each averaged over calls that take long enough for the clock."""
        limit = self.depth.seconds if most is None else most
        run()
        once = self._timed(run, 1)
        calls = max(1, min(10_000, math.ceil(_CLOCKED / max(once, 1e-8))))
        began = time.perf_counter()
        taken = [self._timed(run, calls)]
        while len(taken) < _LEAST_SAMPLES or time.perf_counter() - began < limit:
            taken.append(self._timed(run, calls))
            if time.perf_counter() - began > 4 * limit:
                break
        return taken

    def _timed(self, run: Callable[[], Any], calls: int) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - began) / calls
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]  # torch leaves it so
        start, end = events
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls

    def curves(self, free: int | None) -> Iterator[Curve]:
        """Reading, writing, both and copying over working sets from a corner of a cache to what none holds."""
        most = min(self.depth.largest * (8 if self.on_gpu else 1), (free or self.depth.largest * 4) // 4)
        whole = torch.empty(most // 4, dtype=torch.float32, device=self.device).zero_()  # touched: see materialize.py
        sizes = [int(2 ** (16 if self.on_gpu else 15) * self.depth.step**i) // 4096 * 4096 for i in range(64)]
        sizes = [size for size in sizes if size <= most]
        taken: dict[tuple[str, int], list[float]] = {}
        for _ in range(_ROUNDS):  # again and again: what disturbs for a while must not disturb one size alone
            for kind in _KINDS:
                for size in sizes:
                    run = _mover(kind, whole[: size // 4])
                    taken.setdefault((kind, size), []).extend(
                        self._graphed(run, most=self.depth.seconds / (2 * _ROUNDS))
                    )
        for kind, moved in _KINDS.items():
            yield Curve(
                kind=kind,
                best={size: moved * size / min(taken[kind, size]) for size in sizes},
                usual={size: moved * size / median(taken[kind, size]) for size in sizes},
            )

    def _graphed(self, run: Callable[[], Any], *, most: float) -> list[float]:
        """Seconds of one call where the host is not in the way: on a GPU from a recorded graph of several."""
        if not self.on_gpu:
            return self.seconds(run, most=most)
        graph = torch.cuda.CUDAGraph()
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(_GRAPHED):
                run()
        return [taken / _GRAPHED for taken in self.seconds(graph.replay, most=most)]

    def products(self) -> Iterator[tuple[str, tuple[float, float]]]:
        """FLOP/s by type: the best of all, and the middle of the largest shape."""
        kinds = ["float32", "bfloat16", "float16", "float64"]
        kinds += ["tfloat32", "float8", "int8"] if self.on_gpu else []
        shapes = [(rows, side) for side in self._sides() for rows in (side, 4 * side)][:-1]
        rates: dict[str, dict[tuple[int, int], list[float]]] = {dtype: {} for dtype in kinds}
        for _ in range(2):
            for dtype in kinds:
                for rows, side in shapes:
                    try:
                        run = self._product(dtype, rows, side)
                        run()
                        once = self._timed(run, 1)
                    except (RuntimeError, NotImplementedError, ValueError):  # a type that this device does not multiply
                        break
                    if once > 4 * self.depth.seconds:
                        break
                    taken = self._in_mode(dtype, run)
                    rates[dtype].setdefault((rows, side), []).extend(2.0 * rows * side * side / t for t in taken)
        for dtype, found in rates.items():
            if found:
                best = max(max(each) for each in found.values())
                yield dtype, (max(best, self._convolved(dtype)), median(found[max(found, key=math.prod)]))

    def _convolved(self, dtype: str) -> float:
        """FLOP/s of a convolution, whose library may do better than that of products; 0 where there is none."""
        if dtype in ("float8", "int8", "tfloat32"):
            return 0.0
        kind, size = getattr(torch, dtype), 112 if self.on_gpu else 56
        given = torch.randn(16 if self.on_gpu else 1, 64, size, size, device=self.device).to(kind)
        weight = torch.randn(64, 64, 3, 3, device=self.device).to(kind) * 0.1
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            taken = self.seconds(lambda: torch.nn.functional.conv2d(given, weight), most=self.depth.seconds / 4)
        except (RuntimeError, NotImplementedError):  # no kernel for this type: that of products counts alone
            return 0.0
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
        return 2.0 * given.shape[0] * 64 * 64 * 9 * (size - 2) ** 2 / min(taken)

    def _sides(self) -> tuple[int, ...]:
        return tuple(4 * side for side in self.depth.sides) if self.on_gpu else self.depth.sides

    def _in_mode(self, dtype: str, run: Callable[[], Any]) -> list[float]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if dtype == "tfloat32" else "highest")
        try:
            return self.seconds(run, most=self.depth.seconds / 2)
        finally:
            torch.set_float32_matmul_precision(before)

    def _product(self, dtype: str, rows: int, side: int) -> Callable[[], Any]:
        left, right = (torch.randn(n, side, device=self.device) * 0.1 for n in (rows, side))
        if dtype == "float8":
            a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
            one = torch.ones((), device=self.device)
            scaled = functools.partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
            return lambda: scaled(a, b.t(), use_fast_accum=True)  # the peak is without detours over float32
        if dtype == "int8":
            a, b = ((256 * each).to(torch.int8) for each in (left, right))  # zeros would be multiplied at higher clocks
            return lambda: torch._int_mm(a, b.t())
        kind = getattr(torch, "float32" if dtype == "tfloat32" else dtype)
        a, b = left.to(kind), right.to(kind)
        return lambda: torch.nn.functional.linear(a, b)

    def special(self) -> tuple[float, float] | None:
        """Results a second of functions that are no sums and products, on data that a cache holds; not of a GPU."""
        if self.on_gpu:  # an H200 has 4e12 a second: with 8 bytes each 33 TB/s, three times what its L2 gives
            return None
        count = 1 << 16
        some = torch.rand(count, device=self.device) + 0.5
        out = torch.empty_like(some)
        rates = []
        for function in (torch.exp, torch.sigmoid, torch.tanh, torch.rsqrt, torch.cos, torch.log):
            taken = self.seconds(functools.partial(function, some, out=out), most=self.depth.seconds / 4)
            rates.append(count / min(taken))
        rows = some.view(-1, 256)
        # a softmax is an exponential an element and has a faster one than torch.exp on some devices
        taken = self.seconds(lambda: torch.softmax(rows, -1), most=self.depth.seconds / 4)
        return max(*rates, count / min(taken)), median(rates)

    def overheads(self) -> tuple[float, float, float, float]:
        """Seconds of a kernel that does nothing, of the host for an op of a module, for a bare one, of a read-back."""
        tiny = torch.zeros(8, 8, device=self.device)
        block = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(8))).to(self.device)
        one = torch.zeros(1, device=self.device)
        if not self.on_gpu:
            bare = median(self.seconds(lambda: tiny.add_(1.0)))
            module = median(self.seconds(lambda: block(tiny))) / 8
            # on a CPU nothing runs ahead: what an op costs at all is its latency, and there is no launch beside it
            return module, module, bare, median(self.seconds(one.item))
        latency = median(self._graphed(lambda: tiny.add_(1.0), most=self.depth.seconds))
        bare = self._host_seconds(lambda: tiny.add_(1.0), 1)
        module = self._host_seconds(lambda: block(tiny), 8)
        read = median(self.seconds(lambda: one.add_(1.0).item()))
        return latency, module, bare, max(read - bare, latency)

    def _host_seconds(self, run: Callable[[], Any], ops: int) -> float:
        """Seconds of the host an op, while the GPU is left behind."""
        run()
        taken = []
        for _ in range(20):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(50):
                run()
            taken.append((time.perf_counter() - began) / (50 * ops))
        torch.cuda.synchronize()
        return median(taken)

    def memory_latency(self) -> float | None:
        """How much later a small op is done when what it reads lies in memory; not measured on a GPU."""
        if self.on_gpu:
            return None
        table = torch.ones(self.depth.largest // 256, 64)
        rows = [torch.tensor([int(row)]) for row in torch.randperm(len(table))[:_LOOKUPS]]
        late = []
        for _ in range(_ROUNDS):
            anywhere, here = (self._lookups(table, chosen) for chosen in (rows, rows[:1] * len(rows)))
            late.append(anywhere - here)
        return max(median(late), 1e-8)

    def _lookups(self, table: torch.Tensor, rows: Sequence[torch.Tensor]) -> float:
        began = time.perf_counter()
        for row in rows:
            table.index_select(0, row)
        return (time.perf_counter() - began) / len(rows)


_KINDS = {"read": 1, "write": 1, "update": 2, "copy": 1}
"""Ways to move memory, and how often each byte of the working set is moved."""

_ROUNDS = 3
_LOOKUPS = 2000
_CLOCKED = 5e-4
_LEAST_SAMPLES = 3
_GRAPHED = 20


def _mover(kind: str, part: torch.Tensor) -> Callable[[], Any]:
    half = part.numel() // 2
    here, there = part[:half], part[half : 2 * half]
    movers: dict[str, Callable[[], Any]] = {
        "read": part.sum,
        "write": lambda: part.fill_(1.0),
        "update": lambda: part.mul_(1.0),
        "copy": lambda: here.copy_(there),
    }
    return movers[kind]


def _host_memory(free: int | None) -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return free or 1 << 32
