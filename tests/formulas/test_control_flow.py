"""Higher-order ops against what eager PyTorch runs: loops turned, branches taken, masks evaluated."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.experimental.control_flow import map as map_over
from fxroof.analyzer.analysis import PhaseAnalysis, analyze_phase
from fxroof.analyzer.cost import Status
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.meta import on_meta
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

H100 = load("h100").gpu
Forward = Callable[..., Any]


class Call(nn.Module):
    """A forward made of a function and, for closures, its modules and tensors."""

    def __init__(self, forward: Forward, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)
        self.run = forward

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def graph_of(forward: Forward, *args: torch.Tensor, **held: Any) -> Graph:
    return trace(on_meta(Call(forward, **held).eval()), args)


def analysed(forward: Forward, *args: torch.Tensor, **held: Any) -> PhaseAnalysis:
    phase, _ = analyze_phase(graph_of(forward, *args, **held), H100)
    return phase


def counted_flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def notes(phase: PhaseAnalysis) -> str:
    return " | ".join(op.note for op in phase.ops if op.note)


def without_caches(phase: PhaseAnalysis) -> float:
    ops = [((op.bytes_read + op.bytes_written) / 3350e9, op.flops_executed / 66.9e12) for op in phase.ops]
    return sum(max(op) for op in ops)


# --- conditions ---


def narrow_or_wide(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: self.narrow(x), lambda x: self.wide(x), (x,))


def layers() -> dict[str, nn.Module]:
    narrow = nn.Linear(64, 64, bias=False)
    return {"narrow": narrow, "wide": nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False))}


def test_a_condition_is_charged_its_cheaper_branch_and_says_how_much_the_other_takes() -> None:
    x = meta(512, 64)
    phase = analysed(narrow_or_wide, x, **layers())
    asked = analysed(lambda _, x: x.sum() > 0, x)
    narrow, wide = (analysed(lambda self, x: self.layer(x), x, layer=layer) for layer in layers().values())
    assert phase.flops.matmul == counted_flops(lambda: layers()["narrow"](torch.randn(512, 64)))
    assert phase.seconds.bound == pytest.approx(asked.seconds.bound + narrow.seconds.bound)
    ratio = without_caches(wide) / without_caches(narrow)
    assert f"its true branch is charged, the other takes {ratio:.3g} times as long" in notes(phase)


def test_a_condition_exceeds_no_run_in_bound_and_in_floor() -> None:
    x = meta(8, 64)
    for swap in (False, True):
        a, b = reversed(layers().values()) if swap else layers().values()
        both = analysed(narrow_or_wide, x, narrow=a, wide=b)
        for layer in layers().values():
            run = analysed(lambda self, x: (x.sum() > 0, self.layer(x)), x, layer=layer)
            assert both.seconds.bound <= run.seconds.bound
            assert both.seconds.floor <= run.seconds.floor


def test_a_condition_in_a_condition_is_charged_the_cheapest_way_through() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.max() > 1, lambda x: self.wide(x), lambda x: x.sin(), (x,))

        return torch.cond(x.sum() > 0, inner, lambda x: self.narrow(x), (x,))

    # the inner one's max and sine cost less than either matmul once the matrices are wide
    phase = analysed(forward, meta(4, 64), **layers())
    assert phase.flops.matmul == 0
    assert {op.target for op in phase.ops if op.status is Status.PRICED} >= {"aten.max.default", "aten.sin.default"}


def test_an_operator_without_a_formula_stays_named_on_the_branch_that_is_not_charged() -> None:
    @torch.library.custom_op("fxroof_branch::slow", mutates_args=())
    def slow(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    slow.register_fake(torch.empty_like)

    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: slow(slow(x)), (x,))

    phase = analysed(forward, meta(64, 64))
    unpriced = [op for op in phase.ops if op.status is Status.UNPRICED]
    assert [op.target for op in unpriced] == ["fxroof_branch.slow.default"] * 2
    assert all(op.seconds == 0 for op in unpriced)


def test_ops_of_a_body_are_shown_at_the_line_that_calls_it() -> None:
    graph = graph_of(narrow_or_wide, meta(8, 64), **layers())
    line = narrow_or_wide.__code__.co_firstlineno + 1
    for op in graph.ops:
        assert op.anchor is not None
        assert op.anchor.line == line
    assert len({op.name for op in graph.ops}) == len(graph.ops)


# --- loops ---


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.integers(-3, 3),
    step=st.integers(1, 3),
    limit=st.integers(-4, 12),
    how=st.sampled_from(("tensor", "zeros", "int", "two counters")),
)
def test_a_loop_over_constants_is_charged_every_turn(start: int, step: int, limit: int, how: str) -> None:
    def forward(_: Any, x: torch.Tensor) -> Any:
        if how == "int":
            return while_loop(lambda i, x: i < limit, lambda i, x: (i + step, x @ x), (start, x))
        first = torch.zeros(1, dtype=torch.int64) + start if how == "zeros" else torch.tensor(start)
        if how == "two counters":
            return while_loop(
                lambda i, n, x: i < n, lambda i, n, x: (i + 2 * step, n + step, x @ x), (first, torch.tensor(limit), x)
            )
        return while_loop(lambda i, x: (i < limit).all(), lambda i, x: (i + step, x @ x), (first, x))

    def eager() -> None:
        i, x = start, torch.randn(8, 8)
        while i < limit:
            i, x = i + step, x @ x

    phase = analysed(forward, meta(8, 8))
    assert phase.flops.matmul == counted_flops(eager)
    assert "unknown" not in notes(phase)


def test_the_published_loop_of_three_products() -> None:
    # torch.utils.flop_counter gives 0
    def forward(_: Any, x: torch.Tensor) -> Any:
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x @ x), (torch.tensor(0), x))

    phase = analysed(forward, meta(8, 8))
    assert phase.flops.matmul == 3072
    product = next(op for op in phase.ops if op.target == "aten.matmul.default")
    assert (product.repeat, product.bytes_read, product.bytes_written) == (3, 3 * 256, 3 * 256)
    once = analysed(lambda _, x: x @ x, meta(8, 8))
    assert product.seconds == pytest.approx(3 * once.seconds.bound)


@pytest.mark.parametrize("how", ["data", "too long", "written before"])
def test_a_loop_of_unknown_length_is_charged_one_turn_and_says_so(how: str) -> None:
    def forward(_: Any, x: torch.Tensor) -> Any:
        if how == "data":
            return while_loop(lambda x: x.sum() < 3, lambda x: (x @ x,), (x,))
        first = torch.zeros((), dtype=torch.int64)
        if how == "written before":
            first.add_(2)
        limit = 10**9 if how == "too long" else 4
        return while_loop(lambda i, x: i < limit, lambda i, x: (i + 1, x @ x), (first, x))

    phase = analysed(forward, meta(8, 8))
    assert phase.flops.matmul == 2 * 8 * 8 * 8
    assert "a loop of unknown length is charged for one turn" in notes(phase)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_scan_is_charged_every_step(steps: int) -> None:
    def step(self: Any, carry: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.tanh(carry @ self.weight + x)
        return new, new.clone()

    def forward(self: Any, carry: torch.Tensor, xs: torch.Tensor) -> Any:
        return scan(lambda c, x: step(self, c, x), carry, xs, dim=0)

    def unrolled(self: Any, carry: torch.Tensor, xs: torch.Tensor) -> Any:
        results = []
        for x in xs:
            carry, result = step(self, carry, x)
            results.append(result)
        return carry, torch.stack(results)

    args, weight = (meta(2, 8), meta(steps, 2, 8)), nn.Parameter(torch.empty(8, 8))
    looped, flat = (analysed(f, *args, weight=weight) for f in (forward, unrolled))
    assert looped.flops == flat.flops
    assert looped.bytes.total == flat.bytes.total
    assert looped.seconds.bound == pytest.approx(flat.seconds.bound)


def test_map_is_charged_every_row() -> None:
    looped = analysed(lambda _, xs, w: map_over(lambda x, w: x @ w, xs, w), meta(5, 8, 4), meta(4, 16))
    flat = analysed(lambda _, xs, w: torch.stack([x @ w for x in xs]), meta(5, 8, 4), meta(4, 16))
    assert looped.flops == flat.flops
    assert looped.bytes.total == flat.bytes.total


def linear_recurrence(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


def test_an_associative_scan_is_one_kernel_that_combines_all_rows() -> None:
    def forward(_: Any, a: torch.Tensor, x: torch.Tensor) -> Any:
        return associative_scan(linear_recurrence, (a, x), 0, combine_mode="pointwise")

    phase = analysed(forward, meta(16, 8), meta(16, 8))
    (op,) = (op for op in phase.ops if op.target == "higher_order.associative_scan")
    assert (op.bytes_read, op.bytes_written) == (2 * 16 * 8 * 4, 2 * 16 * 8 * 4)
    assert op.flops == 15 * 8 * 3


def test_vmap_runs_its_ops_on_whole_batches() -> None:
    def forward(_: Any, x: torch.Tensor, w: torch.Tensor) -> Any:
        return torch.vmap(torch.vmap(lambda row: torch.relu(row @ w)))(x)

    phase = analysed(forward, meta(5, 3, 2, 8), meta(8, 16))
    x, w = torch.randn(5, 3, 2, 8), torch.randn(8, 16)
    assert phase.flops.matmul == counted_flops(lambda: torch.vmap(torch.vmap(lambda row: row @ w))(x))
    assert phase.flops.vector == 5 * 3 * 2 * 16
    assert phase.bytes.output == 5 * 3 * 2 * 16 * 4


# --- flex_attention ---


def qkv(queries: int, keys: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 4, dim: int = 64) -> Any:
    return (
        meta(batch, heads, queries, dim, dtype=torch.bfloat16),
        meta(batch, kv_heads, keys, dim, dtype=torch.bfloat16),
        meta(batch, kv_heads, keys, dim, dtype=torch.bfloat16),
    )


def flex(phase: PhaseAnalysis) -> Any:
    (op,) = (op for op in phase.ops if op.target == "higher_order.flex_attention")
    return op


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_flex_attention_without_a_mask_is_attention(kv_heads: int) -> None:
    q, k, v = qkv(300, 700, kv_heads=kv_heads)
    phase = analysed(lambda _, q, k, v: flex_attention(q, k, v, enable_gqa=True), q, k, v)
    sdpa = nn.functional.scaled_dot_product_attention
    assert phase.flops.matmul == counted_flops(lambda: sdpa(q, k, v, enable_gqa=True))
    assert phase.flops.matmul_executed == phase.flops.matmul
    op = flex(phase)
    assert (op.bytes_read, op.bytes_written) == (2 * (q.numel() + k.numel() + v.numel()), 2 * q.numel())
    assert op.special == 2 * 4 * 300 * 700


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j) & (i - j < 200)


def by_head(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j) & (j % (h + 1) == 0)


@pytest.mark.parametrize("mask", [causal, window, by_head])
@pytest.mark.parametrize("made", ["in forward", "in the constructor"])
def test_flex_attention_executes_the_pairs_that_its_mask_keeps(mask: Any, made: str) -> None:
    queries, keys = 300, 700
    q, k, v = qkv(queries, keys)
    heads = 4 if mask is by_head else None

    def block_mask(device: str) -> BlockMask:
        return create_block_mask(mask, None, heads, queries, keys, device=device)

    held = block_mask("cpu") if made == "in the constructor" else None

    def forward(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=held or block_mask("cuda"))

    seen = create_mask(mask, None, heads, queries, keys, device="cpu").expand(2, 4, queries, keys)
    op = flex(analysed(forward, q, k, v))
    assert op.special == int(seen.sum())
    rows = int(seen.any(2).sum())
    assert op.bytes_read == 2 * q.numel() + 2 * 2 * 64 * rows
    phase = analysed(forward, q, k, v)
    assert phase.flops.matmul == 2 * 2 * 4 * queries * keys * 2 * 64
    assert phase.flops.matmul_executed == 2 * int(seen.sum()) * 2 * 64


def test_blocks_given_without_a_function_are_counted() -> None:
    counts = torch.tensor([[[1, 2, 3, 4]]], dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, seq_lengths=(512, 512))
    phase = analysed(lambda _, q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv(512, 512))
    assert flex(phase).special == 2 * 4 * 10 * 128 * 128


def test_a_mask_that_depends_on_data_is_taken_as_dense_and_says_so() -> None:
    def forward(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor) -> Any:
        def same(b: Any, h: Any, i: Any, j: Any) -> Any:
            return documents[i] == documents[j]

        return flex_attention(q, k, v, block_mask=create_block_mask(same, None, None, 512, 512, device="cuda"))

    phase = analysed(forward, *qkv(512, 512), meta(512, dtype=torch.int64))
    assert flex(phase).special == 2 * 4 * 512 * 512
    assert "its block mask depends on data: taken as dense" in notes(phase)


def test_a_score_mod_works_on_every_pair_in_the_kernel() -> None:
    def forward(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex_attention(
            q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s / 20) * 20 + self.slopes[h] * (i - j)
        )

    q, k, v = qkv(256, 256)
    slopes = torch.arange(4.0)
    plain, modified = analysed(flex_plain, q, k, v), analysed(forward, q, k, v, slopes=slopes)
    pairs = 2 * 4 * 256 * 256
    assert flex(modified).special - flex(plain).special == pairs
    # a division, two products, a sum, a difference
    assert flex(modified).flops - flex(plain).flops == 5 * pairs
    assert flex(modified).seconds < flex(plain).seconds + 5 * pairs / 1e12


def flex_plain(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return flex_attention(q, k, v)


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # torch.compile imports what is
def test_flex_attention_may_be_compiled_by_the_file() -> None:
    compiled = torch.compile(flex_attention, dynamic=False)
    plain, wrapped = analysed(flex_plain, *qkv(64, 64)), analysed(lambda _, q, k, v: compiled(q, k, v), *qkv(64, 64))
    assert wrapped.flops == plain.flops
    assert wrapped.bytes == plain.bytes


# --- wrappers ---


def test_functions_that_are_merely_wrapped_are_inlined() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
        with torch.enable_grad():
            return self.layer(x)

    phase = analysed(forward, meta(4, 8), layer=nn.Linear(8, 8, bias=False))
    assert phase.flops.matmul == 2 * 2 * 4 * 8 * 8
    assert math.isclose(sum(op.seconds for op in phase.ops), phase.seconds.bound)
