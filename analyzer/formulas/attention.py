"""Scaled dot product attention: which kernel PyTorch picks on a GPU, and what that kernel costs.

Shapes: query (B, Hq, S, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), scores (B, Hq, S, T),
output (B, Hq, S, Dv).

The rules of the choice are those of torch 2.13 in inference, with the cuDNN that its CUDA 13 wheels bring
(9.20): `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` and `sdp_utils_cpp.h`. They were read, not run:
no GPU was at hand. Switches of the user (`sdpa_kernel`, environment variables) and nested tensors are not
modelled.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Literal

from ...hardware.gpu import Gpu
from ..cost import Call, Cost, formula, unpriced
from ..graph import Tensor

BackendName = Literal["cudnn", "flash", "efficient", "math"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The arguments of one call that decide which kernel runs and what it touches.

    Attributes:
        query: (B, Hq, S, D); fused kernels need these four dimensions, the math path any number.
        key: (B, Hkv, T, D).
        value: (B, Hkv, T, Dv).
        mask: boolean or additive, broadcastable to (B, Hq, S, T).
        causal: the `is_causal` argument: query i sees the keys 0 to i, whatever S and T (top-left aligned).
        gqa: the `enable_gqa` argument.
        dropout: probability.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    gqa: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernel family that runs, and why those asked before it refused; empty for a first choice."""

    name: BackendName
    reason: str = ""


def choose_backend(attention: Attention, gpu: Gpu) -> Backend:
    """The kernel that `scaled_dot_product_attention` picks on a GPU in inference.

    NVIDIA: cuDNN first on SM 9.0, 10.0 and 10.3, then flash, then memory-efficient, then math. AMD:
    AOTriton's flash and memory-efficient kernels from CDNA 2 and RDNA 3 on, else math. Apple: a fused
    vector kernel for at most 8 queries, else an unfused graph. Elsewhere a fused kernel is assumed.
    """
    match gpu.vendor:
        case "nvidia":
            if gpu.compute_capability is None:
                chosen = _choose_nvidia(attention, _UNKNOWN_CAPABILITY)
                return Backend(chosen.name, "; ".join(filter(None, ("taken for SM 10.0", chosen.reason))))
            return _choose_nvidia(attention, gpu.compute_capability)
        case "amd":
            return _choose_amd(attention, gpu.architecture)
        case "apple":
            return _first_willing([("flash", _metal_vector_refusal(attention))])
        case _:
            return Backend("flash", f"assumed: a fused kernel on {gpu.name}, whose rules are not modelled")


def is_fused_somewhere(attention: Attention) -> bool:
    """True when a current datacentre GPU (NVIDIA SM 9.0) runs the call as one fused kernel."""
    return _choose_nvidia(attention, _REFERENCE_CAPABILITY).name != "math"


def traced_output_stride(attention: Attention) -> tuple[int, ...]:
    """Strides of the output on a current datacentre GPU (NVIDIA SM 9.0), for a trace that knows no GPU."""
    backend = _choose_nvidia(attention, _REFERENCE_CAPABILITY)
    query = attention.query
    return output_stride(backend.name, query.shape, query.stride, attention.value.shape[-1])


def output_stride(
    backend: str, query_shape: tuple[int, ...], query_stride: tuple[int, ...], value_dim: int
) -> tuple[int, ...]:
    """Strides, in elements, of the output that a backend returns.

    - math: contiguous (B, H, S, Dv);
    - efficient: memory of (B, S, H, Dv), whatever the query's layout;
    - flash: as the query's layout; a head_dim that 8 does not divide is padded in a contiguous copy first,
      and the output is a slice of the padded one;
    - cuDNN: as the query's layout, the dimensions in the order of its strides.

    So the output is token-major, and `transpose(1, 2).reshape(B, S, H * Dv)` free, when the query is.
    """
    shape = (*query_shape[:-1], value_dim)
    if backend == "math":
        return _contiguous_stride(shape)
    if backend == "efficient":
        _, heads, queries, _ = shape
        return (queries * heads * value_dim, value_dim, heads * value_dim, 1)
    if backend == "flash" and value_dim % _FLASH_ALIGNMENT:
        return _contiguous_stride((*query_shape[:-1], _round_up(value_dim, _FLASH_ALIGNMENT)))
    if shape == query_shape:
        return _dense_stride(query_shape, query_stride)
    order = sorted(range(len(shape)), key=lambda dim: query_stride[dim])
    return _stride_in_order(shape, order)


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of an op that launches several: the tensors it reads and those it writes.

    Buffers that the op allocates for itself are tensors of storage `SCRATCH`, its result is of storage
    `RESULT`.
    """

    name: str
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of distinct memory read."""
        return sum(tensor.touched_bytes for tensor in self.reads)

    @property
    def bytes_written(self) -> int:
        """Bytes written."""
        return sum(tensor.touched_bytes for tensor in self.writes)


SCRATCH = -1
RESULT = -2


def math_steps(attention: Attention, *, converts_mask: bool = True) -> tuple[Step, ...]:
    """The kernels of the math path in torch 2.13, with no gradients, in order.

    With c the dtype computed in, float32 for 16-bit inputs (unless the user allows 16-bit reductions there):

    | kernel                | when                   | reads                     | writes                    |
    |-----------------------|------------------------|---------------------------|---------------------------|
    | mask to float         | bool mask, `F.sdpa`    | mask                      | mask, query dtype         |
    | cast query, key, value| 16-bit                 | each                      | each, c                   |
    | scale query           | always                 | query, c                  | query, c                  |
    | causal mask: 3        | is_causal              | ones; tril                | ones; tril (bool); mask, c|
    | repeat key, value     | enable_gqa, Hkv != Hq  | each, c                   | each with Hq heads, c     |
    | scale key             | always                 | key, c                    | key, c                    |
    | copy query, key       | (B, H) not one stride  | each, c                   | each, contiguous, c       |
    | query x key           | always                 | query, key, c             | scores, c                 |
    | add mask              | any mask               | scores, mask              | scores                    |
    | softmax               | always                 | scores                    | probabilities, c          |
    | masked: 2             | always                 | scores; bool scores       | bool scores; bool rows    |
    | zero masked rows      | always                 | bool rows, probabilities  | probabilities             |
    | dropout               | dropout_p > 0          | probabilities             | probabilities, kept (bool)|
    | cast probabilities    | 16-bit                 | probabilities, c          | probabilities, query dtype|
    | copy value            | (B, H) not one stride  | value, c                  | value, contiguous, c      |
    | probabilities x value | always                 | probabilities, value, c   | output, c                 |
    | cast output           | 16-bit                 | output, c                 | output                    |

    The square root of the scale goes on the query and on the key. The cast probabilities are a second result
    that `F.sdpa` drops. The copies are those of `matmul`, which folds all batch dimensions into one: a
    token-major query (B, S, H, D memory) with B > 1, or heads that were expanded, are copied.

    Args:
        attention: the call; query, key and value of equal rank.
        converts_mask: true for `F.sdpa`, which makes a boolean mask additive before it calls the math path.
    """
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    given = query.dtype
    computed = "float32" if given in _HALF else given
    kernels = _Kernels()
    if mask is not None and mask.dtype == "bool" and converts_mask:
        mask = kernels.copy("mask to float", mask, given)
    if computed != given:
        query = kernels.copy("cast query", query, computed)
        key = kernels.copy("cast key", key, computed)
        value = kernels.copy("cast value", value, computed)
    query = kernels.copy("scale query", query)
    if attention.causal:
        mask = kernels.causal_mask(query.shape[-2], key.shape[-2], computed)
    if attention.gqa:
        key, value = _repeat_heads(kernels, attention, key, value)
    key = kernels.copy("scale key", _transpose(key, -2, -1))
    probabilities = kernels.softmax(kernels.matmul("query x key", query, key), mask)
    if attention.dropout > 0:
        kept = _scratch(probabilities.shape, "bool")
        kernels.run("dropout", (probabilities,), probabilities, kept)
    if computed != given:
        kernels.copy("cast probabilities", probabilities, given)
    output = kernels.matmul("probabilities x value", probabilities, value)
    if computed != given:
        kernels.copy("cast output", output, given)
    return kernels.to_result()


def fused_steps(attention: Attention, backend: BackendName) -> tuple[Step, ...]:
    """The kernels of a fused backend on NVIDIA and AMD: what `F.sdpa` prepares, then the kernel itself.

    A boolean mask becomes an additive one of the query's dtype, at the mask's own size. The memory-efficient
    kernel wants a mask whose strides are multiples of 8 and gets a padded copy else; flash wants a head_dim
    that is a multiple of 8 and gets padded copies of query, key and value else.

    A causal kernel never reads keys past the last query. Scores stay on chip. Logsumexp, which flash writes
    even in inference (4 bytes a query and head), is left out.
    """
    kernels = _Kernels()
    mask = attention.mask
    if mask is not None and mask.dtype == "bool":
        mask = kernels.copy("mask to float", mask, attention.query.dtype)
    if mask is not None and backend == "efficient" and not _aligned(mask, _MASK_ALIGNMENT):
        mask = kernels.pad("pad mask", mask, _MASK_ALIGNMENT)
    query, key, value = attention.query, attention.key, attention.value
    if backend == "flash" and query.shape[-1] % _FLASH_ALIGNMENT:
        query = kernels.pad("pad query", query, _FLASH_ALIGNMENT)
        key = kernels.pad("pad key", key, _FLASH_ALIGNMENT)
        value = kernels.pad("pad value", value, _FLASH_ALIGNMENT)
    seen = _band(attention).keys_read(query.shape[-2], key.shape[-2])
    operands = (query, _rows(key, seen), _rows(value, seen))
    reads = operands if mask is None else (*operands, mask)
    kernels.run("attention", reads, _scratch(_output_shape(attention), attention.query.dtype))
    return kernels.to_result()


def metal_steps(attention: Attention, backend: BackendName) -> tuple[Step, ...]:
    """The kernels on Apple's GPUs: repeated heads, contiguous copies for the vector kernel, then attention.

    The graph that runs for more than 8 queries is taken to write the scores once and to read them once, in
    the query's dtype: less than what it does if Metal fuses nothing.
    """
    kernels = _Kernels()
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    if mask is not None and mask.dtype == "bool":
        mask = kernels.copy("mask to float", mask, query.dtype)
    if attention.gqa:
        key, value = _repeat_heads(kernels, attention, key, value)
    masks = () if mask is None else (mask,)
    if backend == "math":
        batch = _broadcast(query.shape[:-2], key.shape[:-2])
        scores = _scratch((*batch, query.shape[-2], key.shape[-2]), query.dtype)
        kernels.run("query x key", (query, key, *masks), scores)
        kernels.run("probabilities x value", (scores, value), _scratch(_output_shape(attention), query.dtype))
    else:
        key, value = (
            t if t.stride == _contiguous_stride(t.shape) else kernels.contiguous(f"copy {name}", t)
            for name, t in (("key", key), ("value", value))
        )
        kernels.run("attention", (query, key, value, *masks), _scratch(_output_shape(attention), query.dtype))
    return kernels.to_result()


def executed_pairs(queries: int, keys: int, *, left: int | None = None, right: int | None = None) -> int:
    """(query, key) pairs with i - left <= j <= i + right; None is no limit.

    A causal mask aligned top-left has right = 0; aligned bottom-right, right = keys - queries. A kernel that
    skips whole tiles executes more pairs, never fewer.
    """
    upto = queries * keys if right is None else _ramp(queries, keys, right + 1)
    return upto - (0 if left is None else _ramp(queries, keys, -left))


@formula("aten.scaled_dot_product_attention")
def scaled_dot_product_attention(call: Call) -> Cost:
    """Attention by the kernel that the GPU would pick: `choose_backend`, `math_steps`, `fused_steps`."""
    attention = _attention(call, mask="attn_mask")
    backend = choose_backend(attention, call.gpu)
    if call.gpu.vendor == "apple":
        steps = metal_steps(attention, backend.name)
    elif backend.name == "math":
        steps = math_steps(attention)
    else:
        steps = fused_steps(attention, backend.name)
    if backend.name == "math":
        return _math_cost(call, attention, steps, backend)
    return _fused_cost(call, attention, steps, backend, _band(attention))


@formula("aten._scaled_dot_product_attention_math", "aten._scaled_dot_product_attention_math_for_mps")
def math_attention(call: Call) -> Cost:
    """The math path asked for by name: it returns the probabilities too and takes a boolean mask as it is."""
    attention = _attention(call, mask="attn_mask")
    on_apple = call.gpu.vendor == "apple"
    steps = metal_steps(attention, "math") if on_apple else math_steps(attention, converts_mask=False)
    cost = _math_cost(call, attention, steps, Backend("math", "asked for by name"))
    returned = sum(tensor.touched_bytes for tensor in call.outputs[1:])
    return replace(cost, scratch_written=max(0, cost.scratch_written - returned))


@formula("aten._scaled_dot_product_flash_attention")
def flash_attention(call: Call) -> Cost:
    """The flash kernel asked for by name; its causal mask is aligned bottom-right, unlike `F.sdpa`'s."""
    attention = _attention(call, mask=None)
    return _named(call, attention, "flash", _bottom_right(attention) if attention.causal else _Band())


@formula("aten._scaled_dot_product_cudnn_attention")
def cudnn_attention(call: Call) -> Cost:
    """The cuDNN kernel asked for by name."""
    attention = _attention(call, mask="attn_bias")
    return _named(call, attention, "cudnn", _band(attention))


@formula("aten._scaled_dot_product_efficient_attention")
def efficient_attention(call: Call) -> Cost:
    """The memory-efficient kernel asked for by name."""
    attention = _attention(call, mask="attn_bias")
    return _named(call, attention, "efficient", _band(attention))


@formula("aten._scaled_dot_product_flash_attention_for_cpu")
def flash_attention_for_cpu(call: Call) -> Cost:
    """The CPU's flash kernel, which takes a mask; priced as one fused kernel on the GPU asked about."""
    attention = _attention(call, mask="attn_mask")
    return _named(call, attention, "flash", _band(attention))


@formula("aten._scaled_dot_product_fused_attention_overrideable")
def overrideable_attention(call: Call) -> Cost:
    """The fused kernel of an out-of-tree device."""
    attention = _attention(call, mask="attn_bias")
    return _named(call, attention, "flash", _band(attention))


@formula("aten._flash_attention_forward")
def flash_attention_forward(call: Call) -> Cost:
    """Flash over (B, S, H, D), with an optional window of keys.

    Packed and paged batches depend on data: unpriced.
    """
    if any(call.optional(name) for name in ("cum_seq_q", "cum_seq_k", "seqused_k", "block_table")):
        return unpriced(call)
    attention = _attention(call, mask=None, token_major=True)
    offset = attention.key.shape[-2] - attention.query.shape[-2]
    left, right = call.integer("window_size_left", -1), call.integer("window_size_right", -1)
    if attention.causal:
        right = 0
    band = _Band(left=left - offset if left >= 0 else None, right=right + offset if right >= 0 else None)
    return _named(call, attention, "flash", band)


@formula("aten._efficient_attention_forward")
def efficient_attention_forward(call: Call) -> Cost:
    """Memory-efficient over (B, S, H, D); packed batches and lengths depend on data: unpriced.

    `custom_mask_type` is 1 for causal aligned top-left, 2 for causal aligned bottom-right; `window_size` w
    hides the keys w and more before the last that the query sees.
    """
    if any(call.optional(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqlen_k")):
        return unpriced(call)
    attention = _attention(call, mask="bias", token_major=True)
    kind, window = call.integer("custom_mask_type", 0), call.integer("window_size", 0)
    band = _Band() if kind == 0 else _Band(right=0) if kind == 1 else _bottom_right(attention)
    if window > 0:
        band = _Band(left=window - 1 - (band.right or 0), right=band.right)
    return _named(call, attention, "efficient", band)


_HALF = ("float16", "bfloat16")
_FLASH_ALIGNMENT = 8
_MASK_ALIGNMENT = 8
_FLASH_HEAD_DIM = 256
_AOTRITON_HEAD_DIM = 512
_AOTRITON_ARCHITECTURES = ("CDNA2", "CDNA3", "CDNA4", "RDNA3", "RDNA4")
_METAL_QUERIES = 8
_METAL_HEAD_DIMS = (64, 96, 128)
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))
_FLASH_RANGE = ((8, 0), (12, 1))
_EFFICIENT_RANGE = ((5, 0), (12, 1))
_REFERENCE_CAPABILITY = (9, 0)
_UNKNOWN_CAPABILITY = (10, 0)

# CUTLASS multiplies float32 operands on tensor cores as three products of TF32 halves
_TF32_PRODUCTS = 3


@dataclass(frozen=True, slots=True)
class _Band:
    """Keys that a query sees: see `executed_pairs`."""

    left: int | None = None
    right: int | None = None

    def pairs(self, queries: int, keys: int) -> int:
        return executed_pairs(queries, keys, left=self.left, right=self.right)

    def keys_read(self, queries: int, keys: int) -> int:
        last = keys if self.right is None else _clamp(queries + self.right, keys)
        return last - (0 if self.left is None else _clamp(-self.left, keys))


def _band(attention: Attention) -> _Band:
    return _Band(right=0 if attention.causal else None)


def _bottom_right(attention: Attention) -> _Band:
    return _Band(right=attention.key.shape[-2] - attention.query.shape[-2])


def _attention(call: Call, *, mask: str | None, token_major: bool = False) -> Attention:
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    if token_major:
        query, key, value = (_transpose(tensor, 1, 2) for tensor in (query, key, value))
    dropout = call.arg("dropout_p", 0.0)
    return Attention(
        query=query,
        key=key,
        value=value,
        mask=call.optional(mask) if mask else None,
        causal=call.flag("is_causal"),
        gqa=call.flag("enable_gqa"),
        dropout=float(dropout) if isinstance(dropout, int | float) else 0.0,
    )


def _named(call: Call, attention: Attention, name: BackendName, band: _Band) -> Cost:
    # `F.sdpa` prepares operands; an op asked for by name gets them ready
    return _fused_cost(call, attention, (), Backend(name), band)


def _fused_cost(call: Call, attention: Attention, steps: tuple[Step, ...], backend: Backend, band: _Band) -> Cost:
    """Cost of one kernel that keeps scores on chip, after what was prepared for it.

    Matmul FLOPs: 2 * B * Hq * pairs * (D + Dv), over the pairs that the causal mask leaves; dense over S * T.
    Vector FLOPs: scale, maximum, subtraction and sum per pair, one addition for a mask, and the division of
    the output. Special: one exponential per pair. Traffic: query, key, value and mask once, so that KV heads
    shared by query heads count once, and the output.
    """
    query, key, value = attention.query, attention.key, attention.value
    queries, keys, value_dim = query.shape[-2], key.shape[-2], value.shape[-1]
    rows = prod(query.shape[:-2])
    pairs = rows * band.pairs(queries, keys)
    per_pair = 2 * (query.shape[-1] + value_dim)
    tf32 = _splits_float32(backend.name, query.dtype, call.gpu)
    dense = rows * queries * keys * per_pair
    executed = pairs * per_pair * (_TF32_PRODUCTS if tf32 else 1)
    cost = call.cost(
        matmul={query.dtype: executed},
        vector={"float32": pairs * (4 + (attention.mask is not None)) + rows * queries * value_dim},
        special=pairs,
        reads=_reads_in_band(attention, steps, band),
        scratch_read=_scratch_read(steps),
        scratch_written=_scratch_written(steps),
        dense_matmul=dense if dense != executed else None,
        tf32=tf32,
        backend=backend.name,
        note=backend.reason,
    )
    return _without_statistics(call, cost)


def _math_cost(call: Call, attention: Attention, steps: tuple[Step, ...], backend: Backend) -> Cost:
    """Cost of the unfused path: every pair is computed, causal or not, and scores go through memory.

    Matmul FLOPs: 2 * B * Hq * S * T * (D + Dv) in the dtype computed in. Vector FLOPs: the two scalings, and
    per pair maximum, subtraction, sum and division of the softmax, the test for minus infinity, the choice of
    zero, and the addition of a mask.
    """
    query, key = attention.query, attention.key
    queries, keys = query.shape[-2], key.shape[-2]
    heads = query.shape[:-2] if attention.gqa else _broadcast(query.shape[:-2], key.shape[:-2])
    rows = prod(heads)
    pairs = rows * queries * keys
    upcast = query.dtype in _HALF and call.gpu.vendor != "apple"
    computed = "float32" if upcast else query.dtype
    key_elements = prod((*(heads if attention.gqa else key.shape[:-2]), *key.shape[-2:]))
    masked = attention.causal or attention.mask is not None
    return call.cost(
        matmul={computed: pairs * 2 * (query.shape[-1] + attention.value.shape[-1])},
        vector={computed: query.numel + key_elements + pairs * (6 + masked)},
        special=pairs,
        scratch_read=_scratch_read(steps),
        scratch_written=_scratch_written(steps),
        backend=backend.name,
        note="; ".join(filter(None, (backend.reason, "computed in float32" if upcast else ""))),
    )


def _splits_float32(backend: BackendName, dtype: str, gpu: Gpu) -> bool:
    # gemm_kernel_utils.h of the memory-efficient kernel: OpMultiplyAddFastF32 from SM 8.0 on
    capability = gpu.compute_capability or _UNKNOWN_CAPABILITY
    return backend == "efficient" and dtype == "float32" and gpu.vendor == "nvidia" and capability >= (8, 0)


def _reads_in_band(attention: Attention, steps: tuple[Step, ...], band: _Band) -> dict[str, int]:
    """Bytes read of key and value, where the mask hides rows from every query and no copy is made first."""
    keys = attention.key.shape[-2]
    seen = band.keys_read(attention.query.shape[-2], keys)
    if seen == keys or any(step.name == "pad key" for step in steps):
        return {}
    return {
        "key": _rows(attention.key, seen).touched_bytes,
        "value": _rows(attention.value, seen).touched_bytes,
    }


def _scratch_read(steps: tuple[Step, ...]) -> int:
    return sum(t.touched_bytes for step in steps for t in step.reads if t.storage == SCRATCH)


def _scratch_written(steps: tuple[Step, ...]) -> int:
    return sum(t.touched_bytes for step in steps for t in step.writes if t.storage == SCRATCH)


def _without_statistics(call: Call, cost: Cost) -> Cost:
    """Leave out what fused ops return beside the output: logsumexp and random states, a few bytes a query."""
    others = set(call.op.outputs[1:])
    return replace(cost, traffic=tuple(access for access in cost.traffic if access.tensor not in others))


def _choose_nvidia(attention: Attention, capability: tuple[int, int]) -> Backend:
    candidates: list[tuple[BackendName, str | None]] = [
        ("flash", _flash_refusal(attention, capability)),
        ("efficient", _efficient_refusal(attention, capability)),
    ]
    if capability in _CUDNN_FIRST:
        candidates.insert(0, ("cudnn", _cudnn_refusal(attention, capability)))
    return _first_willing(candidates)


def _choose_amd(attention: Attention, architecture: str) -> Backend:
    supported = architecture.startswith(_AOTRITON_ARCHITECTURES)
    return _first_willing(
        [
            ("flash", _aotriton_flash_refusal(attention, supported)),
            ("efficient", _aotriton_efficient_refusal(attention, supported)),
        ]
    )


def _first_willing(candidates: list[tuple[BackendName, str | None]]) -> Backend:
    refusals: list[str] = []
    for name, refusal in candidates:
        if refusal is None:
            return Backend(name, "; ".join(refusals))
        refusals.append(f"{name}: {refusal}")
    return Backend("math", "; ".join(refusals))


def _first(conditions: Iterable[tuple[bool, str]]) -> str | None:
    return next((reason for holds, reason in conditions if holds), None)


def _cudnn_refusal(attention: Attention, capability: tuple[int, int]) -> str | None:
    """Why cuDNN refuses. 192 with values of 128 is DeepSeek's latent attention on SM 10.x."""
    query, key, value = attention.query, attention.key, attention.value
    dims = (query.shape[-1], value.shape[-1])
    latent = capability[0] == 10 and dims == (192, 128)
    limit = 256 if capability == (9, 0) else 192 if latent else 128
    return _refused_rank(attention) or _first(
        (
            _not_one_of(attention, _HALF),
            (not _mask_broadcasts(attention), "attn_mask of a shape that it does not take"),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=True),
            *_refused_heads(attention, gqa=True, same_heads=False),
            (max(dims) > limit, f"head_dim {max(dims)} over {limit}"),
            (any(dim % 8 for dim in dims), f"head_dim {_words(dims)} no multiple of 8"),
            (key.shape[-2] == 1, "a single key"),
            (attention.dropout > 0 and query.shape[-2] == 1, "dropout with a single query"),
        )
    )


def _flash_refusal(attention: Attention, capability: tuple[int, int]) -> str | None:
    return _refused_rank(attention) or _first(
        (
            (attention.mask is not None, "attn_mask given"),
            *_refused_flash_dims(attention, _FLASH_HEAD_DIM),
            _outside(capability, _FLASH_RANGE),
            _causal_rectangle(attention),
            _not_one_of(attention, _HALF if capability >= (8, 0) else _HALF[:1]),
            *_refused_heads(attention, gqa=True),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=True),
        )
    )


def _efficient_refusal(attention: Attention, capability: tuple[int, int]) -> str | None:
    query, key, value = attention.query, attention.key, attention.value
    alignment = _gemm_alignment(query.dtype, capability)
    dtypes = (*_HALF, "float32") if capability >= (8, 0) else ("float16", "float32")
    misplaced = capability >= (8, 0) and any(t.offset % alignment for t in (query, key, value) if t.numel)
    return _refused_rank(attention) or _first(
        (
            _outside(capability, _EFFICIENT_RANGE),
            *_refused_efficient_dims(attention, alignment),
            (misplaced, f"operands that do not begin at a multiple of {alignment} elements"),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=False),
            *_refused_heads(attention, gqa=False),
            _not_one_of(attention, dtypes),
        )
    )


def _aotriton_flash_refusal(attention: Attention, supported: bool) -> str | None:
    return _refused_rank(attention) or _first(
        (
            (attention.mask is not None, "attn_mask given"),
            *_refused_flash_dims(attention, _AOTRITON_HEAD_DIM),
            (not supported, "no AOTriton kernels for this architecture"),
            _causal_rectangle(attention),
            _not_one_of(attention, _HALF),
            *_refused_heads(attention, gqa=True),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=True),
        )
    )


def _aotriton_efficient_refusal(attention: Attention, supported: bool) -> str | None:
    query, mask = attention.query, attention.mask
    return _refused_rank(attention) or _first(
        (
            (not supported, "no AOTriton kernels for this architecture"),
            *_refused_flash_dims(attention, _AOTRITON_HEAD_DIM),
            *_refused_efficient_dims(attention, 8 if query.dtype in _HALF else 4),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=False),
            *_refused_heads(attention, gqa=False),
            (
                mask is not None and mask.dtype not in ("bool", query.dtype),
                f"attn_mask neither bool nor {query.dtype}",
            ),
            _not_one_of(attention, (*_HALF, "float32")),
        )
    )


def _metal_vector_refusal(attention: Attention) -> str | None:
    """Why the vector kernel refuses: `aten/src/ATen/native/mps/operations/Attention.mm`.

    It would take a boolean mask, but `F.sdpa` has made that additive before.
    """
    queries, dims = attention.query.shape[-2], (attention.query.shape[-1], attention.value.shape[-1])
    return _first(
        (
            (attention.causal, "is_causal"),
            (queries > _METAL_QUERIES, f"{queries} queries, more than {_METAL_QUERIES}"),
            (queries > attention.key.shape[-2], "more queries than keys"),
            (attention.mask is not None, "attn_mask given"),
            (dims[0] != dims[1] or dims[0] not in _METAL_HEAD_DIMS, f"head_dim {_words(dims)}"),
        )
    )


def _refused_rank(attention: Attention) -> str | None:
    ranks = {len(tensor.shape) for tensor in (attention.query, attention.key, attention.value)}
    return None if ranks == {4} else f"{_words(sorted(ranks))} dimensions instead of 4"


def _not_one_of(attention: Attention, dtypes: tuple[str, ...]) -> tuple[bool, str]:
    given = {tensor.dtype: None for tensor in (attention.query, attention.key, attention.value)}
    return len(given) > 1 or next(iter(given)) not in dtypes, f"{_words(given)} instead of {' or '.join(dtypes)}"


def _outside(capability: tuple[int, int], limits: tuple[tuple[int, int], tuple[int, int]]) -> tuple[bool, str]:
    low, high = limits
    words = f"SM {capability[0]}.{capability[1]} outside {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return not low <= capability <= high, words


def _refused_flash_dims(attention: Attention, limit: int) -> tuple[tuple[bool, str], ...]:
    dims = tuple(t.shape[-1] for t in (attention.query, attention.key, attention.value))
    return (
        (len(set(dims)) > 1, f"head_dim of query, key and value differ ({_words(dims)})"),
        (dims[0] > limit, f"head_dim {dims[0]} over {limit}"),
    )


def _refused_efficient_dims(attention: Attention, alignment: int) -> tuple[tuple[bool, str], ...]:
    dims = (attention.query.shape[-1], attention.value.shape[-1])
    return (
        (attention.query.shape[-1] != attention.key.shape[-1], "head_dim of query and key differ"),
        (
            any(dim == 0 or dim % alignment for dim in dims),
            f"head_dim {_words(dims)} no multiple of {alignment}",
        ),
    )


def _causal_rectangle(attention: Attention) -> tuple[bool, str]:
    queries, keys = attention.query.shape[-2], attention.key.shape[-2]
    return attention.causal and queries != keys, f"is_causal with {queries} queries and {keys} keys"


def _refused_sequences(attention: Attention) -> tuple[tuple[bool, str], ...]:
    return ((0 in (attention.query.shape[-2], attention.key.shape[-2]), "no queries or no keys"),)


def _refused_strides(attention: Attention, *, ignore_single: bool) -> tuple[tuple[bool, str], ...]:
    single = ignore_single and attention.query.shape[-1] == 1
    loose = any(t.stride[-1] != 1 for t in (attention.query, attention.key, attention.value))
    mask = attention.mask
    return (
        (loose and not single, "last dimension of query, key or value not contiguous"),
        (mask is not None and mask.stride[-1] != 1, "last dimension of attn_mask not contiguous"),
    )


def _refused_heads(attention: Attention, *, gqa: bool, same_heads: bool = True) -> tuple[tuple[bool, str], ...]:
    batches = {tensor.shape[0] for tensor in (attention.query, attention.key, attention.value)}
    query, key, value = (t.shape[-3] for t in (attention.query, attention.key, attention.value))
    different_batch = (len(batches) > 1, "batch sizes of query, key and value differ")
    if attention.gqa and gqa:
        return (
            different_batch,
            (same_heads and key != value, f"{key} key heads and {value} value heads"),
            (
                bool(query % key or query % value),
                f"{query} query heads no multiple of {_words({key, value})} KV heads",
            ),
        )
    flag = "enable_gqa with " if attention.gqa else ""
    return (different_batch, (not query == key == value, f"{flag}{key} KV heads for {query} query heads"))


def _mask_broadcasts(attention: Attention) -> bool:
    mask, query, key = attention.mask, attention.query.shape, attention.key.shape
    if mask is None:
        return True
    full = (query[0], query[1], query[2], key[2])
    return len(mask.shape) in (2, 4) and all(
        size in (1, wanted) for size, wanted in zip(mask.shape, full[-len(mask.shape) :], strict=True)
    )


def _gemm_alignment(dtype: str, capability: tuple[int, int]) -> int:
    """Elements to which the memory-efficient kernel's head_dim must be aligned: 16 bytes on tensor cores."""
    half = dtype in _HALF
    if capability >= (8, 0):
        return 8 if half else 4
    return 8 if half and capability >= (7, 0) else 1


def _words(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


class _Kernels:
    """Follows an op through its kernels, with the layouts that PyTorch gives to the buffers between them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def run(self, name: str, reads: tuple[Tensor, ...], *writes: Tensor) -> Tensor:
        self.steps.append(Step(name, reads, writes))
        return writes[0]

    def copy(self, name: str, source: Tensor, dtype: str | None = None) -> Tensor:
        """An elementwise kernel: the result is dense in the order of the source's strides."""
        stride = _dense_stride(source.shape, source.stride)
        return self.run(name, (source,), _scratch(source.shape, dtype or source.dtype, stride))

    def contiguous(self, name: str, source: Tensor) -> Tensor:
        return self.run(name, (source,), _scratch(source.shape, source.dtype))

    def pad(self, name: str, source: Tensor, alignment: int) -> Tensor:
        """Fill a wider buffer, then copy into it; the slice of the given width is returned."""
        width = source.shape[-1]
        # a width already aligned is padded all the same when other strides were not
        wide = (*source.shape[:-1], width + alignment - width % alignment)
        stride = _contiguous_stride(wide)
        self.run(name, (), _scratch(wide, source.dtype))
        return self.run(name, (source,), _scratch(source.shape, source.dtype, stride))

    def causal_mask(self, queries: int, keys: int, dtype: str) -> Tensor:
        ones = self.run("causal mask", (), _scratch((queries, keys), "bool"))
        tril = self.run("causal mask", (ones,), _scratch((queries, keys), "bool"))
        return self.copy("causal mask", tril, dtype)

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        batch = _broadcast(left.shape[:-2], right.shape[:-2])
        left, right = (self._folded(name, _expand(tensor, batch)) for tensor in (left, right))
        return self.run(name, (left, right), _scratch((*batch, left.shape[-2], right.shape[-1]), left.dtype))

    def softmax(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over the last dimension, with zeros in rows that are masked as a whole."""
        if mask is not None:
            self.run("add mask", (scores, mask), scores)
        probabilities = self.run("softmax", (scores,), scores)
        hidden = self.run("masked", (scores,), _scratch(scores.shape, "bool"))
        rows = self.run("masked", (hidden,), _scratch((*scores.shape[:-1], 1), "bool"))
        return self.run("zero masked rows", (rows, probabilities), probabilities)

    def to_result(self) -> tuple[Step, ...]:
        """The steps, where what the last one writes is the op's result."""
        *steps, last = self.steps
        return (*steps, replace(last, writes=tuple(replace(t, storage=RESULT) for t in last.writes)))

    def _folded(self, name: str, operand: Tensor) -> Tensor:
        if _folds(operand.shape[:-2], operand.stride[:-2]):
            return operand
        return self.contiguous(f"copy for {name}", operand)


def _repeat_heads(kernels: _Kernels, attention: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    heads = attention.query.shape[-3]
    if key.shape[-3] == heads == value.shape[-3]:
        return key, value
    key, value = (
        kernels.run(f"repeat {name}", (t,), _scratch((*t.shape[:-3], heads, *t.shape[-2:]), t.dtype))
        for name, t in (("key", key), ("value", value))
    )
    return key, value


def _scratch(shape: tuple[int, ...], dtype: str, stride: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(storage=SCRATCH, dtype=dtype, shape=shape, stride=stride or _contiguous_stride(shape))


def _output_shape(attention: Attention) -> tuple[int, ...]:
    return (*attention.query.shape[:-1], attention.value.shape[-1])


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return replace(tensor, shape=(*tensor.shape[:-2], rows, tensor.shape[-1]))


def _transpose(tensor: Tensor, one: int, other: int) -> Tensor:
    shape, stride = list(tensor.shape), list(tensor.stride)
    shape[one], shape[other] = shape[other], shape[one]
    stride[one], stride[other] = stride[other], stride[one]
    return replace(tensor, shape=tuple(shape), stride=tuple(stride))


def _expand(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    missing = len(batch) + 2 - len(tensor.shape)
    shape = (1,) * missing + tensor.shape
    stride = (0,) * missing + tensor.stride
    expanded = tuple(
        0 if size == 1 and wanted != 1 else step
        for size, step, wanted in zip(shape[:-2], stride[:-2], batch, strict=True)
    )
    return replace(tensor, shape=(*batch, *shape[-2:]), stride=(*expanded, *stride[-2:]))


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(len(one), len(other))
    one, other = (1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other
    return tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))


def _folds(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True when several dimensions can be seen as one of a single stride."""
    real = [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(real))


def _aligned(tensor: Tensor, alignment: int) -> bool:
    return tensor.stride[-1] == 1 and not any(step % alignment for step in tensor.stride[:-1])


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _stride_in_order(shape, range(len(shape) - 1, -1, -1))


def _stride_in_order(shape: tuple[int, ...], order: Iterable[int]) -> tuple[int, ...]:
    stride, step = [0] * len(shape), 1
    for dim in order:
        stride[dim] = step
        step *= max(shape[dim], 1)
    return tuple(stride)


def _dense_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a new tensor that keeps the memory order of dimensions, as elementwise kernels allocate it.

    An insertion sort from the last dimension on, because expanded dimensions (stride 0) compare with none and
    stay where they are; of equal strides, the smaller dimension is the inner one.
    """
    order = list(range(len(shape) - 1, -1, -1))
    for start in range(1, len(order)):
        moving = start
        for place in range(start - 1, -1, -1):
            inner, outer = order[place], order[moving]
            if stride[inner] == 0 or stride[outer] == 0:
                continue
            if (stride[inner], shape[inner]) > (stride[outer], shape[outer]):
                order[place], order[moving] = outer, inner
                moving = place
            elif stride[inner] < stride[outer]:
                break
    return _stride_in_order(shape, order)


def _ramp(queries: int, keys: int, shift: int) -> int:
    """Sum over i < queries of i + shift, kept between 0 and keys."""
    end = _clamp(keys - shift, queries)
    start = min(_clamp(1 - shift, queries), end)
    return (end - start) * (start + end - 1 + 2 * shift) // 2 + (queries - end) * keys


def _clamp(value: int, most: int) -> int:
    return max(0, min(value, most))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
