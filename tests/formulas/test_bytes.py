"""Bytes moved.

Oracle: small real tensors whose elements are their own addresses, so that what an operator reads can be
counted in its result, and what it writes in what it changed.
"""

import itertools
from typing import Any

import pytest
import torch
from formulas.one_op import aten, cost_of, graph_of, meta, read_of, traffic_of
from fxroof.analyzer.cost import Status
from hypothesis import given
from hypothesis import strategies as st

ITEM = 8


def addresses(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def reads(target: Any, *args: Any, name: str = "self") -> int:
    return read_of(cost_of(target, *args), graph_of(target, *args), name)


def distinct(tensor: torch.Tensor) -> int:
    return int(tensor.unique().numel())


@given(
    dims=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=4),
    offset=st.integers(0, 5),
)
def test_a_view_is_read_at_the_memory_behind_it(dims: list[tuple[int, int]], offset: int) -> None:
    shape, stride = [d[0] for d in dims], [d[1] for d in dims]
    view = addresses(128).as_strided(shape, stride, offset)
    seen = ITEM * distinct(view)
    read = reads(aten.abs.default, view)
    assert seen <= read <= 128 * ITEM
    steps = sorted((s, n) for n, s in dims if s and n > 1)
    nested = all(s >= below_s * below_n for (below_s, below_n), (s, _) in itertools.pairwise(steps))
    if nested:
        assert read == seen


@given(rows=st.integers(1, 12), width=st.integers(1, 5), picks=st.lists(st.integers(0, 11), max_size=30))
def test_a_gather_reads_its_rows_and_never_more_than_the_table(rows: int, width: int, picks: list[int]) -> None:
    table = addresses(rows, width)
    index = torch.tensor([p % rows for p in picks], dtype=torch.int64)
    columns = index[:, None].expand(-1, width) if width else index
    for target, args, name in (
        (aten.embedding.default, (table, index), "weight"),
        (aten.index.Tensor, (table, [index]), "self"),
        (aten.index_select.default, (table, 0, index), "self"),
        (aten.gather.default, (table, 0, columns), "self"),
        (aten.take.default, (table, columns), "self"),
        (aten.take_along_dim.default, (table, columns, 0), "self"),
    ):
        seen, read = ITEM * distinct(target(*args)), reads(target, *args, name=name)
        assert seen <= read <= ITEM * table.numel(), target
        assert read <= ITEM * width * len(picks), target
        if len(set(index.tolist())) == len(picks) and target is not aten.take.default:
            assert read == seen, target


@given(rows=st.integers(1, 12), width=st.integers(1, 5), data=st.data())
def test_a_scatter_in_place_writes_the_rows_it_hits(rows: int, width: int, data: st.DataObject) -> None:
    picks = data.draw(st.lists(st.integers(0, rows - 1), max_size=rows, unique=True))
    index, values = torch.tensor(picks, dtype=torch.int64), torch.ones(len(picks), width, dtype=torch.int64)
    columns = index[:, None].expand(-1, width)
    for target, args in (
        (aten.index_put_.default, ([index], values)),
        (aten.index_copy_.default, (0, index, values)),
        (aten.index_fill_.int_Scalar, (0, index, 1)),
        (aten.scatter_.src, (0, columns, values)),
        (aten.scatter_.value, (0, columns, 1)),
        (aten.put_.default, (columns, values)),
    ):
        if target is aten.put_.default and width > 1:
            continue
        hit = torch.zeros(rows, width, dtype=torch.int64)
        target(hit, *args)
        graph = graph_of(target, torch.zeros_like(hit), *args)
        cost = cost_of(target, torch.zeros_like(hit), *args)
        assert sum(a.written for a in cost.traffic) == ITEM * int(hit.sum()), target
        assert read_of(cost, graph, "self") == 0, target


@given(rows=st.integers(1, 12), width=st.integers(1, 5), data=st.data())
def test_a_scatter_that_accumulates_reads_what_it_writes(rows: int, width: int, data: st.DataObject) -> None:
    picks = data.draw(st.lists(st.integers(0, rows - 1), max_size=rows, unique=True))
    index, values = torch.tensor(picks, dtype=torch.int64), torch.ones(len(picks), width, dtype=torch.int64)
    columns = index[:, None].expand(-1, width)
    for target, args in (
        (aten.index_put_.default, ([index], values, True)),
        (aten.index_add_.default, (0, index, values)),
        (aten.scatter_add_.default, (0, columns, values)),
        (aten.scatter_reduce_.two, (0, columns, values, "sum")),
    ):
        hit = torch.zeros(rows, width, dtype=torch.int64)
        target(hit, *args)
        graph = graph_of(target, torch.zeros_like(hit), *args)
        cost = cost_of(target, torch.zeros_like(hit), *args)
        touched = ITEM * int(hit.sum())
        assert sum(a.written for a in cost.traffic) == read_of(cost, graph, "self") == touched, target
        assert cost.vector_flops == int(hit.sum()), target


def test_out_of_place_scatters_copy_the_whole_first() -> None:
    table, index, values = addresses(10, 4), torch.tensor([1, 7]), torch.zeros(2, 4, dtype=torch.int64)
    for target, args in (
        (aten.index_put.default, ([index], values)),
        (aten.index_copy.default, (0, index, values)),
        (aten.scatter.src, (0, index[:, None].expand(-1, 4), values)),
    ):
        cost = cost_of(target, table, *args)
        assert sum(a.written for a in cost.traffic) == ITEM * (40 + 8), target
        assert reads(target, table, *args) == ITEM * 40
    read, written = traffic_of(aten.slice_scatter.default, table, values, 0, 2, 4)
    assert (read, written) == (ITEM * (40 + 8), ITEM * (40 + 8))


def test_a_cache_write_costs_its_rows() -> None:
    cache = meta(2, 8, 4096, 128, dtype=torch.bfloat16)
    new, position = meta(2, 8, 1, 128, dtype=torch.bfloat16), meta(1, dtype=torch.int64)
    rows = 2 * 8 * 128 * 2
    for target, args in (
        (aten.index_put_.default, ([None, None, position], new)),
        (aten.index_copy_.default, (2, position, new)),
    ):
        assert traffic_of(target, cache, *args) == (rows + 8, rows)
    assert traffic_of(aten.copy_.default, cache[:, :, 7:8], new) == (rows, rows)


def test_advanced_indices_broadcast() -> None:
    target = addresses(3, 4, 5)
    rows, columns = torch.tensor([[0], [2]]), torch.tensor([1, 3])
    changed = torch.zeros_like(target)
    aten.index_put_.default(changed, [rows, None, columns], torch.ones(1, dtype=torch.int64))
    cost = cost_of(aten.index_put_.default, target, [rows, None, columns], torch.ones(1, dtype=torch.int64))
    assert sum(a.written for a in cost.traffic) == ITEM * int(changed.sum())


def test_one_value_under_a_mask_is_a_masked_fill() -> None:
    mask = torch.zeros(10, 4, dtype=torch.bool)
    put = traffic_of(aten.index_put_.default, addresses(10, 4), [mask], torch.tensor(0))
    fill = traffic_of(aten.masked_fill_.Tensor, addresses(10, 4), mask, torch.tensor(0))
    assert put == fill


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.clone.default, ()),
        (aten.flip.default, ([0],)),
        (aten.roll.default, ([1], [0])),
        (aten.repeat.default, ([2, 3, 1, 1],)),
        (aten.tril.default, ()),
        (aten.tril.default, (-2,)),
        (aten.tril.default, (3,)),
        (aten.triu.default, ()),
        (aten.triu.default, (2,)),
        (aten.triu.default, (-3,)),
        (aten.constant_pad_nd.default, ([1, 2, 0, 1], -1)),
        (aten.reshape.default, ([-1],)),
        (aten.repeat_interleave.self_int, (2, 0)),
        (aten.slice_copy.Tensor, (1, 0, 2)),
        (aten.diagonal_copy.default, (0, 2, 3)),
        (aten.expand_copy.default, ([2, 4, 6, 6],)),
        (aten.pixel_shuffle.default, (2,)),
        (aten.channel_shuffle.default, (2,)),
    ],
    ids=str,
)
def test_movement_reads_what_its_result_shows(target: Any, args: tuple[Any, ...]) -> None:
    source = addresses(2, 4, 6, 6) + 1
    if target in (aten.reshape.default,):
        source = source.transpose(0, 2)
    result = target(source.clone(memory_format=torch.preserve_format), *args)
    shown = distinct(result[result > 0])
    read, written = traffic_of(target, source, *args)
    filled_first = shown if target is aten.constant_pad_nd.default else 0
    assert read == ITEM * shown
    assert written == ITEM * (result.numel() + filled_first)


@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), dim=st.integers(0, 1), count=st.integers(1, 4))
def test_concatenation_reads_and_writes_everything(shape: list[int], dim: int, count: int) -> None:
    parts = [meta(*shape) for _ in range(count)]
    whole = 4 * count * parts[0].numel()
    assert traffic_of(aten.cat.default, parts, dim) == (whole, whole)
    assert traffic_of(aten.stack.default, parts, dim) == (whole, whole)


def test_expanding_then_copying_reads_the_small_source() -> None:
    keys = meta(2, 8, 1, 64, 128).expand(2, 8, 4, 64, 128)
    once = 4 * 2 * 8 * 64 * 128
    assert traffic_of(aten.reshape.default, keys, [2, 32, 64, 128]) == (once, 4 * once)


VIEWS = [
    (aten.view.default, ([4, 6],)),
    (aten.reshape.default, ([-1],)),
    (aten.transpose.int, (0, 1)),
    (aten.permute.default, ([2, 0, 1],)),
    (aten.expand.default, ([5, 2, 3, 4],)),
    (aten.slice.Tensor, (1, 0, 2)),
    (aten.select.int, (0, 1)),
    (aten.split.Tensor, (1,)),
    (aten.chunk.default, (2,)),
    (aten.unbind.int, ()),
    (aten.unsqueeze.default, (0,)),
    (aten.contiguous.default, ()),
    (aten.to.dtype, (torch.float32,)),
    (aten.flatten.using_ints, ()),
    (aten.detach.default, ()),
    (aten.dropout.default, (0.5, False)),
    (aten.unfold.default, (2, 2, 1)),
    (aten.view_as.default, (torch.empty(24, device="meta"),)),
]


@pytest.mark.parametrize(("target", "args"), VIEWS, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_views_are_free(target: Any, args: tuple[Any, ...]) -> None:
    cost = cost_of(target, meta(2, 3, 4), *args)
    assert cost.status is Status.FREE
    assert not cost.traffic


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.empty.memory_format, ([4, 6],)),
        (aten.empty_like.default, (meta(4),)),
        (aten.new_empty.default, (meta(4), [3])),
        (aten.transpose_.default, (meta(4, 5), 0, 1)),
        (aten.unsqueeze_.default, (meta(4, 5), 0)),
    ],
    ids=str,
)
def test_what_runs_no_kernel_is_free(target: Any, args: tuple[Any, ...]) -> None:
    assert cost_of(target, *args).status is Status.FREE


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.zeros.default, ([4, 6],)),
        (aten.arange.default, (24,)),
        (aten.zeros_like.default, (meta(4, 6),)),
        (aten.new_full.default, (meta(2), [4, 6], 1.0)),
        (aten.fill_.Scalar, (meta(4, 6), 1.0)),
        (aten.zero_.default, (meta(4, 6),)),
        (aten.randn_like.default, (meta(4, 6),)),
        (aten.normal_.default, (meta(4, 6),)),
    ],
    ids=str,
)
def test_creation_only_writes(target: Any, args: tuple[Any, ...]) -> None:
    made = target(*args)
    assert traffic_of(target, *args) == (0, 24 * made.element_size())


ELEMENTWISE = [
    (aten.add.Tensor, aten.add_.Tensor, 2),
    (aten.mul.Tensor, aten.mul_.Tensor, 2),
    (aten.silu.default, aten.silu_.default, 1),
    (aten.relu.default, aten.relu_.default, 1),
    (aten.clamp.default, aten.clamp_.default, 1),
]


@given(st.sampled_from(ELEMENTWISE), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_in_place_reads_and_writes_the_view(family: tuple[Any, Any, int], shape: list[int]) -> None:
    plain, in_place, operands = family
    extra = [0.0] if plain is aten.clamp.default else []
    args = [meta(*shape) for _ in range(operands)]
    view = meta(3, *shape)[1]
    assert traffic_of(in_place, view, *args[1:], *extra) == traffic_of(plain, *args, *extra)
    assert cost_of(in_place, view, *args[1:], *extra).vector == cost_of(plain, *args, *extra).vector


BATCHED = [
    (aten.linear.default, (8,), (meta(6, 8), meta(6))),
    (aten.layer_norm.default, (8,), ([8], meta(8), meta(8))),
    (aten.rms_norm.default, (8,), ([8], meta(8))),
    (aten.conv2d.default, (3, 9, 9), (meta(4, 3, 3, 3), meta(4))),
    (aten.batch_norm.default, (5, 4), (meta(5), meta(5), meta(5), meta(5), False, 0.1, 1e-5, True)),
    (aten.group_norm.default, (6, 4), (2, meta(6), meta(6))),
    (aten.prelu.default, (5, 4), (meta(5),)),
    (aten.softmax.int, (8,), (-1,)),
    (aten.sum.dim_IntList, (8,), ([-1],)),
    (aten.gelu.default, (8,), ()),
    (aten.max_pool2d.default, (3, 8, 8), ([2, 2],)),
    (aten.topk.default, (64,), (4,)),
]


@pytest.mark.parametrize(("target", "shape", "rest"), BATCHED, ids=lambda v: str(v) if "aten" in str(v) else "")
def test_twice_the_batch_moves_twice_the_activations_and_the_same_weights(
    target: Any, shape: tuple[int, ...], rest: tuple[Any, ...]
) -> None:
    weights = sum(4 * t.numel() for t in rest if isinstance(t, torch.Tensor))
    single, double = (traffic_of(target, meta(b, *shape), *rest) for b in (4, 8))
    assert double[0] - weights == 2 * (single[0] - weights)
    assert double[1] == 2 * single[1]
    once, twice = (cost_of(target, meta(b, *shape), *rest) for b in (4, 8))
    assert twice.matmul_flops == 2 * once.matmul_flops
    if target is not aten.batch_norm.default:  # it prepares each channel once
        assert twice.vector_flops == 2 * once.vector_flops
        assert twice.special == 2 * once.special


def test_softmax_that_widens_reads_half_and_writes_float() -> None:
    source = meta(4, 8, dtype=torch.float16)
    assert traffic_of(aten.softmax.int, source, -1, torch.float32) == (2 * 32, 4 * 32)


def test_softmax_of_another_type_widens_a_copy() -> None:
    source = meta(4, 8, dtype=torch.bfloat16)
    assert traffic_of(aten.softmax.int, source, -1, torch.float32) == (2 * 32 + 4 * 32, 2 * 4 * 32)


def test_training_dropout_writes_a_mask() -> None:
    assert traffic_of(aten.dropout.default, meta(8), 0.5, True) == (32, 32 + 8)
