"""Which kernel PyTorch picks for scaled dot product attention on a GPU, and the layout of what it returns.

Shapes: query (B, Hq, S, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), scores (B, Hq, S, T),
output (B, Hq, S, Dv).

The rules of the choice are those of torch 2.13 in inference, with the cuDNN that its CUDA 13 wheels bring
(9.20): `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` and `sdp_utils_cpp.h`. They were read, not run:
no GPU was at hand. Switches of the user (`sdpa_kernel`, environment variables) and nested tensors are not
modelled.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..hardware.gpu import Gpu
from .graph import Tensor

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
                chosen = _choose_nvidia(attention, UNKNOWN_CAPABILITY)
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
        return contiguous_stride(shape)
    if backend == "efficient":
        _, heads, queries, _ = shape
        return (queries * heads * value_dim, value_dim, heads * value_dim, 1)
    if backend == "flash" and value_dim % FLASH_ALIGNMENT:
        return contiguous_stride((*query_shape[:-1], _round_up(value_dim, FLASH_ALIGNMENT)))
    if shape == query_shape:
        return dense_stride(query_shape, query_stride)
    order = sorted(range(len(shape)), key=lambda dim: query_stride[dim])
    return _stride_in_order(shape, order)


HALF = ("float16", "bfloat16")
FLASH_ALIGNMENT = 8
_FLASH_HEAD_DIM = 256
_AOTRITON_HEAD_DIM = 512
_AOTRITON_ARCHITECTURES = ("CDNA2", "CDNA3", "CDNA4", "RDNA3", "RDNA4")
_METAL_QUERIES = 8
_METAL_HEAD_DIMS = (64, 96, 128)
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))
_FLASH_RANGE = ((8, 0), (12, 1))
_EFFICIENT_RANGE = ((5, 0), (12, 1))
_REFERENCE_CAPABILITY = (9, 0)
UNKNOWN_CAPABILITY = (10, 0)


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
            _not_one_of(attention, HALF),
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
            _not_one_of(attention, HALF if capability >= (8, 0) else HALF[:1]),
            *_refused_heads(attention, gqa=True),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=True),
        )
    )


def _efficient_refusal(attention: Attention, capability: tuple[int, int]) -> str | None:
    query, key, value = attention.query, attention.key, attention.value
    alignment = _gemm_alignment(query.dtype, capability)
    dtypes = (*HALF, "float32") if capability >= (8, 0) else ("float16", "float32")
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
            _not_one_of(attention, HALF),
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
            *_refused_efficient_dims(attention, 8 if query.dtype in HALF else 4),
            *_refused_sequences(attention),
            *_refused_strides(attention, ignore_single=False),
            *_refused_heads(attention, gqa=False),
            (
                mask is not None and mask.dtype not in ("bool", query.dtype),
                f"attn_mask neither bool nor {query.dtype}",
            ),
            _not_one_of(attention, (*HALF, "float32")),
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
    half = dtype in HALF
    if capability >= (8, 0):
        return 8 if half else 4
    return 8 if half and capability >= (7, 0) else 1


def _words(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose last dimension is innermost."""
    return _stride_in_order(shape, range(len(shape) - 1, -1, -1))


def _stride_in_order(shape: tuple[int, ...], order: Iterable[int]) -> tuple[int, ...]:
    stride, step = [0] * len(shape), 1
    for dim in order:
        stride[dim] = step
        step *= max(shape[dim], 1)
    return tuple(stride)


def dense_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
