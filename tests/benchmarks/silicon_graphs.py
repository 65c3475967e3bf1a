"""A measured kernel as a graph: the calls that its collector timed, and what fxroof makes of them.

Nothing here knows a formula of its own: a graph is priced, cut into kernels and run by the functions that
`analyze_phase` calls. What a row measures, and where its collector is, is in docs/silicon.md.
"""

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from statistics import fmean
from typing import Any

from fxroof.analyzer.estimate import Derating, derating
from fxroof.analyzer.execution import execute
from fxroof.analyzer.graph import ITEM_BITS, Arg, Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.kernels import eager_kernels
from fxroof.analyzer.pricing import price
from fxroof.analyzer.sdpa import contiguous_stride
from fxroof.hardware.catalog import load
from fxroof.hardware.gpu import Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row of a table: a shape and how long it took.

    Attributes:
        gpu: key in fxroof's catalogue.
        operator: what it computes, a key of `BUILDERS`.
        backend: `trtllm`, `vllm`, `sglang` or `nccl`.
        version: of the backend.
        kernel: what the collector says it ran.
        dtype: of the operands, in the table's words.
        shape: the columns that say what was computed.
        seconds: mean of a few repetitions.
    """

    gpu: str
    operator: str
    backend: str
    version: str
    kernel: str
    dtype: str
    shape: Mapping[str, int | str]
    seconds: float

    def __getitem__(self, column: str) -> int:
        return int(self.shape[column])


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Seconds of one repetition."""

    bound: float
    estimate: float


class NotPricedError(Exception):
    """A row that fxroof has no op for, or whose collector is not known."""


def predict(row: Measured) -> Predicted:
    """Bound and estimate of a row.

    Raises:
        NotPricedError: nothing says what the row computes in fxroof's terms.
    """
    gpu, reached = part(row.gpu)
    timed = BUILDERS[row.operator](row, gpu)
    done = run(timed.graph, gpu, reached)
    estimate = run(timed.likely, gpu, reached).estimate if timed.likely else done.estimate
    return Predicted(bound=done.bound / timed.repeated, estimate=estimate / timed.repeated)


def run(graph: Graph, gpu: Gpu, reached: Derating) -> Predicted:
    """A graph as it runs again and again, recorded in a CUDA graph as collectors do."""
    kernels = eager_kernels(graph, price(graph, gpu))
    done = execute(graph, kernels, gpu, reached, eager=False).execution
    return Predicted(bound=done.bound, estimate=done.estimate)


@functools.cache
def part(key: str) -> tuple[Gpu, Derating]:
    """A part of the catalogue, and what it reaches."""
    gpu = load(key).gpu
    return gpu, derating(gpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What one recording holds.

    Attributes:
        graph: the least that any program does which computes the row: what is bounded.
        repeated: repetitions of the row in it.
        likely: what the collector's program did, as far as it is known, where that is more: what is estimated.
    """

    graph: Graph
    repeated: int = 1
    likely: Graph | None = None


class Builder:
    """Collects tensors and calls of a graph."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.inputs: list[int] = []

    def weight(self, dtype: str, *shape: int) -> TensorRef:
        """A tensor that the program is given and keeps."""
        return self._tensor(dtype, shape, Role.WEIGHT)

    def given(self, dtype: str, *shape: int, nbytes: int | None = None) -> TensorRef:
        """An input; `nbytes` of memory where rows of it are the same."""
        ref = self._tensor(dtype, shape, Role.INPUT, nbytes)
        self.inputs.append(ref.tensor)
        return ref

    def cache(self, dtype: str, *shape: int) -> TensorRef:
        """Keys, values or latents of earlier tokens."""
        ref = self._tensor(dtype, shape, Role.KV_CACHE)
        self.inputs.append(ref.tensor)
        return ref

    def made(self, dtype: str, *shape: int) -> TensorRef:
        """A result."""
        return self._tensor(dtype, shape, Role.ACTIVATION)

    def view(self, of: TensorRef, dtype: str, *shape: int) -> TensorRef:
        """The first elements of another tensor's memory, row by row."""
        whole = self.tensors[of.tensor]
        self.tensors.append(
            Tensor(storage=whole.storage, dtype=dtype, shape=shape, stride=(*whole.stride[: len(shape) - 1], 1))
        )
        return TensorRef(tensor=len(self.tensors) - 1)

    def call(self, target: str, /, *outputs: TensorRef, mutates: tuple[str, ...] = (), **args: Arg) -> None:
        """Append a call."""
        self.ops.append(
            Op(
                name=f"op_{len(self.ops)}",
                target=target,
                args=args,
                outputs=tuple(ref.tensor for ref in outputs),
                mutates=mutates,
            )
        )

    def one_kernel(
        self,
        reads: tuple[TensorRef, ...],
        writes: tuple[TensorRef, ...],
        written: tuple[int | None, ...],
        *outputs: TensorRef,
        read: tuple[int, ...] | None = None,
        flops: float = 0.0,
        special: float = 0.0,
    ) -> None:
        """Append a kernel that is stated, not derived: what it reads and writes, in bytes where that is not all."""
        self.call(
            "fxroof.fused.default",
            *outputs,
            reads=reads,
            read_bytes=read or (None,) * len(reads),
            writes=writes,
            written_bytes=(*written, *(None,) * (len(writes) + len(outputs) - len(written))),
            dtypes=("float32",) if flops else (),
            flops=(flops,) if flops else (),
            special=special,
        )

    def graph(self, **rest: Any) -> Graph:
        """What was collected."""
        return Graph(
            phase="forward",
            storages=tuple(self.storages),
            tensors=tuple(self.tensors),
            ops=tuple(self.ops),
            inputs=tuple(self.inputs),
            **rest,
        )

    def _tensor(self, dtype: str, shape: tuple[int, ...], role: Role, nbytes: int | None = None) -> TensorRef:
        size = prod(shape) * ITEM_BITS[dtype] // 8 if nbytes is None else nbytes
        self.storages.append(Storage(nbytes=size, role=role, name=role))
        self.tensors.append(
            Tensor(storage=len(self.storages) - 1, dtype=dtype, shape=shape, stride=contiguous_stride(shape))
        )
        return TensorRef(tensor=len(self.tensors) - 1)


FP8, FP4 = "float8_e4m3fn", "float4_e2m1fn_x2"
_WEIGHT_BITS = {"bfloat16": 16, "fp8": 8, "fp8_block": 8, "nvfp4": 4}
_BLOCK = 128
_FP4_GROUP = 16


def gemm(row: Measured, gpu: Gpu) -> Timed:
    """A linear layer without bias, copies of it in turn, so that small weights do not stay in L2 altogether.

    8- and 4-bit layers get bfloat16 activations and quantise them first.
    """
    if row.dtype not in _WEIGHT_BITS:
        raise NotPricedError(f"fxroof has no op for the kernels of {row.dtype} that {row.backend} ran")
    m, n, k = row["m"], row["n"], row["k"]
    copies, own_input = _copies(row, gpu)
    build = Builder()
    out = build.made("bfloat16", m, n)  # freed by each copy before the next one asks for it
    x = build.given("bfloat16", m, k)
    quantised = _quantised(build, row.dtype, m, k)
    for copy in range(copies):
        if own_input and copy:
            x = build.given("bfloat16", m, k)
        if not quantised:
            build.call("aten.linear.default", out, input=x, weight=build.weight("bfloat16", n, k), bias=None)
            continue
        rows, scale = quantised
        weight, weight_scale = _packed_weight(build, row.dtype, n, k)
        if not _is_old_sglang(row):
            _quantise(build, row, x, rows, scale)
        if row.dtype == "nvfp4":
            build.call(
                "aten._scaled_mm.default", out, self=rows, mat2=weight, scale_a=scale, scale_b=weight_scale, bias=None
            )
        else:
            build.call(
                "fxroof.linear_scaled.default",
                out,
                x=rows,
                x_scale=scale,
                weight=weight,
                weight_scale=weight_scale,
                bias=None,
                kernel="",
            )
    return Timed(graph=build.graph(), repeated=copies)


def _copies(row: Measured, gpu: Gpu) -> tuple[int, bool]:
    """How many layers run in turn, and whether each has an input of its own."""
    if row.backend == "trtllm":
        weight = row["n"] * row["k"] * _WEIGHT_BITS[row.dtype] // 8
        return max(1, min(5, ceil((gpu.cache_bytes or 0) / weight))), False
    if _is_old_sglang(row):
        return 1, False
    return 6, row.backend == "sglang"


def _is_old_sglang(row: Measured) -> bool:
    """Whether one product ran again and again, on operands quantised before."""
    return row.backend == "sglang" and row.version.startswith("0.5.6")


def _quantise(build: Builder, row: Measured, x: TensorRef, rows: TensorRef, scale: TensorRef) -> None:
    if (row.backend, row.dtype) == ("trtllm", "fp8"):  # finds the scale of the whole input first: clear, find, combine
        build.one_kernel((), (), (), scale)
        build.one_kernel((x,), (), (), scale, flops=2.0 * row["m"] * row["k"])
        build.one_kernel((scale,), (), (), scale)
    build.call("fxroof.quantize_activations.default", rows, scale, x=x, scale=None, kernel="")


def _quantised(build: Builder, dtype: str, m: int, k: int) -> tuple[TensorRef, TensorRef] | None:
    match dtype:
        case "fp8":
            return build.made(FP8, m, k), build.made("float32", 1)
        case "fp8_block":
            return build.made(FP8, m, k), build.made("float32", m, ceil(k / _BLOCK))
        case "nvfp4":
            return build.made(FP4, m, k // 2), build.made(FP8, m, ceil(k / _FP4_GROUP))
        case _:
            return None


def _packed_weight(build: Builder, dtype: str, n: int, k: int) -> tuple[TensorRef, TensorRef]:
    match dtype:
        case "fp8":
            return build.weight(FP8, n, k), build.weight("float32", 1)
        case "fp8_block":
            return build.weight(FP8, n, k), build.weight("float32", ceil(n / _BLOCK), ceil(k / _BLOCK))
        case _:
            return build.weight(FP4, k // 2, n), build.weight(FP8, n, ceil(k / _FP4_GROUP))


_STORED = {"bfloat16": "bfloat16", "float16": "bfloat16", "fp8": FP8}
_QUERIES_IN_FP8 = ("fa3", "vllm_flash_attn")
_MIMO = (192, 128)
"""Key and value sizes of MiMo-V2, the only model with keys of 192; in SGLang's tables its values are narrower."""

_CACHE_WRITTEN_BEFORE = {("vllm", "0.22.0")}
"""Versions whose `forward` leaves the cache to another call, and whose collector made none."""

_CHUNK = 8192
"""A window of Llama 4, whose tokens see their own chunk of that length and nothing before it."""


def prefill_attention(row: Measured, gpu: Gpu) -> Timed:
    """Keys and values go to the cache, then causal attention over the prompts."""
    return _attention(row, gpu, row["isl"], row["isl"], causal=True)


def decode_attention(row: Measured, gpu: Gpu) -> Timed:
    """The new token's key and value go to the cache, then attention over it."""
    seen = row["step"] + (row.backend != "vllm")  # vLLM's collector counts the new token in
    return _attention(row, gpu, 1, max(seen, 1), causal=False)


def _attention(row: Measured, gpu: Gpu, new: int, seen: int, *, causal: bool) -> Timed:
    """A kernel that writes the cache, in TensorRT-LLM one that rotates queries and keys too, and one that attends."""
    batch, heads, kv_heads, size = (row[c] for c in ("batch_size", "num_heads", "num_key_value_heads", "head_dim"))
    value_size = _MIMO[1] if row.backend == "sglang" and size == _MIMO[0] else size
    stored = _STORED[str(row.shape["kv_cache_dtype"])]
    # with an 8-bit cache FlashAttention 3 gets 8-bit queries, and kernels on Blackwell make their queries so
    narrow = stored == FP8 and (row.kernel.startswith(_QUERIES_IN_FP8) or (gpu.compute_capability or (0, 0)) >= (10, 0))
    asked = FP8 if narrow or row.shape["attn_dtype"] == "fp8" else "bfloat16"
    build = Builder()
    key, value = (build.cache(stored, batch, seen, kv_heads, width) for width in (size, value_size))
    fresh = build.given("bfloat16", batch, new, kv_heads, size + value_size)
    written = [batch * new * kv_heads * width * ITEM_BITS[stored] // 8 for width in (size, value_size)]
    if row.backend == "trtllm":
        raw, query = build.given("bfloat16", batch, new, heads, size), build.made(asked, batch, new, heads, size)
        turned = 3.0 * batch * new * (heads + kv_heads) * size
        build.one_kernel((fresh, raw), (key, value), tuple(written), query, flops=turned)
    else:
        query = build.given(asked, batch, new, heads, size)
        if (row.backend, row.version) not in _CACHE_WRITTEN_BEFORE:
            build.one_kernel((fresh,), (key, value), tuple(written))
    out = build.made("bfloat16", batch, new, heads, value_size)
    window = row["window_size"]
    if causal and window == _CHUNK < new:
        whole, rest = divmod(new, _CHUNK)
        pairs = batch * heads * (whole * _CHUNK * (_CHUNK + 1) + rest * (rest + 1)) // 2
        call = {"query": query, "key": key, "value": value}
        build.call("higher_order.flex_attention", out, **call, pairs=pairs, keys=1.0, evaluated=True, others=())
        return Timed(graph=build.graph())
    build.call(
        "aten._flash_attention_forward.default",
        out,
        query=query,
        key=key,
        value=value,
        is_causal=causal,
        window_size_left=window - 1 if window else -1,
        window_size_right=0 if window else -1,
    )
    return Timed(graph=build.graph())


_LATENT, _ROTARY, _NOPE, _HEAD = 512, 64, 128, 128


def mla_prefill(row: Measured, gpu: Gpu) -> Timed:
    """Attention over prompts of DeepSeek's latent attention as they are written out: keys of 192, values of 128."""
    batch, length, heads = row["batch_size"], row["isl"], row["num_heads"]
    asked = _STORED[str(row.shape["kv_cache_dtype"])]  # the least: with an 8-bit cache products in 8 bits
    build = Builder()
    query, key = (build.given(asked, batch, length, heads, _NOPE + _ROTARY) for _ in range(2))
    value, out = build.given(asked, batch, length, heads, _HEAD), build.made("bfloat16", batch, length, heads, _HEAD)
    build.call("aten._flash_attention_forward.default", out, query=query, key=key, value=value, is_causal=True)
    return Timed(graph=build.graph(), likely=_likely_mla_prefill(row, gpu))


def _likely_mla_prefill(row: Measured, gpu: Gpu) -> Graph:
    """The cache is written; FlashAttention 3 in SGLang attends to it, others quantise first on parts of 8 bits."""
    batch, length, heads = row["batch_size"], row["isl"], row["num_heads"]
    stored = _STORED[str(row.shape["kv_cache_dtype"])]
    asked = stored if gpu.tensor.get("float8") else "bfloat16"
    build = Builder()
    cache = _write_latents(build, row, length)
    if _attends_to_latents(row):
        _attend_to_latents(build, row, cache, length)
        return build.graph()
    sizes = (_NOPE + _ROTARY, _NOPE + _ROTARY, _HEAD)
    if asked == FP8:
        narrow, scale = build.made(FP8, batch, length, heads, sum(sizes)), build.made("float32", batch, length, 1)
        whole = build.given("bfloat16", batch, length, heads, sum(sizes))
        build.call("fxroof.quantize_activations.default", narrow, scale, x=whole, scale=None, kernel="")
        query, key, value = (build.view(narrow, FP8, batch, length, heads, size) for size in sizes)
    else:
        query, key, value = (build.given("bfloat16", batch, length, heads, size) for size in sizes)
    out = build.made("bfloat16", batch, length, heads, _HEAD)
    build.call("aten._flash_attention_forward.default", out, query=query, key=key, value=value, is_causal=True)
    return build.graph()


def mla_decode(row: Measured, gpu: Gpu) -> Timed:
    """A new token a sequence over latents that all heads share, and whose first 512 of 576 are the values."""
    batch, heads = row["batch_size"], row["num_heads"]
    stored = _STORED[str(row.shape["kv_cache_dtype"])]
    build = Builder()
    query = build.given(stored, batch, 1, heads, _LATENT + _ROTARY)  # 8-bit kernels multiply in 8 bits
    key = build.cache(stored, batch, max(row["step"], 1), 1, _LATENT + _ROTARY)
    value = build.view(key, stored, batch, max(row["step"], 1), 1, _LATENT)
    out = build.made("bfloat16", batch, 1, heads, _LATENT)
    build.call("aten._flash_attention_forward.default", out, query=query, key=key, value=value, is_causal=False)
    likely = Builder()
    _attend_to_latents(likely, row, _write_latents(likely, row, 1), 1)
    return Timed(graph=build.graph(), likely=likely.graph())


def _write_latents(build: Builder, row: Measured, new: int) -> TensorRef:
    """The cache, and the kernel that writes the latents of new tokens to it."""
    batch, width = row["batch_size"], _LATENT + _ROTARY
    stored = _STORED[str(row.shape["kv_cache_dtype"])]
    cache = build.cache(stored, batch, max(row["step"], new), 1, width)
    fresh = build.given("bfloat16", batch, new, width)
    build.one_kernel((fresh,), (cache,), (batch * new * width * ITEM_BITS[stored] // 8,))
    return cache


def _attends_to_latents(row: Measured) -> bool:
    return row.kernel == "flash_attention"


def _attend_to_latents(build: Builder, row: Measured, cache: TensorRef, new: int) -> None:
    batch, heads, width = row["batch_size"], row["num_heads"], _LATENT + _ROTARY
    stored, seen = _STORED[str(row.shape["kv_cache_dtype"])], max(row["step"], new)
    if stored == FP8 and _attends_to_latents(row):  # FlashAttention 3 has no such kernel: all of it is widened
        wide = build.made("bfloat16", batch, seen, 1, width)
        build.one_kernel((cache,), (), (), wide)
        cache, stored = wide, "bfloat16"
    query, out = build.given(stored, batch, new, heads, width), build.made("bfloat16", batch, new, heads, _LATENT)
    value = build.view(cache, stored, batch, seen, 1, _LATENT)
    build.call("aten._flash_attention_forward.default", out, query=query, key=cache, value=value, is_causal=new > 1)


def moe(row: Measured, gpu: Gpu) -> Timed:
    """Experts' two products with their activation between them, and the sum over the experts of a token.

    The first product reads tokens where they are; of `moe_ep_size` GPUs this is one, with an even share of the rows.
    """
    tokens, width, top, experts = (row[c] for c in ("num_tokens", "hidden_size", "topk", "num_experts"))
    inner, ranks = row["inter_size"] // row["moe_tp_size"], row["moe_ep_size"]
    own, rows = max(experts // ranks, 1), tokens * top
    here = ceil(rows / ranks)
    gated = (width, row["inter_size"]) not in _NON_GATED
    build = Builder()
    x = build.given("bfloat16", rows, width, nbytes=2 * tokens * width)
    ends = build.given("int32", own)
    up, active = (build.made("bfloat16", rows, columns) for columns in (inner * (1 + gated), inner))
    down, out = build.made("bfloat16", rows, width), build.made("bfloat16", min(tokens, here), width)
    _experts(build, row.dtype, up, x, own, inner * (1 + gated), width, ends)
    made = 2 * here * inner
    work = {"special": made / 2, "flops": 2.0 * made} if gated else {"flops": float(made)}
    build.one_kernel((up,), (active,), (made,), read=(made * (1 + gated),), **work)
    _experts(build, row.dtype, down, active, own, width, inner, ends)
    build.one_kernel((down,), (), (), out, read=(2 * here * width,), flops=float(here * width))
    return Timed(graph=build.graph(expert_ranks=ranks), likely=_sorted_experts(row, inner, gated=gated))


_IN_PLACE = ("triton", "marlin", "vllm_fused_moe")
"""Words of kernels that read tokens where they are, and keep a row for each expert of a token, also of other GPUs."""

_ROUTED_BEFORE = {("vllm", "0.14.0"), ("vllm", "0.19.0"), ("vllm", "0.22.0"), ("sglang", "0.5.10")}
"""Versions whose collectors chose experts outside the time; SGLang's did so with several GPUs alone."""


def _sorted_experts(row: Measured, inner: int, *, gated: bool) -> Graph:
    """What was timed: the load that the collector made up, and the kernels that sort rows by expert."""
    tokens, width, top, experts = (row[c] for c in ("num_tokens", "hidden_size", "topk", "num_experts"))
    load = load_of(tokens, top, experts, row["moe_ep_size"], str(row.shape["distribution"]))
    in_place = any(word in row.kernel for word in _IN_PLACE)
    rows, kept, several = load.rows, load.rows, row["moe_ep_size"] > 1
    if in_place:
        kept = tokens * top
        if (row.backend, row.version) == ("sglang", "0.5.10") and several:
            # tokens of this GPU alone; their rows that meet experts of others were sent to its first expert
            tokens, rows, kept = load.tokens, load.tokens * top, load.tokens * top
    dtype, columns = _run_as(row), inner * (1 + gated)
    build = Builder()
    x, out = build.given("bfloat16", tokens, width), build.made("bfloat16", tokens, width)
    ids, order, ends = (build.made("int32", *size) for size in ((tokens, top), (rows,), (load.experts,)))
    if (row.backend, row.version) not in _ROUTED_BEFORE or (row.backend == "sglang" and not several):
        build.one_kernel((build.given("float32", tokens, experts),), (), (), ids)
    build.one_kernel((ids,), (), (), ends)
    build.one_kernel((ids, ends), (), (), order)
    if in_place:
        first = build.given("bfloat16", rows, width, nbytes=2 * min(rows, tokens) * width)
    else:
        first = build.made("bfloat16", rows, width)
        build.one_kernel((x, order), (), (), first)
    quantised = dtype in ("fp8", "fp8_block") and in_place
    if quantised:
        _quantise_rows(build, x, tokens, width)
    up, active, down = (build.made("bfloat16", kept, size) for size in (columns, inner, width))
    _experts(build, dtype, build.view(up, "bfloat16", rows, columns), first, load.experts, columns, width, ends)
    made = kept * inner
    work = {"special": float(made), "flops": 4.0 * made} if gated else {"flops": 2.0 * made}
    zeros = 2 * (kept - rows)  # bytes of a column of the rows that other GPUs compute: here they are cleared
    build.one_kernel((up,), (up, active), (zeros * columns, 2 * made), **work)
    if quantised:
        _quantise_rows(build, active, kept, inner)
    some = build.view(active, "bfloat16", rows, inner)
    _experts(build, dtype, build.view(down, "bfloat16", rows, width), some, load.experts, width, inner, ends)
    build.one_kernel((down,), (down,), (zeros * width,), out, flops=float(kept * width))
    return build.graph(tokens=1)


_SAMPLES = 4
"""Collectors time five draws of a power law, and say nothing of their seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the GPU that was timed has of all rows of experts, by the routing that collectors made up.

    Read from `collector/helper.py` of the repository in docs/silicon.md: experts in turn (`balanced`), or as many rows
    each as a sample of a power law says, where the GPU with most rows is the one that is timed.

    Attributes:
        rows: of a token and an expert, that meet one of its experts.
        experts: of its own that have any.
        tokens: that have any of its experts.
    """

    rows: int
    experts: int
    tokens: int


@functools.cache
def load_of(tokens: int, top: int, experts: int, gpus: int, distribution: str) -> Load:
    """The load of a row of the tables; the mean of some draws where it is drawn."""
    if distribution == "balanced":
        return _balanced(tokens, top, experts, experts // gpus)
    exponent = float(distribution.rpartition("_")[2])
    drawn = random.Random(0)  # noqa: S311  # no secret
    loads = [_busiest(_counts(drawn, tokens, top, experts, gpus, exponent), tokens, gpus) for _ in range(_SAMPLES)]
    return Load(
        rows=max(1, round(fmean(one.rows for one in loads))),
        experts=max(1, round(fmean(one.experts for one in loads))),
        tokens=max(1, round(fmean(one.tokens for one in loads))),
    )


def _balanced(tokens: int, top: int, experts: int, own: int) -> Load:
    stride = ceil(experts / top)
    period = min(tokens, experts)  # tokens choose alike again after so many
    apart = 1.0 if tokens >= stride else stride / tokens
    rows = have = 0
    seen: set[int] = set()
    for token in range(period):
        chosen = {int(token * apart + k * stride) % experts for k in range(top)}
        here = [expert for expert in chosen if expert < own]
        times = len(range(token, tokens, experts))
        rows += times * len(here)
        have += times * bool(here)
        seen.update(here)
    return Load(rows=max(rows, 1), experts=max(len(seen), 1), tokens=max(have, 1))


def _counts(drawn: random.Random, tokens: int, top: int, experts: int, gpus: int, exponent: float) -> list[int]:
    """Rows of each expert, as `_generate_power_law_distribution` has them."""
    low, high = (1.0, tokens * 0.8) if tokens * top > experts else (0.01, 2.0)
    a, b = low ** (1 - exponent), high ** (1 - exponent)
    sizes = [((b - a) * drawn.random() + a) ** (1 / (1 - exponent)) for _ in range(experts)]
    scale = tokens * top / sum(sizes)
    counts = [min(tokens, round(size * scale)) for size in sizes]
    left = tokens * top - sum(counts)
    step = 1 if left > 0 else -1
    own, first = experts // gpus, 0
    while left:  # one GPU after the other: to the expert that has fewest, from the one that has most
        mine = range(first, first + own)
        chosen = min(mine, key=counts.__getitem__) if left > 0 else max(mine, key=counts.__getitem__)
        if 0 <= counts[chosen] + step <= tokens:
            counts[chosen] += step
            left -= step
        first = (first + own) % (own * gpus)
    return counts


def _busiest(counts: list[int], tokens: int, gpus: int) -> Load:
    own = len(counts) // gpus
    start = max(range(0, own * gpus, own), key=lambda first: sum(counts[first : first + own]))
    mine = range(start, start + own)
    # tokens are given their experts column by column, in the order of the experts' counts
    spans: list[tuple[int, int]] = []
    at = 0
    for expert in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
        if expert in mine and counts[expert]:
            first, last = at % tokens, at % tokens + counts[expert]
            spans += [(first, min(last, tokens)), (0, last - tokens)] if last > tokens else [(first, last)]
        at += counts[expert]
    covered = reach = 0
    for first, last in sorted(spans):
        covered += max(0, last - max(first, reach))
        reach = max(reach, last)
    own_counts = counts[start : start + own]
    return Load(rows=sum(own_counts), experts=sum(count > 0 for count in own_counts), tokens=covered)


def _run_as(row: Measured) -> str:
    """The format that kernels read: where SGLang runs mxfp4 in Triton it widens the weights once and for all."""
    widened = row.dtype == "w4a16_mxfp4" and row.kernel.startswith("sglang_fused_moe_triton")
    return "bfloat16" if widened else row.dtype


def _quantise_rows(build: Builder, x: TensorRef, rows: int, width: int) -> None:
    narrow, scale = build.made(FP8, rows, width), build.made("float32", rows, 1)
    build.call("fxroof.quantize_activations.default", narrow, scale, x=x, scale=None, kernel="")


def _experts(
    build: Builder, dtype: str, out: TensorRef, x: TensorRef, experts: int, n: int, k: int, ends: TensorRef
) -> None:
    match dtype:
        case "bfloat16":
            build.call("aten._grouped_mm.default", out, self=x, mat2=build.weight("bfloat16", experts, k, n), offs=ends)
            return
        case "fp8" | "fp8_block":
            blocks = (ceil(n / _BLOCK), ceil(k / _BLOCK)) if dtype == "fp8_block" else (1, 1)
            weight, scales = build.weight(FP8, experts, n, k), build.weight("float32", experts, *blocks)
        case "int4_wo" | "w4a16_mxfp4":
            weight, scales = build.weight("uint8", experts, n, k // 2), build.weight("uint8", experts, n, ceil(k / 32))
        case _:
            raise NotPricedError(f"experts in {dtype}: fxroof has no op for them")
    build.call("fxroof.grouped_linear.default", out, x=x, weight=weight, scales=scales, zeros=None, ends=ends)


_NON_GATED = frozenset({(2688, 1856), (1024, 2688), (4096, 2688), (2048, 5120), (8192, 5120)})
"""Hidden and inner sizes of Nemotron 3, whose experts square a ReLU where others gate."""


def all_reduce(row: Measured, gpu: Gpu) -> Timed:
    """The sum of a tensor of every GPU."""
    if row.kernel.endswith("eager"):
        raise NotPricedError("launched by the host one by one")
    build = Builder()
    x = build.given("int8" if row.dtype == "int8" else "bfloat16", row["message_size"])
    build.call("fxroof.all_reduce.default", x=x, gpus=row["num_gpus"], mutates=("x",))
    return Timed(graph=build.graph())


BUILDERS: Mapping[str, Callable[[Measured, Gpu], Timed]] = {
    "gemm": gemm,
    "prefill attention": prefill_attention,
    "decode attention": decode_attention,
    "mla prefill": mla_prefill,
    "mla decode": mla_decode,
    "moe": moe,
    "all-reduce": all_reduce,
}
