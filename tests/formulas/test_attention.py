"""Attention against PyTorch: its FLOP counter, its unfused path recorded by kernel, its output layouts."""

import dataclasses
import functools
import itertools
from collections import Counter

import pytest
import torch
from fxroof.analyzer.cost import Call, Cost, Status, find_formula
from fxroof.analyzer.formulas.attention_kernels import executed_pairs, fused_steps, math_steps
from fxroof.analyzer.graph import Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.pricing import load_formulas
from fxroof.analyzer.sdpa import (
    Attention,
    choose_backend,
    is_fused_somewhere,
    output_stride,
    traced_output_stride,
)
from fxroof.hardware.catalog import load
from fxroof.hardware.gpu import Gpu
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

load_formulas()

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default


def plain(tensor: torch.Tensor, storage: int = 0) -> Tensor:
    return Tensor(
        storage=storage,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        offset=tensor.storage_offset(),
    )


def one_op(overload, *args, **kwargs) -> Graph:
    """Run one operator and write down what it was given and what it returned as a graph of one op."""
    tensors: list[Tensor] = []
    storages: list[Storage] = []
    homes: dict[int, int] = {}

    def ref(tensor: torch.Tensor, role: Role) -> TensorRef:
        memory = tensor.untyped_storage()
        if memory._cdata not in homes:
            homes[memory._cdata] = len(storages)
            storages.append(Storage(nbytes=memory.nbytes(), role=role, name=f"s{len(storages)}"))
        tensors.append(plain(tensor, homes[memory._cdata]))
        return TensorRef(tensor=len(tensors) - 1)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        result = overload(*args, **kwargs)
    given_args = {}
    for position, argument in enumerate(overload._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
        given_args[argument.name] = ref(value, Role.INPUT) if isinstance(value, torch.Tensor) else value
    returned = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    outputs = tuple(ref(t, Role.ACTIVATION).tensor for t in returned)
    op = Op(name="op", target=str(overload), args=given_args, outputs=outputs)
    return Graph(phase="forward", storages=tuple(storages), tensors=tuple(tensors), ops=(op,))


@functools.cache
def part(name: str) -> Gpu:
    return load(name).gpu


def price(graph: Graph, gpu: str = "h100") -> Cost:
    op = graph.ops[0]
    formula = find_formula(op.target)
    assert formula is not None
    return formula(Call(graph=graph, op=op, gpu=part(gpu)))


def read(cost: Cost) -> int:
    return sum(access.read for access in cost.traffic)


def written(cost: Cost) -> int:
    return sum(access.written for access in cost.traffic)


def heads(batch, heads_, tokens, dim, *, dtype=torch.bfloat16, layout="head", device="meta") -> torch.Tensor:
    """A (batch, heads, tokens, dim) tensor in one of the layouts that models make."""

    def make(*shape):
        return torch.ones(shape, dtype=dtype, device=device)

    match layout:
        case "head":
            return make(batch, heads_, tokens, dim)
        case "token":
            return make(batch, tokens, heads_, dim).transpose(1, 2)
        case "packed":
            return make(batch, tokens, 3, heads_, dim)[:, :, 1].transpose(1, 2)
        case "cache":
            return make(batch, heads_, tokens + 3, dim)[:, :, :tokens]
        case "expanded":
            return make(batch, 1, tokens, dim).expand(batch, heads_, tokens, dim)
        case "last":
            return make(batch, heads_, dim, tokens).transpose(2, 3)
    raise AssertionError(layout)


LAYOUTS = ("head", "token", "packed", "cache", "expanded", "last")


def qkv(batch=2, queries=16, keys=16, q_heads=4, kv_heads=4, dim=64, value_dim=None, **how):
    return (
        heads(batch, q_heads, queries, dim, **how),
        heads(batch, kv_heads, keys, dim, **how),
        heads(batch, kv_heads, keys, value_dim or dim, **how),
    )


# --- FLOPs ---


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    group=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    causal=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    gpu=st.sampled_from(("h100", "a100", "v100", "mi300x")),
)
def test_dense_flops_equal_pytorchs_counter(batch, group, kv_heads, queries, keys, dims, causal, dtype, gpu):
    shape = {"batch": batch, "queries": queries, "keys": keys, "kv_heads": kv_heads}
    q, k, v = qkv(**shape, q_heads=group * kv_heads, dim=8 * dims[0], value_dim=8 * dims[1], dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        graph = one_op(sdpa, q, k, v, is_causal=causal, enable_gqa=True)
    assert price(graph, gpu).matmul_flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("overload", "extra"),
    [
        (aten._scaled_dot_product_flash_attention.default, ()),
        (aten._scaled_dot_product_efficient_attention.default, (None, False)),
        (aten._scaled_dot_product_cudnn_attention.default, (None, False)),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_ops_asked_for_by_name_agree_with_pytorchs_counter(overload, extra, causal):
    q, k, v = qkv(queries=5, keys=12)
    with FlopCounterMode(display=False) as counter:
        graph = one_op(overload, q, k, v, *extra, is_causal=causal)
    cost = price(graph)
    assert cost.matmul_flops == counter.get_total_flops()
    assert cost.executed_matmul_flops < cost.matmul_flops if causal else cost.dense_matmul is None
    assert written(cost) == 2 * 4 * 5 * 64 * 2


@pytest.mark.parametrize("overload", [aten._flash_attention_forward.default, aten._efficient_attention_forward.default])
def test_token_major_ops_count_tokens_as_tokens(overload):
    q, k, v = (t.transpose(1, 2) for t in qkv(queries=5, keys=12))
    flash = overload is aten._flash_attention_forward.default
    args = (None, None, 5, 12, 0.0, False, False) if flash else (None, None, None, None, None, 0.0, 0)
    # PyTorch's counter takes dimension 1 for heads here, and refuses these shapes
    assert price(one_op(overload, q, k, v, *args)).matmul_flops == 2 * 2 * 4 * 5 * 12 * 128


@given(
    queries=st.integers(0, 9),
    keys=st.integers(0, 9),
    left=st.none() | st.integers(-12, 12),
    right=st.none() | st.integers(-12, 12),
)
def test_pairs_equal_a_loop(queries, keys, left, right):
    assume(left is None or right is None or -left <= right + 1)
    seen = [
        (i, j)
        for i, j in itertools.product(range(queries), range(keys))
        if (left is None or j >= i - left) and (right is None or j <= i + right)
    ]
    assert executed_pairs(queries, keys, left=left, right=right) == len(seen)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8), (8, 3), (1, 9), (1, 1)])
def test_a_causal_kernel_executes_the_pairs_of_is_causal(queries, keys):
    q, k, v = qkv(queries=queries, keys=keys)
    hidden = torch.ones(queries, keys, dtype=torch.bool).tril().logical_not()
    cost = price(one_op(sdpa, q, k, v, is_causal=True), "a100")
    pairs = 2 * 4 * int(hidden.logical_not().sum())
    assert cost.executed_matmul_flops == pairs * 2 * 128
    assert cost.special == pairs


def test_flash_by_name_aligns_its_causal_mask_bottom_right():
    q, k, v = qkv(queries=3, keys=8)
    cost = price(one_op(aten._scaled_dot_product_flash_attention.default, q, k, v, is_causal=True))
    assert cost.special == 2 * 4 * (6 + 7 + 8)


def test_a_window_of_keys_bounds_what_flash_executes():
    q, k, v = (t.transpose(1, 2) for t in qkv(queries=8, keys=8))
    args = (None, None, 8, 8, 0.0, True, False)
    overload = aten._flash_attention_forward.default
    cost = price(one_op(overload, q, k, v, *args, window_size_left=2, window_size_right=0))
    assert cost.special == 2 * 4 * (1 + 2 + 3 * 6)


def test_packed_sequences_are_not_priced():
    q = torch.empty(10, 4, 64, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    overload = aten._flash_attention_forward.default
    cost = price(one_op(overload, q, q, q, starts, starts, 6, 6, 0.0, True, False))
    assert cost.status is Status.UNPRICED


def test_math_computes_16_bit_operands_in_float32_and_hides_nothing():
    q, k, v = qkv(dim=320)
    cost = price(one_op(sdpa, q, k, v, is_causal=True, enable_gqa=True), "v100")
    assert cost.backend == "math"
    assert cost.matmul == {"float32": 2 * 4 * 16 * 16 * 2 * 640}
    assert cost.dense_matmul is None


def test_float32_on_the_memory_efficient_kernel_is_three_products_of_tf32():
    graph = one_op(sdpa, *qkv(dtype=torch.float32))
    dense = 2 * 4 * 16 * 16 * 2 * 128
    ampere, volta = price(graph, "a100"), price(graph, "v100")
    assert (ampere.backend, ampere.tf32, ampere.matmul["float32"]) == ("efficient", True, 3 * dense)
    assert (volta.backend, volta.tf32, volta.matmul["float32"]) == ("efficient", False, dense)
    assert ampere.matmul_flops == volta.matmul_flops == dense


# --- traffic of fused kernels ---


def places(tensor: torch.Tensor, rows) -> set[int]:
    """Offsets of the elements in some rows (dimension -2) of a tensor."""
    sizes = [range(size) for size in tensor.shape]
    sizes[-2] = rows
    return {
        tensor.storage_offset() + sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
        for index in itertools.product(*sizes)
    }


@settings(deadline=None)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    queries=st.integers(1, 6),
    keys=st.integers(2, 6),
    layout=st.sampled_from(LAYOUTS[:5]),
    causal=st.booleans(),
)
def test_a_fused_kernel_touches_what_some_query_sees_once(batch, group, kv_heads, queries, keys, layout, causal):
    shape = {
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "kv_heads": kv_heads,
        "q_heads": group * kv_heads,
    }
    q, k, v = qkv(**shape, dim=8, layout=layout)
    cost = price(one_op(sdpa, q, k, v, is_causal=causal, enable_gqa=True), "h100")
    seen = [j for j in range(keys) if not causal or any(j <= i for i in range(queries))]
    touched = len(places(q, range(queries))) + len(places(k, seen)) + len(places(v, seen))
    assert cost.backend == "cudnn"
    assert read(cost) == 2 * touched
    assert written(cost) == 2 * q.numel()
    assert (cost.scratch_read, cost.scratch_written) == (0, 0)


@pytest.mark.parametrize("gpu", ["h100", "a100", "b200", "mi300x"])
def test_scores_of_a_fused_kernel_stay_on_chip(gpu):
    cost = price(one_op(sdpa, *qkv(queries=512, keys=512), is_causal=True), gpu)
    assert read(cost) + written(cost) == 4 * (2 * 4 * 512 * 64 * 2)
    assert cost.scratch_read == cost.scratch_written == 0


@pytest.mark.parametrize(
    ("keys", "made"),
    [
        (16, 2 * 16 * 16),  # converted to bfloat16
        (17, 2 * 16 * 17 + 2 * 16 * 24 + 2 * 16 * 17),  # converted, then filled and copied into rows of 24
    ],
)
def test_a_boolean_mask_is_converted_and_its_rows_padded(keys, made):
    mask = torch.ones(16, keys, dtype=torch.bool, device="meta")
    cost = price(one_op(sdpa, *qkv(keys=keys), mask), "a100")
    assert cost.backend == "efficient"
    assert cost.scratch_written == made
    assert cost.scratch_read == (2 * 16 * keys) * (1 if keys == 16 else 2)


def test_flash_pads_a_head_dim_that_8_does_not_divide():
    cost = price(one_op(sdpa, *qkv(dim=60)), "a100")
    assert cost.backend == "flash"
    elements = 2 * 4 * 16
    assert cost.scratch_written == 3 * elements * (64 + 60) * 2
    assert cost.scratch_read == 3 * elements * 60 * 2
    assert read(cost) == 3 * elements * 60 * 2


def test_steps_of_a_fused_kernel_add_up_to_its_cost():
    q, k, v = qkv(queries=4, keys=16)
    mask = torch.ones(2, 1, 4, 16, dtype=torch.bool, device="meta")
    cost = price(one_op(sdpa, q, k, v, mask), "a100")
    steps = fused_steps(Attention(query=plain(q), key=plain(k), value=plain(v), mask=plain(mask)), "efficient")
    assert sum(step.bytes_read for step in steps) == read(cost) + cost.scratch_read
    assert sum(step.bytes_written for step in steps) == written(cost) + cost.scratch_written


# --- traffic of the unfused path ---


class KernelRecorder(TorchDispatchMode):
    """Counts the distinct bytes that each kernel reads and writes; scalars are left out."""

    def __init__(self):
        super().__init__()
        self.read = self.written = 0
        self.kernels = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._safe_softmax.default:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = func(*args, **kwargs)
        sources = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        homes = {t.untyped_storage()._cdata for t in sources}
        if not func._schema.is_mutable and all(t.untyped_storage()._cdata in homes for t in results):
            return result
        self.kernels[func._schema.name] += 1
        self.read += sum({(t.data_ptr(), t.stride()): self.nbytes(t) for t in sources}.values())
        self.written += sum(map(self.nbytes, results))
        return result

    @staticmethod
    def nbytes(tensor: torch.Tensor) -> int:
        if tensor.dim() == 0:
            return 0
        sizes = (size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        return torch.Size(sizes).numel() * tensor.element_size()


def record(overload, *args, **kwargs) -> KernelRecorder:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), KernelRecorder() as recorder:
        overload(*args, **kwargs)
    return recorder


def a_mask(kind, batch, queries, keys, dtype, device) -> torch.Tensor | None:
    match kind:
        case None:
            return None
        case "bool":
            return torch.ones(queries, keys, dtype=torch.bool, device=device)
        case "bool of one row a sequence":
            return torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device)
        case "bool expanded":
            return torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device).expand(-1, -1, queries, -1)
        case "additive":
            return torch.zeros(batch, 1, queries, keys, dtype=dtype, device=device)
        case "additive float32":
            return torch.zeros(queries, keys, dtype=torch.float32, device=device)
    raise AssertionError(kind)


@pytest.mark.parametrize("overload", [sdpa, aten._scaled_dot_product_attention_math.default], ids=str)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 3),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    queries=st.integers(1, 4),
    keys=st.integers(1, 5),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    one_sequence=st.booleans(),
    broadcast=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    mask=st.sampled_from(
        (
            None,
            "bool",
            "bool of one row a sequence",
            "bool expanded",
            "additive",
            "additive float32",
            "causal",
        )
    ),
)
def test_the_unfused_path_moves_the_bytes_that_pytorch_moves(
    overload, batch, group, kv_heads, queries, keys, dims, layouts, one_sequence, broadcast, dtype, mask
):
    assume(not (dtype is torch.float64 and mask == "additive float32"))  # not accepted
    causal, gqa = mask == "causal", group > 1 and not (broadcast and kv_heads == 1)
    how = {"dtype": dtype, "device": "cpu"}
    q = heads(batch, group * kv_heads, queries, dims[0], layout=layouts[0], **how)
    k = heads(batch, kv_heads, keys, dims[0], layout=layouts[1], **how)
    v = heads(batch, kv_heads, keys, dims[1], layout=layouts[2], **how)
    given_mask = None if causal else a_mask(mask, batch, queries, keys, dtype, "cpu")
    if one_sequence:
        q, k, v = q[0], k[0], v[0]
        given_mask = given_mask[0] if given_mask is not None and given_mask.dim() == 4 else given_mask
    args, kwargs = (q, k, v, given_mask, 0.0, causal), {"enable_gqa": gqa}
    recorder = record(overload, *args, **kwargs)

    attention = Attention(
        query=plain(q),
        key=plain(k),
        value=plain(v),
        mask=None if given_mask is None else plain(given_mask),
        causal=causal,
        gqa=gqa,
    )
    steps = math_steps(attention, converts_mask=overload is sdpa)
    assert sum(step.bytes_read for step in steps) == recorder.read
    assert sum(step.bytes_written for step in steps) == recorder.written
    assert len(steps) == sum(n for name, n in recorder.kernels.items() if name != "aten::scalar_tensor")

    graph = one_op(overload, *args, **kwargs)
    unsupported = dataclasses.replace(part("v100"), compute_capability=(3, 7))
    cost = find_formula(graph.ops[0].target)(Call(graph=graph, op=graph.ops[0], gpu=unsupported))
    assert cost.backend == "math"
    assert read(cost) + cost.scratch_read == recorder.read
    assert written(cost) + cost.scratch_written == recorder.written


# --- choice of the kernel ---


def attention(mask=None, causal=False, gqa=False, dropout=0.0, **shape) -> Attention:
    q, k, v = qkv(**shape)
    return Attention(
        query=plain(q),
        key=plain(k),
        value=plain(v),
        mask=None if mask is None else plain(mask),
        causal=causal,
        gqa=gqa,
        dropout=dropout,
    )


def bool_mask(*shape) -> torch.Tensor:
    return torch.empty(shape or (16, 16), dtype=torch.bool, device="meta")


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "causal decode": {"causal": True, "queries": 1},
    "gqa": {"gqa": True, "kv_heads": 2},
    "masked": {"mask": bool_mask()},
    "masked gqa": {"mask": bool_mask(), "gqa": True, "kv_heads": 2},
    "odd mask": {"mask": bool_mask(2, 16, 16)},
    "one key": {"keys": 1},
    "head_dim 60": {"dim": 60},
    "head_dim 256": {"dim": 256},
    "head_dim 320": {"dim": 320},
    "latent 192/128": {"dim": 192, "value_dim": 128},
    "value 32": {"value_dim": 32},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32 gqa": {"dtype": torch.float32, "gqa": True, "kv_heads": 2},
    "float64": {"dtype": torch.float64},
    "strided": {"layout": "last"},
    "kv heads without gqa": {"kv_heads": 2},
}

# rows: case; columns: SM 9.0, 10.0, 8.0, 8.9, 7.0 and gfx942
TABLE = """
plain                 cudnn      cudnn      flash      flash      math       flash
causal                cudnn      cudnn      flash      flash      math       flash
causal decode         cudnn      cudnn      efficient  efficient  math       efficient
gqa                   cudnn      cudnn      flash      flash      math       flash
masked                cudnn      cudnn      efficient  efficient  math       efficient
masked gqa            cudnn      cudnn      math       math       math       math
odd mask              efficient  efficient  efficient  efficient  math       efficient
one key               flash      flash      flash      flash      math       flash
head_dim 60           flash      flash      flash      flash      math       flash
head_dim 256          cudnn      flash      flash      flash      math       flash
head_dim 320          efficient  efficient  efficient  efficient  math       flash
latent 192/128        cudnn      cudnn      efficient  efficient  math       math
value 32              cudnn      cudnn      efficient  efficient  math       math
float16               cudnn      cudnn      flash      flash      efficient  flash
float32               efficient  efficient  efficient  efficient  efficient  efficient
float32 gqa           math       math       math       math       math       math
float64               math       math       math       math       math       math
strided               math       math       math       math       math       math
kv heads without gqa  math       math       math       math       math       math
"""
ROWS = [line.rsplit(maxsplit=6) for line in TABLE.strip().splitlines()]
GPUS = ("h100", "b200", "a100", "l40s", "v100", "mi300x")


@pytest.mark.parametrize(
    ("case", "gpu", "expected"),
    [(row[0].strip(), *pair) for row in ROWS for pair in zip(GPUS, row[1:], strict=True)],
)
def test_choice(case, gpu, expected):
    chosen = choose_backend(attention(**CASES[case]), part(gpu))
    assert chosen.name == expected, chosen
    first = "cudnn" if gpu in ("h100", "b200") else "flash"
    assert (chosen.reason == "") == (expected == first)


def test_the_table_covers_all_cases():
    assert {row[0].strip() for row in ROWS} == set(CASES)


@pytest.mark.parametrize(
    ("gpu", "case", "reason"),
    [
        ("a100", "masked", "flash: attn_mask given"),
        (
            "a100",
            "masked gqa",
            "flash: attn_mask given; efficient: enable_gqa with 2 KV heads for 4 query heads",
        ),
        ("a100", "causal decode", "flash: is_causal with 1 queries and 16 keys"),
        ("a100", "float32", "flash: float32 instead of float16 or bfloat16"),
        ("a100", "head_dim 320", "flash: head_dim 320 over 256"),
        ("b200", "head_dim 256", "cudnn: head_dim 256 over 128"),
        ("h100", "one key", "cudnn: a single key"),
        ("h100", "odd mask", "cudnn: attn_mask of a shape that it does not take; flash: attn_mask given"),
        (
            "v100",
            "plain",
            "flash: SM 7.0 outside 8.0 to 12.1; efficient: bfloat16 instead of float16 or float32",
        ),
        (
            "mi300x",
            "value 32",
            "; ".join(f"{name}: head_dim of query, key and value differ (64, 32)" for name in ("flash", "efficient")),
        ),
    ],
)
def test_reason(gpu, case, reason):
    assert choose_backend(attention(**CASES[case]), part(gpu)).reason == reason


def test_the_reason_reaches_the_cost():
    cost = price(one_op(sdpa, *qkv(), bool_mask()), "a100")
    assert (cost.backend, cost.note) == ("efficient", "flash: attn_mask given")


def test_operands_that_begin_off_alignment_lose_the_memory_efficient_kernel():
    aligned = attention(dtype=torch.float32)
    shifted = dataclasses.replace(aligned, key=dataclasses.replace(aligned.key, offset=1))
    assert choose_backend(shifted, part("a100")).name == "math"
    assert choose_backend(shifted, part("v100")).name == "efficient"


def test_an_unknown_compute_capability_is_said_to_be_assumed():
    unknown = dataclasses.replace(part("b200"), compute_capability=None)
    chosen = choose_backend(attention(), unknown)
    assert (chosen.name, chosen.reason) == ("cudnn", "taken for SM 10.0")


def test_three_dimensions_are_never_fused():
    q = plain(torch.empty(4, 16, 64, dtype=torch.bfloat16, device="meta"))
    call = Attention(query=q, key=q, value=q)
    assert choose_backend(call, part("h100")).name == "math"
    assert not is_fused_somewhere(call)


@pytest.mark.parametrize(
    ("shape", "name"),
    [({"queries": 1, "keys": 128}, "flash"), ({}, "math"), ({"queries": 1, "keys": 128, "dim": 80}, "math")],
)
def test_apple_fuses_a_few_queries(shape, name):
    assert choose_backend(attention(**shape), part("m4_max")).name == name
    cost = price(one_op(sdpa, *qkv(**shape)), "m4_max")
    assert cost.backend == name
    assert bool(cost.scratch_written) == (name == "math")


def test_elsewhere_a_fused_kernel_is_assumed_and_said_to_be():
    cost = price(one_op(sdpa, *qkv(), bool_mask()), "tpu_v5p")
    assert cost.backend == "flash"
    assert cost.note.startswith("assumed")


# --- layout of the output ---

SIZES = st.tuples(st.integers(2, 3), st.integers(2, 4), st.integers(2, 5))


@settings(deadline=None)
@given(sizes=SIZES, layout=st.sampled_from(LAYOUTS[:4]), value_dim=st.sampled_from((8, 16)))
def test_output_strides_equal_pytorchs(sizes, layout, value_dim):
    batch, head, tokens = sizes
    shape = {"batch": batch, "q_heads": head, "kv_heads": head, "queries": tokens, "keys": tokens}
    q, k, v = qkv(**shape, dim=8, value_dim=value_dim, layout=layout)
    results = {
        "cudnn": aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
        "efficient": aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
        "math": aten._scaled_dot_product_attention_math(q, k, v)[0],
    }
    if value_dim == 8:
        results["flash"] = aten._scaled_dot_product_flash_attention(q, k, v)[0]
    for backend, result in results.items():
        assert output_stride(backend, tuple(q.shape), q.stride(), value_dim) == result.stride(), backend


def test_token_major_queries_give_a_token_major_output_when_fused():
    fused, unfused = attention(layout="token"), attention(layout="token", dtype=torch.float64)
    assert traced_output_stride(fused) == (16 * 4 * 64, 64, 4 * 64, 1)
    assert traced_output_stride(unfused) == (4 * 16 * 64, 16 * 64, 64, 1)
    assert is_fused_somewhere(fused)
    assert not is_fused_somewhere(unfused)
