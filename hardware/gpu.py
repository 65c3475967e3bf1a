"""One accelerator in base units. TFLOPS, GB/s, MHz, KiB and MiB are converted here and nowhere else."""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .units import Bytes, BytesPerSecond, FlopsPerByte, FlopsPerSecond

Confidence = Literal["high", "medium", "low", "unstated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One entry of a catalogue file as its source prints it, with where it comes from.

    Attributes:
        key: The name of the entry, such as `memory_bandwidth_gb_per_s`.
        value: The value in `unit`; text entries such as the memory type have an empty unit.
        unit: The unit of `value`, such as `GB/s`.
        confidence: How far the value can be trusted.
        source_id: The source's short name in the file; `user` in a file without sources.
        source_title: The citation.
        source_kind: vendor, repo, measured, secondary, derived, unverified or user.
        taken_from: The key of the part in whose file it stands, where that is another part's; else empty.
    """

    key: str
    value: float | int | str
    unit: str
    confidence: Confidence
    source_id: str
    source_title: str
    source_kind: str
    taken_from: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A compute peak and the path that it belongs to.

    Attributes:
        flops_per_second: Dense peak; a multiply-add is 2 FLOPs. Integer operations count alike.
        unit: `tensor` for matrix units, `vector` for the general-purpose lanes.
        dtype: The dtype that the path computes in.
        widened_from: The dtype asked for, where the part lacks it and `dtype` is a wider one.
    """

    flops_per_second: FlopsPerSecond
    unit: Literal["tensor", "vector"]
    dtype: str
    widened_from: str | None = None

    def describe(self) -> str:
        """The rate in words: `tensor bfloat16, 312 TFLOP/s (no float8 path on this part)`."""
        tera = self.flops_per_second / _TERA
        operation = "OP" if self.dtype.startswith("int") else "FLOP"
        figure = f"{tera:.4g}" if tera < 1000 else f"{tera:.0f}"
        words = f"{self.unit} {self.dtype}, {figure} T{operation}/s"
        return f"{words} (no {self.widened_from} path on this part)" if self.widened_from else words


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLevel:
    """One level of the memory pyramid.

    Attributes:
        name: Registers, shared memory, L2, last-level cache, device memory, peer link or host link.
        size: Bytes over the whole device; None for links and where not found.
        bandwidth: Byte/s; None where no figure is sourced.
        note: How the bandwidth was obtained, where it is no published peak.
    """

    name: str
    size: Bytes | None
    bandwidth: BytesPerSecond | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What one device can do, per device and in base units. None is unsupported, unpublished or not found.

    Attributes:
        key: The catalogue's name, or the file name of a user's TOML.
        name: The product's name.
        vendor: nvidia, amd, intel, apple, google, aws or a user's own.
        architecture: The vendor's architecture name; empty if not given.
        compute_capability: CUDA's (major, minor).
        release_year: The year of release.
        aliases: Device names as `torch.cuda.get_device_name()` and other runtimes report them.
        shorthands: Family names that stand for this part.
        confidence: For the main figures; each figure has its own.
        memory_bandwidth: Device memory peak, byte/s.
        memory_label_bytes: The capacity as printed, with GB read as 10^9 byte.
        memory_usable_bytes: What the runtime reports as total memory, byte; see `memory_usable_is_estimate`.
        memory_type: HBM3e, GDDR6, LPDDR5X unified ...; empty if not given.
        memory_usable_is_estimate: True where the usable bytes are a lower estimate: 0.98 of what nvidia-smi
            reports, else 0.985 of the label read as GiB (dedicated NVIDIA and AMD memory, where nine device
            queries give 0.986 to 1.000), else the label read as decimal GB.
        tensor: Dense matrix-unit peaks by dtype, FLOP/s, with FP32 (integer: INT32) accumulation.
        vector: Vector peaks by dtype, FLOP/s.
        special_per_second: Exponentials per second: per clock and SM x SMs x clock.
        sm_count: SMs (NVIDIA), CUs (AMD), Xe-cores (Intel) or GPU cores (Apple).
        clock_hz: Boost or maximum SM clock, 1/s.
        l2_bytes: L2 cache.
        cache_bytes: L2, last-level cache and on-chip SRAM together: the most that can stay on chip.
        l2_bandwidth: Published L2 peak, byte/s.
        l2_bandwidth_measured: Measured L2 bandwidth, byte/s: for estimates, never for bounds.
        shared_memory_per_sm_bytes: Shared memory (LDS) of one SM.
        register_file_per_sm_bytes: Register file of one SM.
        link_bandwidth: Device-to-device links of this device together, one direction, byte/s.
        host_bandwidth: Host link (C2C, else PCIe), one direction, byte/s.
        kernel_latency: Seconds of a tiny kernel among others in a CUDA or HIP graph, measured.
        special_measured: Exponentials and the like per second as measured: for estimates, never for bounds.
        overheads: Measured seconds: `launch` of an op by the host, `launch_again` of its further kernels,
            `memory_latency` of a kernel, `read_back` of a value.
        achieved: Published achieved share of the peak: `memory_read`, `memory_triad`, `tensor_bfloat16`, ...
        fitted: All of `FITTED`, fitted on kernels of this part or of one like it; empty where there are none.
        figures: Every figure as printed, with its source; those that are taken over from another part last.
        notes: What a reader of the figures must know.
        disagreements: Where sources contradict each other, and the choice made.
    """

    key: str
    name: str
    vendor: str
    architecture: str
    compute_capability: tuple[int, int] | None
    release_year: int | None
    aliases: tuple[str, ...]
    shorthands: tuple[str, ...]
    confidence: Confidence
    memory_bandwidth: BytesPerSecond
    memory_label_bytes: Bytes | None
    memory_usable_bytes: Bytes | None
    memory_usable_is_estimate: bool
    memory_type: str
    tensor: Mapping[str, FlopsPerSecond] = field(hash=False)
    vector: Mapping[str, FlopsPerSecond] = field(hash=False)
    special_per_second: float | None
    sm_count: int | None
    clock_hz: float | None
    l2_bytes: Bytes | None
    cache_bytes: Bytes | None
    l2_bandwidth: BytesPerSecond | None
    l2_bandwidth_measured: BytesPerSecond | None
    shared_memory_per_sm_bytes: Bytes | None
    register_file_per_sm_bytes: Bytes | None
    link_bandwidth: BytesPerSecond | None
    host_bandwidth: BytesPerSecond | None
    kernel_latency: float | None
    special_measured: float | None
    overheads: Mapping[str, float] = field(hash=False)
    achieved: Mapping[str, float] = field(hash=False)
    fitted: Mapping[str, float] = field(hash=False)
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    disagreements: tuple[str, ...]

    @property
    def memory_levels(self) -> tuple[MemoryLevel, ...]:
        """The memory pyramid from the fastest level down; levels of which nothing is known are left out."""
        units = self.sm_count or 0
        beyond_l2 = (self.cache_bytes or 0) - (self.l2_bytes or 0)
        l2_bandwidth, l2_note = self.l2_bandwidth, ""
        if l2_bandwidth is None and self.l2_bandwidth_measured is not None:
            l2_bandwidth, l2_note = self.l2_bandwidth_measured, "measured"
        levels = (
            MemoryLevel(name="registers", size=_times(self.register_file_per_sm_bytes, units), bandwidth=None),
            MemoryLevel(name="shared memory", size=_times(self.shared_memory_per_sm_bytes, units), bandwidth=None),
            MemoryLevel(name="L2", size=self.l2_bytes, bandwidth=l2_bandwidth, note=l2_note),
            MemoryLevel(name="beyond L2, on chip", size=Bytes(beyond_l2) or None, bandwidth=None),
            MemoryLevel(
                name="device memory",
                size=self.memory_usable_bytes,
                bandwidth=self.memory_bandwidth,
                note="size estimated" if self.memory_usable_is_estimate else "",
            ),
            MemoryLevel(name="peer link", size=None, bandwidth=self.link_bandwidth, note="one direction"),
            MemoryLevel(name="host link", size=None, bandwidth=self.host_bandwidth, note="one direction"),
        )
        return tuple(level for level in levels if level.size or level.bandwidth)

    def matmul_rate(self, dtype: str, *, tf32: bool = False) -> Rate | None:
        """The dense peak, FLOP/s, at which the part multiplies matrices of a torch dtype.

        Where the part lacks the dtype's tensor path the next path of a fixed order is taken, each wide enough
        to hold the operands exactly: never a narrower one, and never float16 for bfloat16.

        Args:
            dtype: A torch dtype's name, such as `float8_e4m3fn` or `bfloat16`.
            tf32: Whether float32 products may be rounded to TF32 (`torch.backends.cuda.matmul.allow_tf32`).

        Returns:
            The rate, or None if no path at least as wide has a sourced peak.
        """
        wanted = _matmul_dtype(dtype)
        if wanted == "float32" and tf32 and "tfloat32" in self.tensor:
            wanted = "tfloat32"
        for path in _MATMUL_PATHS.get(wanted, ()):
            rate = self._rate(path, wanted)
            if rate is not None:
                return rate
        return None

    def vector_rate(self, dtype: str) -> Rate | None:
        """The peak, FLOP/s, of elementwise work on a torch dtype.

        Integer, bool and index dtypes run at the float32 rate, an upper limit. Float types without a sourced
        rate, and all narrower than 16 bits, run at the float32 rate; float64 has only its own.
        """
        wanted = _vector_dtype(dtype)
        return self._rate(("vector", wanted), wanted) or (
            self._rate(("vector", "float32"), wanted) if wanted in _RUNS_AS_FLOAT32 else None
        )

    def ridge(self, dtype: str, *, tf32: bool = False) -> FlopsPerByte | None:
        """The ridge point, FLOP/byte: matmul rate over memory bandwidth (Roofline, Williams et al. 2009)."""
        rate = self.matmul_rate(dtype, tf32=tf32)
        return None if rate is None else FlopsPerByte(rate.flops_per_second / self.memory_bandwidth)

    def _rate(self, path: "_Path", wanted: str) -> Rate | None:
        unit, dtype = path
        peak = (self.tensor if unit == "tensor" else self.vector).get(dtype)
        if peak is None:
            return None
        return Rate(flops_per_second=peak, unit=unit, dtype=dtype, widened_from=None if dtype == wanted else wanted)


def from_figures(
    figures: tuple[Figure, ...],
    *,
    key: str,
    name: str,
    vendor: str,
    confidence: Confidence = "unstated",
    aliases: tuple[str, ...] = (),
    shorthands: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    disagreements: tuple[str, ...] = (),
) -> Gpu:
    """Convert validated figures, each in the unit of `UNITS`, to a Gpu in base units."""
    numbers = {figure.key: figure.value for figure in figures if not isinstance(figure.value, str)}
    texts = {figure.key: figure.value for figure in figures if isinstance(figure.value, str)}
    sm_count = _first(numbers, "sm_count", "gpu_core_count")
    clock = _scaled(max((numbers[k] for k in _CLOCKS if k in numbers), default=None), _MEGA)
    special = numbers.get("sfu_exp_per_clk_per_sm")
    usable, is_estimate = _usable_memory(vendor, texts.get("memory_type", ""), numbers)
    return Gpu(
        key=key,
        name=name,
        vendor=vendor,
        architecture=texts.get("architecture", ""),
        compute_capability=_compute_capability(texts.get("compute_capability")),
        release_year=_integer(numbers.get("release_year")),
        aliases=aliases,
        shorthands=shorthands,
        confidence=confidence,
        memory_bandwidth=BytesPerSecond(numbers["memory_bandwidth_gb_per_s"] * _GIGA),
        memory_label_bytes=_bytes(numbers.get("memory_gb"), _GIGA),
        memory_usable_bytes=usable,
        memory_usable_is_estimate=is_estimate,
        memory_type=texts.get("memory_type", ""),
        tensor=_peaks(numbers, _TENSOR_FIGURES),
        vector=_peaks(numbers, _VECTOR_FIGURES),
        special_per_second=special * sm_count * clock if special and sm_count and clock else _special(numbers),
        sm_count=_integer(sm_count),
        clock_hz=clock,
        l2_bytes=_bytes(numbers.get("l2_cache_mb"), _MEBI),
        cache_bytes=_bytes(sum(numbers.get(k, 0) for k in _CACHES) or None, _MEBI),
        l2_bandwidth=_bandwidth(numbers.get("l2_bandwidth_gb_per_s_peak")),
        l2_bandwidth_measured=_bandwidth(numbers.get("l2_bandwidth_gb_per_s_measured")),
        shared_memory_per_sm_bytes=_bytes(numbers.get("shared_memory_per_sm_kb"), _KIBI),
        register_file_per_sm_bytes=_bytes(numbers.get("register_file_per_sm_kb"), _KIBI),
        link_bandwidth=_one_way(numbers, "interconnect"),
        host_bandwidth=_one_way(numbers, "c2c") or _one_way(numbers, "pcie"),
        kernel_latency=numbers["kernel_in_graph_us"] * 1e-6 if "kernel_in_graph_us" in numbers else None,
        special_measured=_scaled(numbers.get("achieved_special_gop_per_s"), _GIGA),
        overheads={name: numbers[key] * 1e-6 for key, name in _OVERHEADS.items() if key in numbers},
        achieved=_achieved(numbers),
        fitted=_fitted(figures),
        figures=figures,
        notes=notes,
        disagreements=disagreements,
    )


def taking_over(gpu: Gpu, figures: Iterable[Figure]) -> Gpu:
    """The part with fitted figures of another one beside its own."""
    both = (*gpu.figures, *figures)
    return replace(gpu, figures=both, fitted=_fitted(both))


FITTED: Mapping[str, str] = {
    "kernel_cycles": "a kernel, however small",
    "product_cycles": "the same of a matrix product",
    "narrow_product_cycles": "the same of one of 8 or 4 bits",
    "product_split_cycles": "more where the inner dimension of a product is split",
    "product_memory_fraction": "of the bandwidth that a kernel which reads reaches, in products",
    "product_l2_reuse_factor": "operands of tiles that pass L2, over its bandwidth: tiles of several blocks load once",
    "grouped_product_fraction": "of the rate that products reach, in products of groups, such as experts",
    "grouped_product_cycles": "a product of groups, however small",
    "quantising_fraction": "of the bandwidths that other kernels reach, in those that quantise activations",
    "prompt_attention_fraction": "of the rate that products reach, in attention over prompts",
    "prompt_attention_head64_fraction": "of that, what is left for heads up to 64",
    "prompt_attention_narrow_fraction": "of that, what is left of the rate of products of 8 bits",
    "prompt_attention_memory_fraction": "of the bandwidth that a kernel which reads reaches, in attention over prompts",
    "prompt_attention_cycles": "attention over prompts, however small",
    "prompt_attention_wave_cycles": "more for each wave of its blocks",
    "decode_attention_memory_fraction": "of that bandwidth, in attention of a few queries over a cache",
    "decode_attention_cycles": "that attention, however small",
    "decode_attention_split_cycles": "more where its keys are split over blocks",
    "decode_attention_wave_cycles": "a wave of its blocks",
}
"""Figures of kernels that no data sheet has, fitted on measured kernels: what each is. Cycles are of the boost clock.

A part has all of them or none: those that its file lacks are taken over from another part.
"""

_MEGA, _GIGA, _TERA = 10**6, 10**9, 10**12
_KIBI, _MEBI, _GIBI = 2**10, 2**20, 2**30

_TENSOR_FIGURES = {
    "tensor_fp64_tflops": "float64",
    "tensor_fp32_tflops": "float32",
    "tensor_tf32_tflops": "tfloat32",
    "tensor_bf16_tflops": "bfloat16",
    "tensor_fp16_tflops": "float16",
    "tensor_fp8_tflops": "float8",
    "tensor_fp6_tflops": "float6",
    "tensor_fp4_tflops": "float4",
    "tensor_int8_tops": "int8",
    "tensor_int4_tops": "int4",
}
_VECTOR_FIGURES = {
    "vector_fp64_tflops": "float64",
    "vector_fp32_tflops": "float32",
    "vector_bf16_tflops": "bfloat16",
    "vector_fp16_tflops": "float16",
}
_ACHIEVED_FIGURES = {
    "achieved_memory_read_fraction": "memory_read",
    "achieved_memory_triad_fraction": "memory_triad",
    "achieved_tensor_fp64_fraction": "tensor_float64",
    "achieved_tensor_fp32_fraction": "tensor_float32",
    "achieved_tensor_tf32_fraction": "tensor_tfloat32",
    "achieved_tensor_bf16_fraction": "tensor_bfloat16",
    "achieved_tensor_fp16_fraction": "tensor_float16",
    "achieved_tensor_fp8_fraction": "tensor_float8",
    "achieved_tensor_fp4_fraction": "tensor_float4",
    "achieved_tensor_int8_fraction": "tensor_int8",
}
_OVERHEADS = {
    "launch_op_us": "launch",
    "launch_kernel_us": "launch_again",
    "memory_latency_us": "memory_latency",
    "read_back_us": "read_back",
}
_CLOCKS = ("boost_clock_mhz", "max_sm_clock_mhz")
_CACHES = ("l2_cache_mb", "llc_mb", "on_chip_sram_mb")

_FIGURES_BY_UNIT: dict[str, tuple[str, ...]] = {
    "TFLOP/s": (
        *(k for k in _TENSOR_FIGURES if k.endswith("_tflops")),
        *_VECTOR_FIGURES,
        "tensor_bf16_tflops_shipping",
        "tensor_fp16_fp16acc_tflops",
        "tensor_fp8_fp16acc_tflops",
        "vector_fp32_single_issue_tflops",
        "scalar_fp32_tflops",
        "achieved_tensor_tf32_tflops",
        "achieved_tensor_bf16_tflops",
        "achieved_tensor_fp16_tflops",
        "achieved_tensor_fp8_tflops",
        "achieved_tensor_fp4_tflops",
        "achieved_vector_fp64_tflops",
        "typical_tensor_bf16_tflops",
        "typical_tensor_fp16_tflops",
        "typical_tensor_fp8_tflops",
    ),
    "TOP/s": ("tensor_int8_tops", "tensor_int4_tops", "achieved_tensor_int8_tops", "dla_int8_sparse_tops"),
    "GOP/s": (
        "peak_exp2_gop_per_s",
        "achieved_exp2_gop_per_s",
        "peak_special_gop_per_s",
        "achieved_special_gop_per_s",
    ),
    "GB/s": (
        "memory_bandwidth_gb_per_s",
        "l2_bandwidth_gb_per_s_peak",
        "l2_bandwidth_gb_per_s_measured",
        "llc_bandwidth_gb_per_s_peak",
        "on_chip_sram_bandwidth_gb_per_s",
        "interconnect_gb_per_s_unidirectional",
        "interconnect_gb_per_s_bidirectional",
        "c2c_gb_per_s_unidirectional",
        "c2c_gb_per_s_bidirectional",
        "pcie_gb_per_s_unidirectional",
        "pcie_gb_per_s_bidirectional",
        "host_device_copy_gb_per_s",
        "dma_gb_per_s",
        "achieved_memory_read_gb_per_s",
        "achieved_memory_write_gb_per_s",
        "achieved_memory_copy_gb_per_s",
        "achieved_memory_triad_gb_per_s",
    ),
    "GB": ("memory_gb",),
    "B": ("memory_usable_bytes",),
    "MiB": ("memory_reported_mib", *_CACHES),
    "KiB": (
        "shared_memory_per_sm_kb",
        "register_file_per_sm_kb",
        "l1_per_sm_kb",
        "l1_shared_combined_per_sm_kb",
        "tensor_memory_per_sm_kb",
    ),
    "MHz": (*_CLOCKS, "tensor_clock_mhz", "vector_clock_mhz"),
    "B/clk": ("l2_read_bytes_per_clk", "shared_memory_bytes_per_clk"),
    "1/clk/SM": ("sfu_exp_per_clk_per_sm",),
    "count": (
        "sm_count",
        "gpu_core_count",
        "mme_count",
        "tpc_count",
        "tensorcore_count",
        "neuroncore_count",
        "pcie_gen",
        "pcie_lanes",
    ),
    "year": ("release_year",),
    "W": ("tdp_w",),
    "us": ("kernel_in_graph_us", "kernel_in_stream_us", *_OVERHEADS),
    "USD/h": ("price_usd_per_gpu_hour", "price_usd_per_gpu_hour_low", "price_usd_per_gpu_hour_high"),
    "clk": tuple(key for key in FITTED if key.endswith("_cycles")),
    "fraction": (*_ACHIEVED_FIGURES, *(key for key in FITTED if key.endswith("_fraction"))),
    "factor": tuple(key for key in FITTED if key.endswith("_factor")),
    "": ("architecture", "compute_capability", "gfx_target", "memory_type", "interconnect", "kernels_like"),
}

UNITS: Mapping[str, str] = {key: unit for unit, keys in _FIGURES_BY_UNIT.items() for key in keys}
"""Every figure a catalogue file may hold, with its unit; text figures have none."""

_Path = tuple[Literal["tensor", "vector"], str]

_FLOAT32_PATHS: tuple[_Path, ...] = (("tensor", "float32"), ("vector", "float32"))
_EIGHT_BIT_PATHS: tuple[_Path, ...] = (
    ("tensor", "bfloat16"),
    ("tensor", "float16"),
    ("vector", "float16"),
    *_FLOAT32_PATHS,
)
_MATMUL_PATHS: dict[str, tuple[_Path, ...]] = {
    "float64": (("tensor", "float64"), ("vector", "float64")),
    "float32": _FLOAT32_PATHS,
    "tfloat32": (("tensor", "tfloat32"), *_FLOAT32_PATHS),
    "bfloat16": (("tensor", "bfloat16"), ("vector", "bfloat16"), *_FLOAT32_PATHS),
    "float16": (("tensor", "float16"), ("vector", "float16"), *_FLOAT32_PATHS),
    "float8": (("tensor", "float8"), *_EIGHT_BIT_PATHS),
    "float6": (("tensor", "float6"), ("tensor", "float8"), *_EIGHT_BIT_PATHS),
    "float4": (("tensor", "float4"), ("tensor", "float8"), *_EIGHT_BIT_PATHS),
    "int8": (("tensor", "int8"), *_EIGHT_BIT_PATHS),
    "int4": (("tensor", "int4"), ("tensor", "int8"), *_EIGHT_BIT_PATHS),
}
_RUNS_AS_FLOAT32 = {"bfloat16", "float16", "float8", "float6", "float4"}
_NARROW = re.compile(r"(float[468])(_\w+)?|u?(int[48])")
_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


@functools.cache
def _matmul_dtype(dtype: str) -> str:
    narrow = _NARROW.fullmatch(dtype)
    return (narrow[1] or narrow[3]) if narrow else _COMPLEX.get(dtype, dtype)


@functools.cache
def _vector_dtype(dtype: str) -> str:
    return "float32" if re.fullmatch(r"bool|u?int\d+", dtype) else _matmul_dtype(dtype)


def _usable_memory(vendor: str, memory_type: str, numbers: Mapping[str, float | int]) -> tuple[Bytes | None, bool]:
    if "memory_usable_bytes" in numbers:
        return Bytes(int(numbers["memory_usable_bytes"])), False
    # inline ECC of GDDR cards takes a sixteenth of the label, which only the reported total shows
    if "memory_reported_mib" in numbers:
        return _bytes(numbers["memory_reported_mib"] * 0.98, _MEBI), True
    label = numbers.get("memory_gb")
    shared = memory_type.startswith("LPDDR") or "unified" in memory_type
    if label is None or shared or vendor not in {"nvidia", "amd"}:
        return _bytes(label, _GIGA), label is not None
    return _bytes(label * 0.985, _GIBI), True


def _peaks(numbers: Mapping[str, float | int], names: Mapping[str, str]) -> dict[str, FlopsPerSecond]:
    return {dtype: FlopsPerSecond(numbers[key] * _TERA) for key, dtype in names.items() if key in numbers}


def _achieved(numbers: Mapping[str, float | int]) -> dict[str, float]:
    return {name: float(numbers[key]) for key, name in _ACHIEVED_FIGURES.items() if key in numbers}


def _fitted(figures: Iterable[Figure]) -> dict[str, float]:
    return {f.key: float(f.value) for f in figures if f.key in FITTED}


def _special(numbers: Mapping[str, float | int]) -> float | None:
    return _scaled(numbers.get("peak_special_gop_per_s"), _GIGA)


def _one_way(numbers: Mapping[str, float | int], link: str) -> BytesPerSecond | None:
    both_ways = numbers.get(f"{link}_gb_per_s_bidirectional")
    half = None if both_ways is None else both_ways / 2
    return _bandwidth(numbers.get(f"{link}_gb_per_s_unidirectional", half))


def _compute_capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")
    return int(major), int(minor)


def _first(numbers: Mapping[str, float | int], *keys: str) -> float | int | None:
    return next((numbers[key] for key in keys if key in numbers), None)


def _scaled(value: float | int | None, factor: int) -> float | None:
    return None if value is None else float(value * factor)


def _bandwidth(value: float | int | None) -> BytesPerSecond | None:
    return None if value is None else BytesPerSecond(float(value * _GIGA))


def _bytes(value: float | int | None, factor: int) -> Bytes | None:
    return None if value is None else Bytes(round(value * factor))


def _times(per_unit: Bytes | None, units: int) -> Bytes | None:
    return Bytes(per_unit * units) if per_unit and units else None


def _integer(value: float | int | None) -> int | None:
    return None if value is None else int(value)
