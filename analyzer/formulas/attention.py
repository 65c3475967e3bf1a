"""What scaled dot product attention costs by the kernel that runs; which one that is, `sdpa` decides.

Shapes: query (B, Hq, S, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), scores (B, Hq, S, T),
output (B, Hq, S, Dv).
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from ...hardware.gpu import Gpu
from ..cost import Access, Attended, Call, Cost, Gemm, Part, formula, unpriced
from ..graph import Tensor
from ..sdpa import HALF, UNKNOWN_CAPABILITY, Attention, Backend, BackendName, choose_backend
from .arithmetic import number
from .attention_kernels import (
    SCRATCH,
    Band,
    Step,
    band_of,
    bottom_right,
    broadcast_shape,
    first_rows,
    fused_steps,
    math_steps,
    metal_steps,
    transposed,
)


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
    return _fused_cost(call, attention, steps, backend, band_of(attention))


@formula("aten._scaled_dot_product_attention_math", "aten._scaled_dot_product_attention_math_for_mps")
def math_attention(call: Call) -> Cost:
    """The math path asked for by name: it returns the probabilities too and takes a boolean mask as it is."""
    attention = _attention(call, mask="attn_mask")
    on_apple = call.gpu.vendor == "apple"
    steps = metal_steps(attention, "math") if on_apple else math_steps(attention, converts_mask=False)
    cost = _math_cost(call, attention, steps, Backend("math", "asked for by name"))
    returned = sum(tensor.touched_bytes for tensor in call.outputs[1:])
    return replace(cost, scratch_written=max(0, cost.scratch_written - returned), parts=())


@formula("aten._scaled_dot_product_flash_attention")
def flash_attention(call: Call) -> Cost:
    """The flash kernel asked for by name; its causal mask is aligned bottom-right, unlike `F.sdpa`'s."""
    attention = _attention(call, mask=None)
    return _named(call, attention, "flash", bottom_right(attention) if attention.causal else Band())


@formula("aten._scaled_dot_product_cudnn_attention", "aten._cudnn_attention_forward")
def cudnn_attention(call: Call) -> Cost:
    """The cuDNN kernel asked for by name; packed batches depend on data: unpriced."""
    if any(call.optional(name) for name in ("cum_seq_q", "cum_seq_k")):
        return unpriced(call)
    attention = _attention(call, mask="attn_bias")
    return _named(call, attention, "cudnn", band_of(attention))


@formula("aten._scaled_dot_product_efficient_attention")
def efficient_attention(call: Call) -> Cost:
    """The memory-efficient kernel asked for by name."""
    attention = _attention(call, mask="attn_bias")
    return _named(call, attention, "efficient", band_of(attention))


@formula("aten._scaled_dot_product_flash_attention_for_cpu")
def flash_attention_for_cpu(call: Call) -> Cost:
    """The CPU's flash kernel, which takes a mask; priced as one fused kernel on the GPU asked about."""
    attention = _attention(call, mask="attn_mask")
    return _named(call, attention, "flash", band_of(attention))


@formula("aten._scaled_dot_product_fused_attention_overrideable")
def overrideable_attention(call: Call) -> Cost:
    """The fused kernel of an out-of-tree device."""
    attention = _attention(call, mask="attn_bias")
    return _named(call, attention, "flash", band_of(attention))


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
    band = Band(left=left - offset if left >= 0 else None, right=right + offset if right >= 0 else None)
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
    band = Band() if kind == 0 else Band(right=0) if kind == 1 else bottom_right(attention)
    if window > 0:
        band = Band(left=window - 1 - (band.right or 0), right=band.right)
    return _named(call, attention, "efficient", band)


@formula("fxroof.attention_packed_cache")
def packed_cache_attention(call: Call) -> Cost:
    """Attention by the kernel that wide keys and values would get, which reads them packed and widens them on chip.

    2 FLOPs an element of key and value, to widen and to scale it, on top of `scaled_dot_product_attention`.
    """
    attention = _attention(call, mask="attn_mask")
    query, key, value = attention.query, attention.key, attention.value
    wide = replace(attention, key=replace(key, dtype=query.dtype), value=replace(value, dtype=query.dtype))
    backend = choose_backend(wide, call.gpu)
    if backend.name == "math":
        backend = Backend("flash", "a kernel of its own: PyTorch has none for packed keys and values")
    apple = call.gpu.vendor == "apple"
    steps = metal_steps(attention, backend.name) if apple else fused_steps(attention, backend.name)
    widened = 2 * (key.numel + value.numel)
    return _fused_cost(call, attention, steps, backend, band_of(attention), widened=widened)


# CUTLASS multiplies float32 operands on tensor cores as three products of TF32 halves
@formula("higher_order.flex_attention")
def flex_attention(call: Call) -> Cost:
    """The compiled kernel: pairs that the mask hides are neither read nor computed.

    Matmul and softmax as for a fused kernel over the pairs left; the kernel skips whole blocks, so it computes more,
    never fewer. `score_mod` is counted by the ops inside it; `mask_mod`, which runs in blocks at the edge only, is
    not. Tensors that the two capture are read once where no pair is hidden; else which part of them is read is
    unknown, and none is charged.
    """
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    rows, value_dim = prod(query.shape[:-1]), value.shape[-1]
    pairs, share = call.integer("pairs", 0), number(call, "keys", 1.0)
    whole = rows * key.shape[-2]
    per_pair = 2 * (query.shape[-1] + value_dim)
    notes = ["flex_attention taken as compiled: called as it is, it writes its scores to memory"]
    if not call.flag("evaluated"):
        notes.append("its block mask depends on data: taken as dense")
    elif pairs < whole:
        notes.append(f"its mask keeps {pairs / whole:.1%} of the pairs")
    return call.cost(
        matmul={query.dtype: pairs * per_pair},
        vector={"float32": pairs * 4 + rows * value_dim},
        special=pairs,
        reads={
            "key": int(key.touched_bytes * share),
            "value": int(value.touched_bytes * share),
            **({"others": 0} if pairs < whole else {}),
        },
        dense_matmul=whole * per_pair if pairs != whole else None,
        attended=_attended(query, key, pairs, key.shape[-2], 0),
        backend="flex",
        note="; ".join(notes),
    )


_TF32_PRODUCTS = 3


def _attention(call: Call, *, mask: str | None, token_major: bool = False) -> Attention:
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    if token_major:
        query, key, value = (transposed(tensor, 1, 2) for tensor in (query, key, value))
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


def _named(call: Call, attention: Attention, name: BackendName, band: Band) -> Cost:
    # `F.sdpa` prepares operands; an op asked for by name gets them ready
    return _fused_cost(call, attention, (), Backend(name), band)


def _fused_cost(
    call: Call, attention: Attention, steps: tuple[Step, ...], backend: Backend, band: Band, *, widened: int = 0
) -> Cost:
    """Cost of one kernel that keeps scores on chip, after what was prepared for it.

    Matmul FLOPs: 2 * B * Hq * pairs * (D + Dv), over the pairs that the causal mask leaves; dense over S * T.
    Vector FLOPs: scale, maximum, subtraction and sum per pair, one addition for a mask, and the division of
    the output; `widened` to unpack keys and values. Special: one exponential per pair. Traffic: query, key, value and
    mask once, so that KV heads shared by query heads count once, and the output.
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
        vector={"float32": pairs * (4 + (attention.mask is not None)) + rows * queries * value_dim + widened},
        special=pairs,
        reads=_reads_in_band(attention, steps, band),
        scratch_read=_scratch_read(steps),
        scratch_written=_scratch_written(steps),
        dense_matmul=dense if dense != executed else None,
        attended=_attended(query, key, pairs, band.seen(queries, keys), band.edges),
        tf32=tf32,
        backend=backend.name,
        note=backend.reason,
    )
    whole = _without_statistics(call, cost)
    return _in_parts(call, whole, steps, {"attention": replace(whole, traffic=())}) if steps else whole


def _math_cost(call: Call, attention: Attention, steps: tuple[Step, ...], backend: Backend) -> Cost:
    """Cost of the unfused path: every pair is computed, causal or not, and scores go through memory.

    Matmul FLOPs: 2 * B * Hq * S * T * (D + Dv) in the dtype computed in. Vector FLOPs: the two scalings, and
    per pair maximum, subtraction, sum and division of the softmax, the test for minus infinity, the choice of
    zero, and the addition of a mask.
    """
    query, key = attention.query, attention.key
    queries, keys = query.shape[-2], key.shape[-2]
    heads = query.shape[:-2] if attention.gqa else broadcast_shape(query.shape[:-2], key.shape[:-2])
    rows = prod(heads)
    pairs = rows * queries * keys
    upcast = query.dtype in HALF and call.gpu.vendor != "apple"
    computed = "float32" if upcast else query.dtype
    key_elements = prod((*(heads if attention.gqa else key.shape[:-2]), *key.shape[-2:]))
    masked = attention.causal or attention.mask is not None
    products = {
        "query x key": Gemm(batch=rows, m=queries, n=keys, k=query.shape[-1]),
        "probabilities x value": Gemm(batch=rows, m=queries, n=attention.value.shape[-1], k=keys),
    }
    flops = {
        "scale query": query.numel,
        "scale key": key_elements,
        "add mask": pairs * masked,
        "softmax": 4 * pairs,
        "masked": pairs,
        "zero masked rows": pairs,
    }
    cost = call.cost(
        matmul={computed: pairs * 2 * (query.shape[-1] + attention.value.shape[-1])},
        vector={computed: query.numel + key_elements + pairs * (6 + masked)},
        special=pairs,
        gemms=tuple(products.values()),
        scratch_read=_scratch_read(steps),
        scratch_written=_scratch_written(steps),
        backend=backend.name,
        note="; ".join(filter(None, (backend.reason, "computed in float32" if upcast else ""))),
    )
    parts: dict[str, Cost] = {}
    for step in steps:
        product, vector = products.get(step.name), flops.pop(step.name, 0)
        if step.name in parts:
            continue
        parts[step.name] = Cost(
            matmul={computed: 2.0 * product.batch * product.m * product.n * product.k} if product else {},
            vector={computed: float(vector)} if vector else {},
            special=pairs if step.name == "softmax" else 0,
            gemms=(product,) if product else (),
        )
    if flops.keys() & {"scale query", "softmax"}:  # Metal's steps are fewer: what others do is done between products
        return replace(cost, parts=())
    return _in_parts(call, cost, steps, parts)


def _attended(query: Tensor, key: Tensor, pairs: int, seen: int, edges: int) -> Attended | None:
    rows, own = prod(query.shape[:-2]), prod(key.shape[:-2])
    if not pairs or not rows * own:
        return None
    return Attended(
        heads=min(own, rows),
        group=max(1, rows // own),
        queries=query.shape[-2],
        keys=seen,
        pairs=pairs // rows,
        edges=edges,
        size=query.shape[-1],
    )


def _splits_float32(backend: BackendName, dtype: str, gpu: Gpu) -> bool:
    # gemm_kernel_utils.h of the memory-efficient kernel: OpMultiplyAddFastF32 from SM 8.0 on
    capability = gpu.compute_capability or UNKNOWN_CAPABILITY
    return backend == "efficient" and dtype == "float32" and gpu.vendor == "nvidia" and capability >= (8, 0)


def _reads_in_band(attention: Attention, steps: tuple[Step, ...], band: Band) -> dict[str, int]:
    """Bytes read of key and value, where the mask hides rows from every query and no copy is made first."""
    keys = attention.key.shape[-2]
    seen = band.keys_read(attention.query.shape[-2], keys)
    if seen == keys or any(step.name == "pad key" for step in steps):
        return {}
    return {
        "key": first_rows(attention.key, seen).touched_bytes,
        "value": first_rows(attention.value, seen).touched_bytes,
    }


def _scratch_read(steps: tuple[Step, ...]) -> int:
    return sum(t.touched_bytes for step in steps for t in step.reads if t.storage == SCRATCH)


def _scratch_written(steps: tuple[Step, ...]) -> int:
    return sum(t.touched_bytes for step in steps for t in step.writes if t.storage == SCRATCH)


def _in_parts(call: Call, cost: Cost, steps: tuple[Step, ...], work: Mapping[str, Cost]) -> Cost:
    """The cost as the kernels of several steps, each with the work of its name."""
    if len(steps) == 1:
        return cost
    unread: dict[tuple[int, int], Access] = {}
    for access in cost.traffic:
        if access.read:
            tensor = call.graph.tensors[access.tensor]
            unread[tensor.storage, tensor.offset] = access
    results = tuple(access for access in cost.traffic if access.written)
    left = dict(work)
    parts: list[Part] = []
    for step in steps:
        operands = [unread.pop((t.storage, t.offset), None) for t in step.reads if t.storage != SCRATCH]
        part = replace(
            left.pop(step.name, Cost()),
            traffic=(*filter(None, operands), *(results if step is steps[-1] else ())),
            scratch_read=_scratch_read((step,)),
            scratch_written=_scratch_written((step,)),
        )
        parts.append(Part(name=step.name, cost=part))
    return replace(cost, parts=tuple(parts))


def _without_statistics(call: Call, cost: Cost) -> Cost:
    """Leave out what fused ops return beside the output: logsumexp and random states, a few bytes a query."""
    others = set(call.op.outputs[1:])
    return replace(cost, traffic=tuple(access for access in cost.traffic if access.tensor not in others))
