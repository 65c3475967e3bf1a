"""The tables of measured kernels in the installed package `aiconfigurator-core` (`pip install fxroof[silicon]`).

The package is found, not imported: its tables are read, its models are not. docs/silicon.md says what the columns are.
"""

import importlib.metadata
import importlib.util
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silicon_graphs import Measured

PACKAGE = "aiconfigurator-core"
_MODULE = "aiconfigurator_core"

GPUS: Mapping[str, str] = {
    "a100_sxm": "a100_sxm_80gb",
    "h100_sxm": "h100_sxm",
    "h200_sxm": "h200_sxm",
    "b200_sxm": "b200",
    "gb200": "gb200",
    "b300_sxm": "b300",
    "l40s": "l40s",
}
"""Folders of the package, and the same parts in fxroof's catalogue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an operator's rows are.

    Attributes:
        operator: as in `silicon_graphs.BUILDERS`.
        folder: the family of operators in the package.
        file: name of the table.
        dtype: columns that make a row's dtype.
        columns: those that say what was computed; a column that a table lacks is 0.
        only: values that a column must have.
    """

    operator: str
    folder: str
    file: str
    dtype: tuple[str, ...]
    columns: tuple[str, ...]
    only: Mapping[str, str]


_HEADS = (
    "batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "window_size",
    "attn_dtype", "kv_cache_dtype",
)  # fmt: skip
_LATENT = ("batch_size", "isl", "step", "num_heads", "kv_cache_dtype")
_EXPERTS = (
    "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "distribution",
)  # fmt: skip
SOURCES = (
    Source(operator="gemm", folder="gemm", file="gemm_perf", dtype=("gemm_dtype",), columns=("m", "n", "k"), only={}),
    Source(
        operator="prefill attention",
        folder="attention",
        file="context_attention_perf",
        dtype=("attn_dtype", "kv_cache_dtype"),
        columns=_HEADS,
        only={},
    ),
    Source(
        operator="decode attention",
        folder="attention",
        file="generation_attention_perf",
        dtype=("attn_dtype", "kv_cache_dtype"),
        columns=_HEADS,
        only={},
    ),
    Source(
        operator="mla prefill",
        folder="mla",
        file="context_mla_perf",
        dtype=("mla_dtype", "kv_cache_dtype"),
        columns=_LATENT,
        only={},
    ),
    Source(
        operator="mla decode",
        folder="mla",
        file="generation_mla_perf",
        dtype=("mla_dtype", "kv_cache_dtype"),
        columns=_LATENT,
        only={},
    ),
    Source(operator="moe", folder="moe", file="moe_perf", dtype=("moe_dtype",), columns=_EXPERTS, only={}),
    Source(
        operator="all-reduce",
        folder="comm",
        file="custom_allreduce_perf",
        dtype=("allreduce_dtype",),
        columns=("num_gpus", "message_size"),
        only={},
    ),
    Source(
        operator="all-reduce",
        folder="comm",
        file="nccl_perf",
        dtype=("nccl_dtype",),
        columns=("num_gpus", "message_size"),
        only={"op_name": "all_reduce"},
    ),
)


def excluded(row: Measured) -> str:
    """Why a row is left out; empty for those that are not."""
    table = (row.gpu, row.operator, row.backend, row.version)
    if table == ("a100_sxm_80gb", "decode attention", "trtllm", "1.0.0"):
        return "its times imply up to 1.7 times the card's memory bandwidth"
    if (*table, row.dtype) == ("h100_sxm", "prefill attention", "trtllm", "1.3.0rc20", "bfloat16/fp8"):
        shape = row.shape
        if shape["batch_size"] * shape["isl"] * shape["num_heads"] * shape["head_dim"] > _INT32:
            return (
                "queries of more than 2^31 elements, of which other tables have 30 or 40 rows and this one 2: twice "
                "the work of the row with half of them in 1.3 times its time"
            )
    return ""


_INT32 = 2**31


def remark(row: Measured) -> str:
    """What makes a row no measure of a kernel's time; empty where nothing does."""
    if (row.operator, row.backend, row.dtype) == ("gemm", "vllm", "fp8_block"):
        return "60 to 270 µs a layer whatever its shape: launched by the host, not by a CUDA graph"
    if row.operator == "moe" and row.gpu in _HOPPER and "flashinfer_cutlass" in row.kernel and row.dtype in _UNTUNED:
        return "three to four times as long as TensorRT-LLM's CUTLASS experts of the same shape: not tuned"
    return ""


_HOPPER = ("h100_sxm", "h200_sxm")
_UNTUNED = ("bfloat16", "fp8")


class NoTablesError(Exception):
    """The package is not installed."""


def version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise NoTablesError(f"{PACKAGE} is not installed: pip install 'fxroof[silicon]'") from error


def groups(
    gpus: Sequence[str], operators: Sequence[str], rows: int | None, seed: int = 0
) -> Iterator[tuple[Measured, ...]]:
    """Rows of one GPU, operator, backend, version and dtype after another.

    Args:
        gpus: keys of fxroof's catalogue.
        operators: keys of `silicon_graphs.BUILDERS`.
        rows: of a group at most, chosen at random; None for all.
        seed: of the choice.
    """
    for folder, gpu in GPUS.items():
        if gpu not in gpus:
            continue
        for source in SOURCES:
            if source.operator in operators:
                for path in sorted((_data() / folder / source.folder).glob(f"*/*/{source.file}.parquet")):
                    yield from _table(path, gpu, source, rows, seed)


def _data() -> Path:
    version()
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise NoTablesError(f"{PACKAGE} is installed without its module {_MODULE}")
    return Path(spec.origin).parent / "systems" / "data"


def _table(path: Path, gpu: str, source: Source, rows: int | None, seed: int) -> Iterator[tuple[Measured, ...]]:
    import pyarrow.parquet as parquet

    table: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    backend, release = path.parts[-3:-1]
    count = len(table["latency"])
    by_dtype: defaultdict[str, list[int]] = defaultdict(list)
    for index in range(count):
        if all(table[column][index] == value for column, value in source.only.items()):
            by_dtype[_dtype([table[column][index] for column in source.dtype])].append(index)
    for dtype, indices in sorted(by_dtype.items()):
        chosen = indices if rows is None else sorted(random.Random(seed).sample(indices, min(rows, len(indices))))  # noqa: S311  # no secret
        yield tuple(
            Measured(
                gpu=gpu,
                operator=source.operator,
                backend=backend,
                version=release,
                kernel=table["kernel_source"][index] if "kernel_source" in table else "",
                dtype=dtype,
                shape={c: table[c][index] if c in table else 0 for c in source.columns},
                seconds=table["latency"][index] / 1e3,
            )
            for index in chosen
        )


def _dtype(names: Sequence[str]) -> str:
    return "/".join(dict.fromkeys("bfloat16" if name in ("float16", "half") else name for name in names))
