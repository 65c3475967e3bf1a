"""The GPU catalogue as text: all parts in a table, or one part with every figure and its source."""

from collections.abc import Iterator, Sequence

from rich.text import Text

from ...hardware.gpu import Figure, Gpu, Rate
from . import _units as units
from ._layout import Column, bullets, clean, fact, printed, table, title
from .registry import Options

_RIDGE_DTYPES = (
    "float64",
    "float32",
    "tfloat32",
    "bfloat16",
    "float16",
    "float8",
    "float6",
    "float4",
    "int8",
    "int4",
)


def catalog(gpus: Sequence[Gpu], version: str, options: Options) -> str:
    """One row for each part."""
    columns = [
        Column(header="key", cells=[Text(gpu.key, style="bold") for gpu in gpus]),
        Column(header="name", cells=[clean(gpu.name) for gpu in gpus], least=26, drop=6),
        Column(header="memory", cells=[_memory(gpu) for gpu in gpus], right=True, drop=1),
        Column(header="bandwidth", cells=[units.rate(gpu.memory_bandwidth, "B/s") for gpu in gpus], right=True),
        Column(header="bf16", cells=[_peak(gpu, "bfloat16") for gpu in gpus], right=True),
        Column(header="fp16", cells=[_peak(gpu, "float16") for gpu in gpus], right=True, drop=7),
        Column(header="fp8", cells=[_peak(gpu, "float8") for gpu in gpus], right=True, drop=3),
        Column(header="fp4", cells=[_peak(gpu, "float4") for gpu in gpus], right=True, drop=4),
        Column(header="ridge", cells=[_ridge(gpu) for gpu in gpus], right=True, drop=2),
        Column(header="figures", cells=[gpu.confidence for gpu in gpus], drop=8),
    ]
    caption = (
        f"{len(gpus)} parts, figures of {version}. Dense matmul peaks in TFLOP/s; a dash: no such path, or none "
        "published. Ridge of bf16 in FLOP/byte."
    )
    more = (
        "`fxroof gpus NAME` shows one part with the source of every figure. --gpu also takes a device name as torch "
        "reports it, or the path of a TOML file of your own."
    )
    lines = [*table(columns, options.width), Text(), *bullets((caption, more), options.width, style="dim")]
    return printed(lines, options)


def part(gpu: Gpu, note: str | None, options: Options) -> str:
    """One part: what fxroof uses, then every figure as its source prints it."""
    return printed(_part(gpu, note, options.width), options)


def _part(gpu: Gpu, note: str | None, width: int) -> Iterator[Text]:
    yield title(f"{clean(gpu.key)}  {clean(gpu.name)}", width, heavy=True)
    if note:
        yield from fact("note", [clean(note)], width)
    kind = [
        gpu.vendor,
        gpu.architecture,
        str(gpu.release_year or ""),
        f"figures of {gpu.confidence} confidence",
    ]
    yield from fact("part", [clean(text) for text in kind if text], width)
    yield from fact("also", [clean(name) for name in (*gpu.shorthands, *gpu.aliases)], width)
    memory = [units.rate(gpu.memory_bandwidth, "B/s")]
    if gpu.memory_usable_bytes:
        guess = ", estimated" if gpu.memory_usable_is_estimate else ""
        memory.append(f"{units.byte_count(gpu.memory_usable_bytes)} usable{guess}")
    if gpu.cache_bytes:
        memory.append(f"{units.byte_count(gpu.cache_bytes)} on-chip cache")
    yield from fact("memory", memory, width)
    yield Text()
    yield Text("memory pyramid", style="dim")
    yield from table(_levels(gpu), width, indent=2)
    yield Text()
    yield Text("matmul of", style="dim")
    yield from table(_rates(gpu), width, indent=2)
    yield Text()
    for origin in dict.fromkeys(figure.taken_from for figure in gpu.figures):
        yield Text(f"figures of kernels, taken over from {clean(origin)}" if origin else "figures", style="dim")
        yield from table(_figures([f for f in gpu.figures if f.taken_from == origin]), width, indent=2)
        yield Text()
    yield Text("sources", style="dim")
    sources = dict.fromkeys((f.source_id, f.source_kind, f.source_title) for f in gpu.figures)
    yield from bullets((f"{name} ({kind}): {citation}" for name, kind, citation in sources), width)
    for heading, texts in (("notes", gpu.notes), ("where sources disagree", gpu.disagreements)):
        if texts:
            yield Text()
            yield Text(heading, style="dim")
            yield from bullets(texts, width)


def _levels(gpu: Gpu) -> list[Column]:
    levels = gpu.memory_levels
    sizes = [units.byte_count(level.size) if level.size else "-" for level in levels]
    speeds = [units.rate(level.bandwidth, "B/s") if level.bandwidth else "-" for level in levels]
    return [
        Column(header="level", cells=[level.name for level in levels]),
        Column(header="size", cells=sizes, right=True),
        Column(header="bandwidth", cells=speeds, right=True),
        Column(header="", cells=[level.note for level in levels], least=4),
    ]


def _rates(gpu: Gpu) -> list[Column]:
    rates: list[tuple[str, Rate]] = []
    for dtype in _RIDGE_DTYPES:
        rate = gpu.matmul_rate(dtype)
        if rate is not None:
            rates.append((dtype, rate))
    ridges = [rate.flops_per_second / gpu.memory_bandwidth for _, rate in rates]
    return [
        Column(header="dtype", cells=[dtype for dtype, _ in rates]),
        Column(header="ridge, FLOP/byte", cells=[units.digits(ridge, trim=True) for ridge in ridges], right=True),
        Column(header="runs as", cells=[rate.describe() for _, rate in rates], least=20),
    ]


def _figures(figures: Sequence[Figure]) -> list[Column]:
    values = [clean(f.value) if isinstance(f.value, str) else f"{f.value:.12g}" for f in figures]
    keys, sources = [figure.key for figure in figures], [clean(figure.source_id) for figure in figures]
    return [
        Column(header="figure", cells=keys, least=_longest(keys)),  # a name and a figure are no use in part
        Column(header="value", cells=values, right=True, least=_longest(values)),
        Column(header="unit", cells=[figure.unit for figure in figures]),
        Column(header="confidence", cells=[figure.confidence for figure in figures]),
        Column(header="kind", cells=[figure.source_kind for figure in figures], drop=1),
        Column(header="source", cells=sources, least=_longest(sources)),
    ]


def _longest(cells: Sequence[str]) -> int:
    return max(map(len, cells), default=0)


def _memory(gpu: Gpu) -> str:
    size = gpu.memory_label_bytes or gpu.memory_usable_bytes
    return units.rate(size, "B") if size else "-"


def _peak(gpu: Gpu, dtype: str) -> str:
    rate = gpu.matmul_rate(dtype)
    if rate is None or rate.widened_from:
        return "-"
    return f"{rate.flops_per_second / 1e12:,.5g}"


def _ridge(gpu: Gpu) -> str:
    rate = gpu.matmul_rate("bfloat16")
    if rate is None or rate.widened_from:
        return "-"
    return units.digits(rate.flops_per_second / gpu.memory_bandwidth, trim=True)
